"""Files that are either whole or not there: written aside, synced, renamed; where the disk is full, in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toto.runtime.errors import StorageError, StoreError
from toto.runtime.remote import RemotePath

MAKE_SPACE = "make space, then run the same command again"
LET_WRITE = "make the folder writable, or choose another one"
UNWRITABLE = {
    errno.ENOSPC: ("no space is left on its disk", MAKE_SPACE),
    errno.EDQUOT: ("the quota of its disk is used up", MAKE_SPACE),
    errno.EFBIG: ("it would be larger than files may be here", "raise the limit (ulimit -f), or choose another disk"),
    errno.EROFS: ("its disk is read-only", LET_WRITE),
    errno.EACCES: ("no permission to write it", LET_WRITE),
    errno.EPERM: ("no permission to write it", LET_WRITE),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CUT_OFF = re.compile(r"requested and \d+ written|Not enough free space|unexpected pos \d+")  # NumPy's, torch's words
NUMBERED = re.compile(r"\[?(?:errno|os error) (\d+)\b", re.IGNORECASE)  # Arrow's and safetensors' words


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file or folder: where the disk refuses, a `StorageError` names the path.

    Libraries tell it in different ways: some by a number, some in their text alone, one by a `BaseException`.
    """
    try:
        yield
    except StorageError as error:  # of a file in a folder that is written aside
        raise StorageError(error.what, where=path, fix=error.fix) from error
    except BaseException as error:
        refused = _refused(error, path)
        if refused is None:
            raise
        raise StorageError(f"can't be written: {refused[0]}", where=path, fix=refused[1]) from error


def _refused(error: BaseException, path: Path) -> tuple[str, str] | None:
    """Why the disk took no more of a file, and what to do; None where the error is about something else."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, OSError) and error.filename is not None:
        named = Path(os.fsdecode(error.filename)).absolute()
        beside = path.absolute().parent
        if not (named.is_relative_to(beside) or beside.is_relative_to(named)):
            return None
    if number is None and (found := NUMBERED.search(str(error))):
        number = int(found[1])
    if number is None and CUT_OFF.search(str(error)):
        number = errno.ENOSPC
    return UNWRITABLE.get(number or 0)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, sync it and rename it to `path`.

    The temporary name starts with a dot and ends with this process's number, so two writers never share one.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            with aside.open("rb") as handle:
                os.fsync(handle.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; when the block ends well, rename it to `folder`."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes had begun to write aside in a folder; what a living one writes is left."""
    for path in folder.glob(".*"):
        found = re.fullmatch(r"\..+?\.(\d+)(\.\w+)?", path.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with written_aside(path) as aside:
        aside.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in their given order."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path | RemotePath, *, what: str) -> Any:
    """Read a JSON file that toto wrote; `what` names it in the error (for example "shard manifest")."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"no {what} here", where=path, fix="check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"damaged {what} ({error})", where=path, fix="make it again") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
