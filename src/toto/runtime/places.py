"""Places for files, on a disk or at a URL: names to paths, and folders that outputs go to."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias, final
from urllib.parse import unquote

import tyro

from toto.runtime.errors import ConfigError
from toto.runtime.files import written_aside
from toto.runtime.network import WEB, filesystem, reached
from toto.runtime.remote import RemotePath, is_url

WHOLE_OR_NOT: Final = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf", "memory")
ON_DISK: Final = ("file://", "local://")


def as_path(where: str | Path | RemotePath) -> Path | RemotePath:
    """A place by its name: a URL as it is written, anything else (`file://` too) on this machine.

    >>> as_path("s3://bucket/store"), as_path("file:///tmp/store").name, as_path("store").name
    (RemotePath('s3://bucket/store'), 'store', 'store')
    """
    if not isinstance(where, str):
        return where
    if where.startswith(ON_DISK):
        return Path(unquote(where.partition("://")[2].removeprefix("localhost")))
    return RemotePath(where) if is_url(where) else Path(where)


AnyPath: TypeAlias = Annotated[
    Path | RemotePath,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: as_path(words[0]),
        is_instance=lambda value: isinstance(value, Path | RemotePath),
        str_from_instance=lambda value: [str(value)],
    ),
]  # of an option that takes both


def sha256_at(path: Path | RemotePath) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        FileNotFoundError: there is no such file.
        PlaceError: the place can't be reached.
    """
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class Place(ABC):
    """A folder of files, on a disk or at a URL; names in it have forward slashes.

    Use `Place.open`. Methods raise `FileNotFoundError` or `PermissionError` for what isn't there or isn't allowed, and
    `PlaceError` where the network fails to the last.
    """

    def __init__(self, where: Path | RemotePath):
        self.where = where

    def __repr__(self) -> str:
        return f"Place({str(self.where)!r})"

    def __str__(self) -> str:
        return str(self.where)

    @staticmethod
    def open(where: str | Path | RemotePath) -> Place:
        """The place of this name; nothing is made or asked yet."""
        path = as_path(where)
        return _Disk(path) if isinstance(path, Path) else _Store(path)

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None where a web server doesn't tell."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """A whole file."""

    @abstractmethod
    def get(self, name: str, local: Path) -> None:
        """Copy a file to this machine; it is whole at `local`, or not there."""

    @abstractmethod
    def put(self, local: Path, name: str) -> None:
        """Copy a file of this machine here; readers see it whole, or what was there before, or nothing."""

    @abstractmethod
    def write_bytes(self, content: bytes, name: str) -> None:
        """Write a whole file, as `put` does."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; one that isn't there is none to delete."""

    @abstractmethod
    def list(self, under: str = "") -> list[str]:
        """Names of all files, or of those in a folder and below it, in alphabetical order, hidden ones left out.

        A place that isn't there holds none.
        """


@final
class _Disk(Place):
    """A folder of this machine."""

    def __init__(self, where: Path):
        super().__init__(where)
        self._folder = where

    def exists(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def read_bytes(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def get(self, name: str, local: Path) -> None:
        with written_aside(local) as aside:
            shutil.copyfile(self._folder / name, aside)

    def put(self, local: Path, name: str) -> None:
        with written_aside(self._folder / name) as aside:
            shutil.copyfile(local, aside)

    def write_bytes(self, content: bytes, name: str) -> None:
        with written_aside(self._folder / name) as aside:
            aside.write_bytes(content)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def list(self, under: str = "") -> list[str]:
        root = self._folder / under
        names = (path.relative_to(self._folder) for path in root.rglob("*") if path.is_file())
        return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


@final
class _Store(Place):
    """A folder at a URL.

    Object stores show a file when all of it has arrived. On other servers (sftp, webdav, ...) it goes under a hidden
    name first and is moved then.
    """

    def __init__(self, where: RemotePath):
        super().__init__(where)
        self._root = where

    def exists(self, name: str) -> bool:
        self._forget_listings()
        return (self._root / name).is_file()

    def size(self, name: str) -> int | None:
        self._forget_listings()
        return (self._root / name).size

    def read_bytes(self, name: str) -> bytes:
        self._forget_listings()
        return (self._root / name).read_bytes()

    def get(self, name: str, local: Path) -> None:
        self._forget_listings()
        with written_aside(local) as aside, aside.open("w+b") as file:
            (self._root / name).copy_to(file)

    def put(self, local: Path, name: str) -> None:
        size = local.stat().st_size
        self._write(name, size, lambda files, path: files.put_file(str(local), path))

    def write_bytes(self, content: bytes, name: str) -> None:
        self._write(name, len(content), lambda files, path: files.pipe_file(path, content))

    def remove(self, name: str) -> None:
        files, path = self._writable(name)

        def delete() -> None:
            try:
                files.rm_file(path)
            except FileNotFoundError:
                return

        reached(delete, where=str(self._root / name))
        self._forget_listings()

    def list(self, under: str = "") -> list[str]:
        self._forget_listings()
        try:
            found = RemotePath(str(self._root / under)).files()
        except FileNotFoundError:
            return []
        return sorted(file.below(self._root) for file in found)

    def _write(self, name: str, size: int, write: Callable[[Any, str], object]) -> None:
        files, path = self._writable(name)
        folder, _, last = path.rpartition("/")
        first = path if self._root.protocol in WHOLE_OR_NOT else f"{folder}/.{last}.{uuid.uuid4().hex[:8]}"

        def send() -> None:
            if first != path:
                files.makedirs(folder, exist_ok=True)
            write(files, first)
            files.invalidate_cache()
            there = files.info(first)["size"]
            if there != size:
                raise EOFError(f"{there} of {size} bytes arrived")
            if first != path:
                _replace(files, first, path)

        try:
            reached(send, where=str(self._root / name))
        finally:
            if first != path:
                with contextlib.suppress(Exception):
                    files.rm_file(first)
            self._forget_listings()

    def _writable(self, name: str) -> tuple[Any, str]:
        if self._root.protocol in WEB:
            raise ConfigError("a web address can't be written to", where=self._root, fix="give a folder or a bucket")
        return filesystem(str(self._root / name))

    def _forget_listings(self) -> None:
        """Ask anew: other machines write here too."""
        filesystem(self._root.url)[0].invalidate_cache()


def _replace(files: Any, first: str, last: str) -> None:
    """Move a file over another one, which few servers do at once."""
    try:
        files.mv(first, last)
    except FileExistsError:
        files.rm_file(last)
        files.mv(first, last)
