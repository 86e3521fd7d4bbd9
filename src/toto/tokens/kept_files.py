"""Files of a store at a URL, by way of the cache of this machine."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

from toto.runtime.cache import CACHE_GB, Cache, cache
from toto.runtime.errors import StoreError
from toto.runtime.network import NOT_THERE
from toto.runtime.remote import RemotePath


@final
class KeptFiles:
    """Fetches a store's files when they are first needed.

    Args:
        folder: the store's URL.
        checksums: the SHA-256 of each of its files.
    """

    def __init__(self, folder: RemotePath, checksums: Mapping[str, str]):
        self._folder, self._checksums = folder, checksums

    def file(self, name: str, let_go: Callable[[], None]) -> Path:
        """A copy of a file, whose content is what the manifest says.

        Args:
            name: of the file in the store.
            let_go: called before the copy is deleted to make room.

        Raises:
            StoreError: the file is missing or damaged, or there is no room for it.
            PlaceError: the store can't be reached.
        """
        path = self._folder / name

        def fetch(file: io.BufferedIOBase, each: Callable[[bytes], object]) -> None:
            try:
                path.copy_to(file, each=each)
            except NOT_THERE as error:
                raise self._missing(path, error) from None

        def size() -> int:
            try:
                return path.size or 0
            except NOT_THERE as error:
                raise self._missing(path, error) from None

        return self._cache.hold(self._checksums[name], fetch, size=size, ending=path.suffix, where=path, let_go=let_go)

    def checked_again(self, name: str, let_go: Callable[[], None]) -> Path:
        """A copy that is compared with its checksum now, and fetched anew where it was damaged here."""
        sha256 = self._checksums[name]
        path = self.file(name, let_go)
        if self._cache.is_whole(sha256):
            return path
        self._cache.forget(sha256)
        return self.file(name, let_go)

    def touch(self, name: str) -> None:
        """Remember that a file was used just now."""
        self._cache.touch(self._checksums[name])

    def warn_if_larger(self, size: int, what: str) -> None:
        """Say that files will be fetched again and again, where they don't fit all together."""
        limit = self._cache.limit
        if size > limit:
            warnings.warn(
                f"{self._folder}: {what} {size / 1e9:.3g} GB, the cache {self._cache.folder} holds "
                f"{limit / 1e9:.3g} GB: shards will be fetched again and again; "
                f"set {CACHE_GB} to more, or copy the store to a disk",
                stacklevel=4,
            )

    @property
    def _cache(self) -> Cache:
        return cache()

    @staticmethod
    def _missing(path: RemotePath, error: Exception) -> StoreError:
        what = "may not be read" if isinstance(error, PermissionError) else "missing"
        return StoreError(what, where=path, fix="restore it, or make the store again")
