"""The one family of exceptions that toto raises on purpose."""

from __future__ import annotations

import os
from typing import Any, Literal


class TotoError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    Args:
        what: what is wrong, without a full stop.
        where: the file, folder, option or item it is about.
        fix: what the reader can do.
    """

    def __init__(self, what: str, *, where: str | os.PathLike[str] | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        place = "" if where is None else f"{os.fspath(where)}: "
        remedy = "" if fix is None else f"; {fix}"
        super().__init__(" ".join(f"{place}{what}{remedy}".split()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries with the keyword arguments kept."""
        return _rebuild, (
            type(self),
            self.what,
            None if self.where is None else os.fspath(self.where),
            self.fix,
        )


def _rebuild(kind: type[TotoError], what: str, where: str | None, fix: str | None) -> TotoError:
    return kind(what, where=where, fix=fix)


class ConfigError(TotoError):
    """An option, recipe or combination of values that can't be run."""


class MediaError(TotoError):
    """A media file that can't be used; `status` is the word its ledger row gets."""

    status: Literal["corrupt", "short"] = "corrupt"


class ShortMediaError(MediaError):
    """A media file that is readable but holds too few frames or pixels."""

    status: Literal["corrupt", "short"] = "short"


class PassportError(TotoError):
    """Tokens, weights or results that were made by a stranger."""


class StoreError(TotoError):
    """A shard folder that is missing, unfinished or damaged."""


class CheckpointError(TotoError):
    """A checkpoint that is missing, damaged or of another model."""


class NonFiniteLossError(TotoError):
    """The loss became infinite or not a number."""


class InterruptedRunError(TotoError):
    """SIGINT or SIGTERM arrived and everything was saved before leaving."""
