"""The one family of exceptions that toto raises on purpose."""

from __future__ import annotations

from typing import Any, Literal


class TotoError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    Args:
        what: what is wrong, without a full stop.
        where: the file, folder, URL, option or item it is about; its text is shown.
        fix: what the reader can do.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        place = "" if where is None else f"{where}: "
        remedy = "" if fix is None else f"; {fix}"
        super().__init__(" ".join(f"{place}{what}{remedy}".split()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries with the keyword arguments kept."""
        return _rebuild, (
            type(self),
            self.what,
            None if self.where is None else str(self.where),
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


class PlaceError(TotoError):
    """A place elsewhere that can't be reached now; says nothing about what lies there."""


class StorageError(TotoError):
    """A file or folder that can't be written: no space, no permission, a limit."""


class PassportError(TotoError):
    """Tokens, weights or results that were made by a stranger."""


class StoreError(TotoError):
    """A shard folder that is missing, unfinished or damaged."""


class CheckpointError(TotoError):
    """A checkpoint that is missing, damaged or of another model."""


class NonFiniteLossError(TotoError):
    """The loss became infinite or not a number."""


class DivergedError(TotoError):
    """The loss is a number still, and stays far above what it was."""


class RankError(TotoError):
    """Another process of the same job has gone."""


class InterruptedRunError(TotoError):
    """SIGINT or SIGTERM arrived and everything was saved before leaving."""
