"""The network below `toto.runtime.remote`: what fsspec reaches, tried again where it fails, copied or read in parts.

A network that fails is tried again a few times and then raised as `PlaceError`, never as the fault of a file. What is
not there, or may not be read, is `FileNotFoundError` or `PermissionError`, as on a disk.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import fsspec  # type: ignore[import-untyped]

from toto.runtime.errors import ConfigError, PlaceError

Found = TypeVar("Found")
URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
WEB: Final = ("http", "https")
PACKAGES: Final = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
WAITS: Final = (0.5, 2.0, 5.0)  # seconds before each further attempt
MISSING, FORBIDDEN, PASSING = (404, 410), (401, 403), (408, 425, 429)  # HTTP; those passing are worth another attempt
NOT_THERE: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
CONNECT_SECONDS, SILENT_SECONDS = 30, 60
BESIDES_SECONDS, SLOWEST = 300.0, 250_000  # a copy may take so long, and a second for so many bytes
CHUNK: Final = 2**23  # of a file that is copied
BLOCK, LARGEST_BLOCK, GAP = 2**16, 2**23, 2**18  # of one that is read here and there


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL in this process, and the place in it.

    Raises:
        ConfigError: nobody knows the protocol, or its package is not installed.
    """
    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    try:
        if protocol in WEB:
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
            options = {"client_kwargs": {"timeout": timeout}}
        files, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        if package is None:
            raise ConfigError(f"{protocol}:// needs a package ({error})", where=url, fix="install it") from None
        raise ConfigError(
            f"{protocol}:// needs the package {package}", where=url, fix="pip install 'toto-video[cloud]'"
        ) from None
    except ValueError as error:
        raise ConfigError(f"can't be reached ({_line(error)})", where=url, fix="check the URL") from None
    return files, str(path)


