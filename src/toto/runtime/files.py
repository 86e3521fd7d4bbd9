"""Files that are either whole or not there: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toto.runtime.errors import StoreError


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, sync it and rename it to `path`.

    The temporary name starts with a dot and ends with this process's number, so two writers never share one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
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


def read_json(path: Path, *, what: str) -> Any:
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
