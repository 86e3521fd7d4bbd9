"""Compressed tars, unpacked where they are read.

Members of a compressed tar can't be sought, so the tar is unpacked, whole, into a scratch folder that all processes of
a run share. The folder is bounded: what was used longest ago is deleted first, and unpacked again where it is needed
once more. It is deleted when the run ends; what a killed run leaves, the next one deletes.

* `TOTO_SCRATCH`: where it is; the system's folder for temporary files where it is not set.
* `TOTO_SCRATCH_GB`: how large it may become.
"""

from __future__ import annotations

import atexit
import bz2
import contextlib
import fcntl
import gzip
import hashlib
import io
import lzma
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.files import FULL, remove_leftovers
from toto.runtime.remote import RemotePath

SCRATCH, SCRATCH_GB = "TOTO_SCRATCH", "TOTO_SCRATCH_GB"
RUN = "TOTO_SCRATCH_OF_RUN"  # tells the processes that this one starts
USUAL_GB = 50.0
MOST_RATIO, FREE_BYTES = 100, 2**26  # nothing that holds media shrinks to a hundredth; small tars are mostly padding
BLOCK = 2**20
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def _zstd(raw: io.BufferedReader) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


Opener = Callable[[io.BufferedReader], Any]
OPENERS: dict[str, Opener] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
SHORT = {".tgz": ".gz", ".tbz2": ".bz2", ".tbz": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
TAR_ENDINGS = (".tar", *(f".tar{ending}" for ending in OPENERS), *SHORT)


def compression(path: Path | RemotePath) -> str | None:
    """How a tar is compressed, by its ending; None where it is not.

    >>> compression(Path("a.tar.gz")), compression(Path("a.tzst")), compression(Path("a.tar"))
    ('.gz', '.zst', None)
    """
    name = path.name.lower()
    whole = next((f".tar{ending}" for ending in OPENERS if name.endswith(f".tar{ending}")), None)
    return whole.removeprefix(".tar") if whole else SHORT.get(path.suffix.lower())


def open_tar(path: Path | RemotePath) -> io.BufferedReader:
    """A tar, opened for reading as if it were not compressed.

    Raises:
        OSError: it can't be opened.
        MediaError: it unpacks to more than a hundred times its size.
        ConfigError: there is no room to unpack it.
    """
    how = compression(path)
    if how is None:
        return path.open("rb")
    made = _place(path)
    with contextlib.suppress(FileNotFoundError):
        os.utime(made)
        return made.open("rb")
    with _alone(made.parent):
        if not made.exists():
            _unpack(path, OPENERS[how], made)
        return made.open("rb")


def damage_of(path: Path | RemotePath) -> str | None:
    """Why a compressed tar could not be unpacked to its end, after `open_tar`; None where it could, or needed not."""
    if compression(path) is None:
        return None
    with contextlib.suppress(OSError):
        return _place(path).with_suffix(".damage").read_text()
    return None


def _place(path: Path | RemotePath) -> Path:
    """Where a tar is unpacked to; another file under the same name has another place."""
    if isinstance(path, RemotePath):
        key = f"{path} {path.size}"
    else:
        found = path.stat()
        key = f"{path.absolute()} {found.st_size} {found.st_mtime_ns}"
    return scratch_folder() / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.tar"


def scratch_folder() -> Path:
    """The scratch folder of this run, made when it is first asked for."""
    known = os.environ.get(RUN)
    if known and Path(known).is_dir():
        return Path(known)
    root = Path(os.environ.get(SCRATCH) or tempfile.gettempdir()) / f"toto-unpacked-{os.getuid()}-{platform.node()}"
    folder = root / f".run.{os.getpid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise ConfigError("belongs to somebody else", where=root, fix=f"set {SCRATCH} to a folder of yours")
        remove_leftovers(root)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"can't be used as scratch folder ({error.strerror})", where=root, fix=f"set {SCRATCH} to another folder"
        ) from None
    os.environ[RUN] = str(folder)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process unpacks at a time, so that the bound holds; the lock goes with the process."""
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(folder)
        yield


def _unpack(path: Path | RemotePath, opener: Opener, made: Path) -> None:
    """Unpack a tar; where it is damaged, what lies before the damage, with a note."""
    limit = _limit()
    aside = made.with_name(f".{made.stem}.{os.getpid()}")
    written, damage = 0, None
    try:
        with path.open("rb") as raw, aside.open("wb", buffering=0) as file:
            blocks = _blocks(raw, opener)
            while True:
                try:
                    block = next(blocks, b"")
                except DAMAGE as error:
                    damage = " ".join(str(error).split()) or type(error).__name__
                    break
                if not block:
                    break
                written += len(block)
                if written > max(FREE_BYTES, MOST_RATIO * raw.tell()):
                    raise MediaError(
                        f"refused: it unpacks to more than {MOST_RATIO} times its size ({written:,} bytes so far)",
                        where=path,
                        fix="unpack it yourself if you trust it",
                    )
                if written > limit:
                    raise ConfigError(
                        f"unpacks to more than {limit / 1e9:g} GB",
                        where=path,
                        fix=f"set {SCRATCH_GB} to more, or unpack the compression first",
                    )
                _make_room(made.parent, limit, aside=written)
                _write(file, block, path)
        aside.replace(made)
        if damage:
            made.with_suffix(".damage").write_text(damage)
    finally:
        aside.unlink(missing_ok=True)


def _blocks(raw: io.BufferedReader, opener: Opener) -> Iterator[bytes]:
    with opener(raw) as stream:
        while block := stream.read(BLOCK):
            yield block


def _write(file: io.FileIO, block: bytes, path: Path | RemotePath) -> None:
    left = memoryview(block)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"no room left to unpack it in {Path(str(file.name)).parent}",
            where=path,
            fix=f"set {SCRATCH} to a folder with more room, or {SCRATCH_GB} to less than there is",
        ) from None


def _make_room(folder: Path, limit: float, *, aside: int) -> None:
    """Delete what was used longest ago until everything fits; what is open is freed when it is closed."""
    kept = sorted(((found.stat(), found) for found in folder.glob("*.tar")), key=lambda pair: pair[0].st_mtime_ns)
    total = aside + sum(size.st_size for size, _ in kept)
    for size, oldest in kept:
        if total <= limit:
            return
        oldest.unlink(missing_ok=True)
        total -= size.st_size


def _limit() -> float:
    text = os.environ.get(SCRATCH_GB, str(USUAL_GB))
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigError(f"{text!r} is no number of gigabytes", where=SCRATCH_GB, fix="set it to 50, say")
    return limit
