"""Where a store is made: its own folder, or for a URL a scratch folder whose finished files go there one by one.

What an unfinished store needs to be continued lies with it: `plan.json` says which job it is, and `parts/NNNNN.json`
comes after a shard's files and says what is in them. So any machine can go on with a store at a URL.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, final

from toto.runtime.errors import ConfigError
from toto.runtime.files import read_json, remove_leftovers, write_json
from toto.runtime.network import WEB
from toto.runtime.places import Place
from toto.runtime.provenance import RECORD
from toto.runtime.remote import RemotePath
from toto.tokens.shards import MANIFEST

PLAN, PARTS = "plan.json", "parts"


@final
class Output:
    """An unfinished or finished store; use as a context manager.

    Args:
        where: the store's folder or URL.

    Attributes:
        folder: where its files are made.

    Raises:
        ConfigError: nothing can be written to that URL.
    """

    def __init__(self, where: Path | RemotePath):
        if isinstance(where, RemotePath) and where.protocol in WEB:
            raise ConfigError("a web address can't be written to", where=where, fix="give a folder or a bucket")
        self.where = where
        self._place = None if isinstance(where, Path) else Place.open(where)
        self._strangers = False
        self.folder = where if isinstance(where, Path) else Path(tempfile.mkdtemp(prefix="toto-store-"))

    def __enter__(self) -> Output:
        """Look up what is there; at a URL, bring what an earlier run needs to be continued."""
        if self._place is None:
            there = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
            self._strangers = not all(map(_is_beginning, there))
            return self
        try:
            there = self._place.list()
            self._strangers = not all(map(_is_beginning, there))
            for name in there:
                if name in (MANIFEST, PLAN) or (name.startswith(f"{PARTS}/") and name.endswith(".json")):
                    self._place.get(name, self.folder / name)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self._place is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the store is whole."""
        return (self.folder / MANIFEST).exists()

    @property
    def is_begun(self) -> bool:
        """Whether an unfinished store is there."""
        return (self.folder / PLAN).exists()

    @property
    def is_foreign(self) -> bool:
        """Whether something else than a store was there."""
        return self._strangers and not self.is_finished and not self.is_begun

    @property
    def waiting(self) -> Path:
        """A folder of this machine for what waits until its shard is written."""
        return self.folder / PARTS

    def parts(self) -> list[dict[str, Any]]:
        """What is said of the shards that are finished."""
        self.waiting.mkdir(parents=True, exist_ok=True)
        parts: list[dict[str, Any]] = []
        while (path := self.folder / self._part(len(parts))).exists():
            parts.append(read_json(path, what="part of a store"))
        return parts

    def add_part(self, number: int, part: dict[str, Any]) -> None:
        """Say what is in a shard, whose files are there and leave this machine if the store lies elsewhere."""
        shard = part["shard"] or {}
        files = [kept["file"] for kept in (shard, shard.get("pixels", {})) if kept]
        self.send(*files)
        write_json(self.folder / self._part(number), part)
        self.send(self._part(number))
        if self._place is not None:
            for name in files:
                (self.folder / name).unlink()

    def send(self, *names: str) -> None:
        """Bring finished files to where the store lies; in its own folder they are there."""
        for name in names:
            if self._place is not None and (self.folder / name).exists():
                self._place.put(self.folder / name, name)

    def tidy(self) -> None:
        """Drop what only an unfinished store needs, and what killed processes left."""
        if self._place is not None:
            for name in (PLAN, *self._place.list(PARTS)):
                self._place.remove(name)
            return
        (self.folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.waiting, ignore_errors=True)
        remove_leftovers(self.folder)

    @staticmethod
    def _part(number: int) -> str:
        return f"{PARTS}/{number:05d}.json"


def _is_beginning(name: str) -> bool:
    """Whether a run that ended before it had a plan may have left this."""
    return name == RECORD or name.startswith((f".{RECORD}.", f".{PLAN}."))
