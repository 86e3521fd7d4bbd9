"""The passport: who made these tokens.

Shards, checkpoints and results carry the passport of their tokenizer; whatever joins two of them compares the
passports and refuses a stranger by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toto.runtime.errors import PassportError


@dataclass(frozen=True, kw_only=True)
class Passport:
    """The identity of a tokenizer, and of the frames it was applied to.

    Attributes:
        kind: the tokenizer's family ("vqvae").
        weights_sha256: SHA-256 of the weight file.
        preprocessing: how a decoded frame became the tokenizer's input, in words that change when the pixels would.
        vocab_size: how many different codes there are.
        frame_size: height and width of a frame in pixels; None for the tokenizer alone.
        grid: rows and columns of a frame's codes; None for the tokenizer alone.
    """

    kind: str
    weights_sha256: str
    preprocessing: str
    vocab_size: int
    frame_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The passport as JSON holds it."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], *, where: str) -> Passport:
        """Read a passport back; unknown or missing fields are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(plain) != names:
            odd = ", ".join(sorted(set(plain) ^ names))
            raise PassportError(f"passport with missing or unknown fields ({odd})", where=where, fix="make it again")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        return cls(**values)

    def require_tokenizer(self, other: Passport, *, where: str, fix: str = "use the tokenizer it names") -> None:
        """Refuse `other` unless the same weights with the same preprocessing made it; frame sizes may differ."""
        self._require(other, ("kind", "weights_sha256", "preprocessing", "vocab_size"), where, fix)

    def require_same(self, other: Passport, *, where: str, fix: str = "use the tokenizer it names") -> None:
        """Refuse `other` unless every field is the same, frame size and grid included."""
        self._require(other, tuple(field.name for field in dataclasses.fields(self)), where, fix)

    def _require(self, other: Passport, names: tuple[str, ...], where: str, fix: str) -> None:
        different = [name for name in names if getattr(self, name) != getattr(other, name)]
        if different:
            pairs = ", ".join(f"{name} {short(getattr(other, name))}" for name in different)
            wanted = ", ".join(f"{name} {short(getattr(self, name))}" for name in different)
            raise PassportError(f"its tokens have {pairs}, but {wanted} is needed here", where=where, fix=fix)


def short(value: Any) -> str:
    """A value as an error message shows it: hashes by their first 12 characters."""
    text = str(value)
    return text[:12] if len(text) == 64 and not text.startswith("(") else text
