"""Items from elsewhere, brought to this machine whole before a decoder sees them.

So a network that fails is never taken for a damaged file, seeks cost nothing, and the decoder does what it does with
a local copy. A process keeps the file that it fetched last, for further views of it, in the scratch folder of the run
(`toto.media.unpacked`), which is deleted with the run.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from toto.media.unpacked import SCRATCH, scratch_folder
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.files import FULL
from toto.runtime.network import NOT_THERE, RangeFile
from toto.runtime.remote import RemotePath

IN_MEMORY = 2**26  # bytes of a tar's member

_last_file: list[tuple[RemotePath, Path]] = []  # one a process
_last_tar: list[tuple[RemotePath, RangeFile]] = []


def fetched_file(path: RemotePath, *, source: str) -> Path:
    """A copy of a file on this machine, under a name with its ending; it stays until the next one is fetched.

    Args:
        path: the file.
        source: id of the item, for errors.

    Raises:
        MediaError: it is missing, or may not be read.
        PlaceError: the place can't be reached.
        ConfigError: there is no room for it.
    """
    if _last_file and _last_file[0][0] == path and _last_file[0][1].exists():
        return _last_file[0][1]
    for _, old in _last_file:
        old.unlink(missing_ok=True)
    _last_file.clear()
    local = scratch_folder() / f"fetched-{os.getpid()}{path.suffix}"
    _copy(path, local, source)
    _last_file.append((path, local))
    return local


def fetched_bytes(path: RemotePath, offset: int, size: int, *, source: str) -> io.BytesIO | io.BufferedReader:
    """Some bytes of a file, as a member of a tar lies in it; see `fetched_file` for the errors."""
    if size > IN_MEMORY:
        local = scratch_folder() / f"member-{os.getpid()}"
        _copy(path, local, source, start=offset, size=size)
        file = local.open("rb")
        local.unlink()
        return file
    try:
        if not _last_tar or _last_tar[0][0] != path:
            _last_tar[:] = [(path, path.ranges())]
        reader = _last_tar[0][1]
        reader.seek(offset)
        content = bytearray()
        while len(content) < size and (piece := reader.read(size - len(content))):
            content += piece
        return io.BytesIO(content)
    except NOT_THERE as error:
        raise _missing(error, source) from None


def _copy(path: RemotePath, local: Path, source: str, *, start: int = 0, size: int | None = None) -> None:
    whole = False
    try:
        with local.open("w+b") as file:
            path.copy_to(file, start=start, size=size)
        whole = True
    except NOT_THERE as error:
        raise _missing(error, source) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"no room to fetch it to {local.parent}", where=path, fix=f"set {SCRATCH} to a folder with more room"
        ) from None
    finally:
        if not whole:
            local.unlink(missing_ok=True)


def _missing(error: Exception, source: str) -> MediaError:
    if isinstance(error, PermissionError):
        return MediaError("missing: it may not be read", where=source, fix="check who may read it")
    return MediaError("missing: no such file", where=source, fix="check the path")
