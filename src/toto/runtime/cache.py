"""A bounded folder of this machine for files from elsewhere, each named by the SHA-256 of its content.

    CACHE/<sha256><ending>            a whole file: written aside, checked, synced, renamed
    CACHE/.<sha256><ending>.partial   one that is arriving; what a crash leaves is deleted by the next process
    CACHE/locks/                      so that one process fetches a file and the others wait for it

What was used longest ago is deleted for what is new, but nothing that a process has open.

* `TOTO_CACHE`: where it is; `toto` in the user's cache folder where it is not set.
* `TOTO_CACHE_GB`: how large it may become; 100 where it is not set, or half of what is free on a smaller disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from toto.runtime.errors import ConfigError, StoreError
from toto.runtime.files import FULL, sha256_of

CACHE, CACHE_GB = "TOTO_CACHE", "TOTO_CACHE_GB"
USUAL_GB: Final = 100.0
PARTIAL: Final = ".partial"
Fetch = Callable[[io.BufferedIOBase, Callable[[bytes], object]], object]  # writes a file, and gives each piece to both


@dataclass
class _Held:
    """A file that this process has open, and whom to tell before it goes."""

    handle: int
    path: Path
    users: list[Callable[[], object]] = field(default_factory=list)


@final
class Cache:
    """Files by their checksums; safe with several processes and threads.

    Args:
        folder: where they are; made where it isn't there.
        limit: bytes that all of them may take. More are taken only where nothing can be spared.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._mutex = threading.RLock()
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._alone():
                for partial in folder.glob(f".*{PARTIAL}"):
                    self._remove_leftover(partial)
        except OSError as error:
            raise self._unwritable(error) from None

    def hold(
        self,
        sha256: str,
        fetch: Fetch,
        *,
        size: Callable[[], int],
        ending: str,
        where: object,
        let_go: Callable[[], None],
    ) -> Path:
        """The file of this content, which is fetched where it isn't here; it stays until `let_go` was called.

        Args:
            sha256: of the content, in hexadecimal.
            fetch: brings it.
            size: tells its bytes; asked where it has to be fetched, 0 where nobody knows.
            ending: of its name here.
            where: it comes from, for errors.
            let_go: called before the file is deleted for another one; whoever uses it drops it then.

        Raises:
            StoreError: what came has another checksum, or there is no room for it.
            TotoError: whatever else `fetch` raised; an `OSError` of it would be taken for this machine's.
        """
        with self._mutex:
            path = self.folder / f"{sha256}{ending}"
            held = self._held.get(sha256) or self._open(sha256, path)
            if held is None:
                try:
                    with self._locked(sha256[:32]):
                        held = self._open(sha256, path) or self._fetch(sha256, path, fetch, size(), where)
                except OSError as error:
                    raise self._unwritable(error) from None
            held.users.append(let_go)
            self.touch(sha256)
            return path

    def touch(self, sha256: str) -> None:
        """Remember that a held file was used just now."""
        with self._mutex:
            if sha256 in self._held:
                self._held.move_to_end(sha256)

    def forget(self, sha256: str) -> None:
        """Delete a file here, as one that turned out to be damaged."""
        with self._mutex:
            held = self._held.get(sha256)
            if held is not None:
                self._release(sha256)
                held.path.unlink(missing_ok=True)

    def is_whole(self, sha256: str) -> bool:
        """Whether a held file still has its checksum."""
        return sha256_of(self._held[sha256].path) == sha256

    def _open(self, sha256: str, path: Path) -> _Held | None:
        """Open what is here, so that nobody deletes it."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                with contextlib.suppress(OSError):
                    os.utime(path)
                self._held[sha256] = _Held(handle, path)
                return self._held[sha256]
        os.close(handle)
        return None

    def _fetch(self, sha256: str, path: Path, fetch: Fetch, size: int, where: object) -> _Held:
        aside = path.with_name(f".{path.name}{PARTIAL}")
        aside.unlink(missing_ok=True)  # whoever wrote it is gone: its lock is ours
        try:
            with aside.open("w+b") as file:
                with self._alone():
                    self._make_room(size, where)
                    file.truncate(size)
                found = hashlib.sha256()
                fetch(file, found.update)
                if found.hexdigest() != sha256:
                    raise StoreError(
                        f"damaged: the SHA-256 is {found.hexdigest()[:12]}..., the manifest says {sha256[:12]}...",
                        where=where,
                        fix="restore it, or make the store again",
                    )
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            handle = os.open(aside, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH)  # before anybody can see it, and delete it
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        self._held[sha256] = _Held(handle, path)
        return self._held[sha256]

    def _make_room(self, size: int, where: object) -> None:
        """Delete what was used longest ago until `size` bytes more fit, by the bound and on the disk."""

        def missing() -> int:
            taken = sum(each.stat().st_size for each in self.folder.iterdir() if each.is_file())
            return max(taken + size - self.limit, size - shutil.disk_usage(self.folder).free)

        closed = sorted(self._files(), key=lambda path: path.stat().st_mtime_ns)
        while missing() > 0 and closed:
            _delete_unless_open(closed.pop(0))
        while missing() > 0 and self._held:
            name = next(iter(self._held))
            path = self._held[name].path
            self._release(name)
            _delete_unless_open(path)
        if size > shutil.disk_usage(self.folder).free:
            raise self._full(where, size)

    def _release(self, sha256: str) -> None:
        held = self._held.pop(sha256)
        for let_go in held.users:
            let_go()
        os.close(held.handle)

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))

    def _remove_leftover(self, partial: Path) -> None:
        with (self.folder / "locks" / partial.name[1:33]).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Wait for all others; the lock goes with the process."""
        with (self.folder / "locks" / name).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return self._locked("room")

    def _full(self, where: object, size: int) -> StoreError:
        return StoreError(
            f"no room for its {size / 1e9:.3g} GB in the cache {self.folder}: the disk is full",
            where=where,
            fix=f"make room, or set {CACHE} to a folder with more",
        )

    def _unwritable(self, error: OSError) -> StoreError:
        what = "the disk is full" if error.errno in FULL else error.strerror or type(error).__name__
        return StoreError(
            f"the cache for what lies elsewhere can't be written ({what})",
            where=self.folder,
            fix=f"make room, or set {CACHE} to another folder",
        )


def _delete_unless_open(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def cache() -> Cache:
    """The cache of this process, where the environment says.

    Raises:
        ConfigError: its size is no number.
        StoreError: its folder can't be used.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _cache(Path(os.environ.get(CACHE) or home / "toto").absolute(), os.environ.get(CACHE_GB))


@functools.cache
def _cache(folder: Path, gigabytes: str | None) -> Cache:
    if gigabytes is None:
        made = Cache(folder, 0)
        own = sum(path.stat().st_size for path in made._files())
        made.limit = int(min(USUAL_GB * 1e9, (shutil.disk_usage(folder).free + own) / 2))
        return made
    try:
        limit = float(gigabytes)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigError(f"{gigabytes!r} is no number of gigabytes", where=CACHE_GB, fix="set it to 100, say")
    return Cache(folder, int(limit * 1e9))
