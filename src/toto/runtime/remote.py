"""Files and folders at URLs (`s3://`, `gs://`, `https://`, ...), with what the catalogs ask of a `pathlib.Path`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import total_ordering
from pathlib import PurePosixPath
from typing import Any, Final, final
from urllib.parse import quote, unquote, urlsplit

from toto.runtime.errors import ConfigError
from toto.runtime.network import BLOCK, NOT_THERE, URL, WEB, RangeFile, copy, filesystem, reached

AT_ONCE: Final = 16  # questions to a server
VERSIONS: Final = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "blob_id",
    "Last-Modified",
    "LastModified",
    "mtime",
    "created",
)  # fmt: skip; what file systems call that which changes with a file


def is_url(text: str) -> bool:
    """Whether a text names a place by its protocol.

    >>> is_url("s3://bucket/store"), is_url("shards/photos"), is_url("imagefolder:photos")
    (True, False, False)
    """
    return URL.match(text) is not None


@final
@total_ordering
class RemotePath:
    """A file or folder at a URL, with what the catalogs ask of a `pathlib.Path`.

    It is a name: it holds no connection, and crosses to other processes. In web addresses names are unquoted, so they
    are those of a local copy; what follows a question mark belongs to the address, not to the name.

    Args:
        url: with its protocol.
        size: bytes of the file, where a listing told.
        version: of the file, likewise.
    """

    def __init__(self, url: str, *, size: int | None = None, version: str | None = None):
        found = URL.match(url)
        if not found:
            raise ConfigError("is no URL", where=url, fix="write protocol://place")
        self.protocol = found[1].lower()
        self.url = f"{self.protocol}://{found[2].rstrip('/')}"
        self._size, self._version = size, version
        self._listing: tuple[RemotePath, ...] | None = None
        self._by_name: dict[RemotePath, RemotePath] | None = None

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __hash__(self) -> int:
        return hash(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __lt__(self, other: RemotePath) -> bool:
        return self.parts < other.parts

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.url, self._size, self._version)

    def __truediv__(self, name: str) -> RemotePath:
        """The place of this name below; a name with a protocol stands for itself."""
        if is_url(name):
            return RemotePath(name)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        place = self._address
        for part in parts:
            parent = place.rpartition("/")[0]
            place = parent if part == ".." else f"{place}/{quote(part) if self._web else part}"
        return RemotePath(place)

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.parts[-1]

    @property
    def stem(self) -> str:
        """Its name without the ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parts(self) -> tuple[str, ...]:
        """The protocol, and the names down to this one."""
        found = self._address.partition("://")[2].split("/")
        return self.protocol, *(map(unquote, found) if self._web else found)

    @property
    def parent(self) -> RemotePath:
        """The folder it lies in."""
        above = self._address.rpartition("/")[0]
        return self if above.endswith(":/") else RemotePath(above)

    def below(self, root: RemotePath) -> str:
        """Its name below a folder, with forward slashes."""
        return "/".join(self.parts[len(root.parts) :])

    @property
    def size(self) -> int | None:
        """Bytes of the file; None where the server doesn't tell.

        Raises:
            FileNotFoundError: there is no such file; `PermissionError` where it may not be read.
            PlaceError: the place can't be reached.
        """
        if self._size is None:
            self._learn(self._info())
        return self._size

    @property
    def version(self) -> str | None:
        """What the server said that changes with the file, an ETag, a checksum or a time.

        None where it said nothing of the kind, or wasn't asked for the file or its folder.
        """
        return self._version

    def is_file(self) -> bool:
        """Whether there is a file that may be read.

        Raises:
            PlaceError: the place can't be reached.
        """
        return self._size is not None or self._is("file")

    def is_dir(self) -> bool:
        """Whether there is a folder; on the web, an address that has a page with links and no ending."""
        if self._web:
            return not self.suffix and self._is("file") and bool(self.files())
        return self._is("directory")

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self.is_file() or self.is_dir()

    def files(self) -> tuple[RemotePath, ...]:
        """All files below, with the sizes of the listing; hidden names are left out. Asked once, none is opened.

        Raises:
            FileNotFoundError: there is no such folder.
            PlaceError: the place can't be reached.
        """
        if self._listing is None:
            self._listing = tuple(self._listed())
        return self._listing

    def listed(self) -> Mapping[RemotePath, RemotePath]:
        """All files below by themselves, with their sizes; empty where a web server lists nothing."""
        if self._by_name is None:
            try:
                self._by_name = {file: file for file in self.files()}
            except NOT_THERE:
                self._by_name = {}
        return self._by_name

    def read_bytes(self) -> bytes:
        """The whole file."""
        file = io.BytesIO()
        self.copy_to(file)
        return file.getvalue()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", *, encoding: str | None = None, newline: str | None = None) -> Any:
        """Open for reading: as bytes piece by piece, with seeks, or as text, which is fetched whole."""
        if mode == "rb":
            return io.BufferedReader(self.ranges(), BLOCK)
        if mode not in ("r", "rt"):
            raise ConfigError(f"can't be opened to {mode!r}", where=self.url, fix="write to a place")
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding or "utf-8", newline=newline)

    def ranges(self) -> RangeFile:
        """Open for reading here and there, without a buffer before it."""
        return RangeFile(self.url, name=self.name, size=self.size)

    def copy_to(
        self,
        file: io.BufferedIOBase,
        *,
        start: int = 0,
        size: int | None = None,
        each: Callable[[bytes], object] | None = None,
    ) -> int:
        """Write it, or `size` bytes of it from `start`, into an open file; see `toto.runtime.network.copy`."""
        whole = size is None
        return copy(self.url, file, start=start, size=self.size if whole else size, whole=whole, each=each)

    @property
    def _web(self) -> bool:
        return self.protocol in WEB

    @property
    def _address(self) -> str:
        """The URL without what follows a question mark on the web."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl() if self._web else self.url

    def _info(self) -> Mapping[str, Any]:
        files, path = filesystem(self.url)
        info: Mapping[str, Any] = reached(lambda: files.info(path), where=self.url)
        return info

    def _learn(self, info: Mapping[str, Any]) -> None:
        self._size, self._version = info["size"], _version_in(info)

    def _is(self, kind: str) -> bool:
        try:
            info = self._info()
        except NOT_THERE:
            return False
        if info["type"] == "file":
            self._learn(info)
        return bool(info["type"] == kind)

    def _listed(self) -> Iterator[RemotePath]:
        files, path = filesystem(self.url)
        listed = reached(lambda: _find(files, path), where=self.url)
        prefix = path.rstrip("/") + "/"
        found = []
        for name, info in listed.items():
            if not name.startswith(prefix):
                continue
            relative = name[len(prefix) :]
            if any(part.startswith(".") for part in relative.split("/")) or (self._web and "?" in relative):
                continue
            found.append(RemotePath(f"{self._address}/{relative}", size=info.get("size"), version=_version_in(info)))
        unsized = [file for file in found if file._size is None]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda file: file.is_file(), unsized))
        yield from sorted(found)


def _rebuilt(url: str, size: int | None, version: str | None) -> RemotePath:
    return RemotePath(url, size=size, version=version)


def _version_in(info: Mapping[str, Any]) -> str | None:
    return next((str(info[name]) for name in VERSIONS if info.get(name)), None)


def _find(files: Any, path: str) -> dict[str, Any]:
    listed: dict[str, Any] = files.find(path, detail=True)
    if not listed:
        files.info(path)  # raises where it isn't there
    return listed