def reached(action: Callable[[], Found], *, where: str) -> Found:
    """What the action gives, tried again after a while where the network fails.

    Raises:
        FileNotFoundError: what it asks for isn't there; `PermissionError` where it isn't allowed.
        PlaceError: it failed to the last.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (ConfigError, PlaceError):
            raise
        except Exception as error:
            cause = _cause(error)
            status = getattr(cause, "status", None)
            if isinstance(cause, NOT_THERE):
                raise cause from None
            if status in MISSING:
                raise FileNotFoundError(2, "no such file", where) from None
            if status in FORBIDDEN:
                raise PermissionError(13, "permission denied", where) from None
            lasting = isinstance(status, int) and 400 <= status < 500 and status not in PASSING
            if wait is None or lasting:
                raise PlaceError(
                    f"can't be reached ({_line(cause)})",
                    where=where,
                    fix="check the network and run the same command again",
                ) from None
        time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """What really happened: fsspec says "not found" on the web whatever it was."""
    behind = error.__cause__
    return behind if isinstance(error, FileNotFoundError) and isinstance(behind, Exception) else error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def patience(size: int) -> float:
    """Seconds that fetching so many bytes may take at most."""
    return BESIDES_SECONDS + size / SLOWEST


def copy(
    url: str,
    file: io.BufferedIOBase,
    *,
    start: int = 0,
    size: int | None,
    whole: bool = True,
    each: Callable[[bytes], object] | None = None,
) -> int:
    """Write a file, or `size` bytes of it from `start`, into an open one from where that stands.

    Args:
        url: of the file.
        file: seekable; where a copy is begun anew, it is cut back.
        start: the first byte.
        size: how many; None where a web server doesn't tell.
        whole: it is all of the file.
        each: gets every piece that was written for good (for a checksum).

    Returns:
        How many bytes were written.

    Raises:
        FileNotFoundError: there is no such file; `PermissionError` where it may not be read.
        PlaceError: the place can't be reached, ends before it should, or is slower than 0.25 MB a second.
    """
    if whole and url.startswith(WEB):
        return _copy_stream(url, file, size, each)
    if size is None:
        raise PlaceError("its size is not told", where=url, fix="copy it to a disk")
    until = time.monotonic() + patience(size)
    for place in range(start, start + size, CHUNK):
        _require_speed(url, until)
        piece = read_range(url, place, min(CHUNK, start + size - place))
        if piece is None:
            raise PlaceError("its server gives no parts of files", where=url, fix="copy it to a disk")
        file.write(piece)
        if each:
            each(piece)
    return size


def _copy_stream(url: str, file: io.BufferedIOBase, total: int | None, each: Callable[[bytes], object] | None) -> int:
    """One request for a whole file, which every web server answers; what failed midway is begun anew."""
    files, place = filesystem(url)
    begin, until = file.tell(), time.monotonic() + patience(total or 0)

    def fetch() -> int:
        file.seek(begin)
        file.truncate()
        with files.open(place, "rb", block_size=0) as source:
            while piece := source.read(CHUNK):
                file.write(piece)
                if total is not None:
                    _require_speed(url, until)
        count = file.tell() - begin
        if total is not None and count != total:
            raise EOFError(f"{count} of {total} bytes came")
        return count

    count = reached(fetch, where=url)
    if each:
        file.seek(begin)
        while piece := file.read(CHUNK):
            each(piece)
    return count


def _require_speed(url: str, until: float) -> None:
    if time.monotonic() > until:
        raise PlaceError(
            f"gives less than {SLOWEST / 1e6:g} MB a second",
            where=url,
            fix="run the same command again when the network is better, or copy it to a disk",
        )


def read_range(url: str, start: int, count: int) -> bytes | None:
    """Some bytes of a file; None where a web server sends the whole file whatever is asked.

    Raises:
        FileNotFoundError: there is no such file; `PermissionError` where it may not be read.
        PlaceError: the place can't be reached.
    """
    files, place = filesystem(url)

    def fetch() -> bytes:
        found: bytes = files.cat_file(place, start=start, end=start + count)
        if len(found) < count:
            raise EOFError(f"{len(found)} of {count} bytes came")
        return found

    found = reached(fetch, where=url)
    return found if len(found) == count else None


class RangeFile(io.RawIOBase):
    """A file at a URL, opened for reading with seeks; size None is one whose server doesn't tell it.

    Reads that follow each other fetch ever larger blocks; a jump begins with a small one. Where a web server can't give
    parts of a file, the whole is copied to the disk for as long as it is open.
    """

    def __init__(self, url: str, *, name: str, size: int | None):
        self._url, self._name, self._place = url, name, 0
        self._block, self._first, self._ahead = b"", 0, BLOCK
        self._copy: io.BufferedIOBase | None = None
        self._size = self._copy_whole() if size is None else size

    @property
    def name(self) -> str:
        """Its own name; a decoder goes by the ending."""
        return self._name

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        """Where it stands."""
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read what the block in hand has, or the next block."""
        wanted = max(0, min(len(buffer), self._size - self._place))
        if not wanted:
            return 0
        if not self._first <= self._place < self._first + len(self._block):
            self._fetch(wanted)
        begin = self._place - self._first
        piece = self._block[begin : begin + wanted]
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def close(self) -> None:
        """Drop what it holds."""
        if self._copy is not None:
            self._copy.close()
        self._block = b""
        super().close()

    def _fetch(self, wanted: int) -> None:
        end = self._first + len(self._block)
        follows = bool(self._block) and end <= self._place <= end + GAP
        self._ahead = min(2 * self._ahead, LARGEST_BLOCK) if follows else BLOCK
        count = min(max(wanted, self._ahead), self._size - self._place)
        self._block, self._first = b"", self._place
        if self._copy is None:
            found = read_range(self._url, self._place, count)
            if found is not None:
                self._block = found
                return
            self._copy_whole()
        assert self._copy is not None
        self._copy.seek(self._place)
        self._block = self._copy.read(count)

    def _copy_whole(self) -> int:
        self._copy = cast(io.BufferedIOBase, tempfile.TemporaryFile(prefix="toto-"))  # noqa: SIM115 - closed with this one
        return copy(self._url, self._copy, size=None)
