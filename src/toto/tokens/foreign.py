"""Weights that others saved: tensors read from safetensors and from what `torch.save` wrote, executing nothing.

A file is told by its content: safetensors, the zip archive of `torch.save`, the run of pickles that `torch.save` wrote
before it (torch < 1.6), the tar archive before that, or a plain pickle. All pickles go through `pickle_machine`: a name
outside of `ALLOWED` anywhere in the stream refuses the file, and a name on it is a word to be understood here, never
something to import. A storage is read when a wanted tensor needs it.

The formats are those of `torch/serialization.py`; what the pickles mean is in `foreign_content`.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Final, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from toto.runtime.errors import CheckpointError
from toto.tokens.foreign_content import (
    ALLOWED,
    STORAGES,
    Extent,
    Found,
    Storages,
    damaged,
    dotted,
    gather,
    is_size,
    pairs_of,
    storage_of,
)
from toto.tokens.pickle_machine import Scan, Window, printable, scan_pickle

LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL: Final = 1001
ZIP_MAGIC, TAR_MAGIC, TAR_MAGIC_AT, TAR_BLOCK = b"PK\x03\x04", b"ustar", 257, 512
LOCAL_HEADER: Final = struct.Struct("<4s2xHH16xHH")  # of a zip entry: magic, flags, method, lengths of name and extra
ENCRYPTED, UTF8_NAME = 1, 0x800  # flags of a zip entry
MOST_NAMED: Final = 12  # names in one message
READ_AT_ONCE: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """What a foreign weight file holds.

    Attributes:
        weights: tensors on the CPU by their names, as the file orders them. They may be views of a common storage.
        ignored: keys of the file that hold no weights (epoch, optimizer_states, ...), as the file orders them.
    """

    weights: dict[str, Tensor]
    ignored: tuple[str, ...]


def read_foreign(path: Path) -> ForeignWeights:
    """Read the weights of a state dict, of a Lightning checkpoint (its `state_dict`) or of a whole pickled module.

    Raises:
        CheckpointError: there is no such file, it is damaged or of another kind, it holds no weights, or a pickle in it
            refers to something that is not in `ALLOWED`.
    """
    try:
        if not path.is_file():
            raise CheckpointError("no such file", fix="check the path")
        with path.open("rb") as handle:
            weights, ignored = _read(handle, path)
    except OSError as error:
        reason = error.strerror or printable(str(error))
        raise CheckpointError(f"can't be read ({reason})", where=path, fix="check the file") from None
    except CheckpointError as error:
        raise CheckpointError(error.what, where=path, fix=error.fix) from None
    if not weights:
        keys = f"; its keys are {_listed(ignored)}" if ignored else ""
        raise CheckpointError(
            f"holds no weights{keys}", where=path, fix="give a state dict, a Lightning checkpoint or a pickled module"
        )
    return ForeignWeights(weights=weights, ignored=ignored)


def _read(handle: BufferedReader, path: Path) -> Found:
    size = os.fstat(handle.fileno()).st_size
    head = handle.read(TAR_BLOCK)
    if head.startswith(ZIP_MAGIC):
        return _read_zip(handle, size)
    if head[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        return _refuse_tar(handle, size)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors(path)
    return _read_pickles(handle, size)


def _read_safetensors(path: Path) -> Found:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name).clone() for name in names}, ()
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(printable(str(error))) from None


# ---- the zip archive of torch.save ----


def _read_zip(handle: BufferedReader, size: int) -> Found:
    entries = _zip_entries(handle, size)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise damaged(f"a zip archive with {len(pickles)} data.pkl, where torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise CheckpointError("is a TorchScript archive, which is a program", fix="save its state_dict with torch.save")
    extent = entries[pickles[0]]
    _require_checksum(handle, extent, pickles[0])
    value = _clean(scan_pickle(Window(handle, extent.start, extent.size), ALLOWED)).value
    if order := entries.get(f"{folder}byteorder"):
        word = Window(handle, order.start, order.size).read(16)
        if word != b"little":
            raise _other_order() if word == b"big" else damaged("its byte order is no order")
    data = f"{folder}data/"
    extents = {name.removeprefix(data): extent for name, extent in entries.items() if name.startswith(data)}
    return gather(value, Storages(handle, extents))


def _zip_entries(handle: BufferedReader, size: int) -> dict[str, Extent]:
    """Where each entry's bytes are. All lie plainly in the file, without compression and without sharing."""
    try:
        infos = zipfile.ZipFile(cast(IO[bytes], Window(handle, 0, size))).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise damaged(printable(str(error))) from None
    entries: dict[str, Extent] = {}
    for info in infos:
        name = info.orig_filename
        shown = printable(name)
        header = Window(handle, info.header_offset, LOCAL_HEADER.size).read() if 0 <= info.header_offset < size else b""
        if len(header) < LOCAL_HEADER.size:
            raise damaged(f"entry {shown} lies outside of the file")
        magic, flags, method, name_length, extra_length = LOCAL_HEADER.unpack(header)
        spelled = handle.read(name_length).decode("utf-8" if flags & UTF8_NAME else "cp437", errors="replace")
        if magic != ZIP_MAGIC or spelled != name or name in entries:
            raise damaged(f"entry {shown} is there twice or under another name")
        if (method, info.compress_type) != (0, 0) or (flags | info.flag_bits) & ENCRYPTED:
            raise damaged(f"entry {shown} is compressed or encrypted, which torch.save never does")
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if info.file_size != info.compress_size or start + info.file_size > size:
            raise damaged(f"entry {shown} is cut off")
        entries[name] = Extent(start=start, size=info.file_size, checksum=info.CRC)
    if sum(extent.size for extent in entries.values()) > size:
        raise damaged("its entries overlap")
    return entries


def _require_checksum(handle: BufferedReader, extent: Extent, name: str) -> None:
    checksum = 0
    window = Window(handle, extent.start, extent.size)
    while chunk := window.read(READ_AT_ONCE):
        checksum = zlib.crc32(chunk, checksum)
    if checksum != extent.checksum:
        raise damaged(f"the checksum of {printable(name)} is wrong")


# ---- the run of pickles before it, the tar archive before that, and plain pickles ----


def _read_pickles(handle: BufferedReader, size: int) -> Found:
    """A plain pickle, or the five of the legacy format: magic number, protocol, system, object, keys; then storages."""
    window = Window(handle, 0, size)
    first = _clean(scan_pickle(window, ALLOWED)).value
    if not (isinstance(first, int) and first == LEGACY_MAGIC):
        return gather(first, Storages(handle, {}))
    if _clean(scan_pickle(window, ALLOWED)).value != LEGACY_PROTOCOL:
        raise damaged("an unknown protocol of the legacy format")
    system = _clean(scan_pickle(window, ALLOWED)).value
    if any(key == "little_endian" and told is False for key, told in pairs_of(system) or []):
        raise _other_order()
    content = _clean(scan_pickle(window, ALLOWED))
    keys = _clean(scan_pickle(window, ALLOWED)).value
    declared = {storage.key: storage for storage in map(storage_of, content.persistent) if storage}
    extents: dict[str, Extent] = {}
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str) or key not in declared or key in extents:
            raise damaged("its list of storages doesn't fit its tensors")
        count = int.from_bytes(window.read(8), "little")
        extent = Extent(start=window.tell(), size=count * declared[key].dtype.itemsize, checksum=None)
        if count != declared[key].count or not window.skip(extent.size):
            raise damaged(f"storage {printable(key)} is cut off or of another size")
        extents[key] = extent
    return gather(content.value, Storages(handle, extents))


def _refuse_tar(handle: BufferedReader, size: int) -> Found:
    """Nobody needs this format any more, but what its pickles refer to is said."""
    refused: dict[str, None] = {}
    for scan in _tar_scans(handle, size):
        refused |= dict.fromkeys(scan.refused)
    if refused:
        raise _refusal(refused)
    raise CheckpointError(
        "is a tar archive, as torch.save wrote before 2017, which isn't read", fix="save it again with a newer torch"
    )


def _tar_scans(handle: BufferedReader, size: int) -> Iterator[Scan]:
    """Every pickle in the archive as far as its members are well-formed, raw numbers between them left out."""
    place = 0
    while place + TAR_BLOCK <= size:
        header = Window(handle, place, TAR_BLOCK).read()
        name, digits = header[:100].rstrip(b"\0"), header[124:136].strip(b" \0")
        length = int(digits, 8) if digits and not digits.strip(b"01234567") else 0
        place += TAR_BLOCK
        window = Window(handle, place, min(length, size - place))
        if name.startswith(b"storages"):
            yield from _tar_storages(window)
        elif name.startswith(b"tensors"):
            yield from _tar_tensors(window)
        elif length and header[156:157] in (b"0", b"\0"):
            yield scan_pickle(window, ALLOWED)
        place += -(-length // TAR_BLOCK) * TAR_BLOCK


def _tar_storages(window: Window) -> Iterator[Scan]:
    count = scan_pickle(window, ALLOWED)
    yield count
    for _ in range(count.value if is_size(count.value) else 0):
        scan = scan_pickle(window, ALLOWED)
        yield scan
        kind = scan.value[2] if isinstance(scan.value, tuple) and len(scan.value) == 3 else None
        dtype = STORAGES.get(dotted(kind))
        if dtype is None or not window.skip(int.from_bytes(window.read(8), "little") * dtype.itemsize):
            return
    yield scan_pickle(window, ALLOWED)


def _tar_tensors(window: Window) -> Iterator[Scan]:
    count = scan_pickle(window, ALLOWED)
    yield count
    for _ in range(count.value if is_size(count.value) else 0):
        scan = scan_pickle(window, ALLOWED)
        yield scan
        dimensions = int.from_bytes(window.read(4), "little")
        if scan.fault or not window.skip(4 + 2 * 8 * dimensions + 8):  # filler, sizes, strides, offset
            return


# ---- errors; `read_foreign` adds the file ----


def _clean(scan: Scan) -> Scan:
    """The scan, if the stream is well-formed and refers to nothing outside of the list."""
    if scan.refused:
        raise _refusal(scan.refused)
    if scan.fault:
        raise damaged(f"its pickle: {scan.fault}")
    return scan


def _refusal(names: Iterable[str]) -> CheckpointError:
    named = tuple(names)
    verb = "is" if len(named) == 1 else "are"
    return CheckpointError(
        f"the pickle refers to {_listed(named)}, which {verb} not on the allow-list", fix="nothing was executed"
    )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(printable(name) for name in names[:MOST_NAMED]) + more


def _other_order() -> CheckpointError:
    return CheckpointError("was written on a big-endian machine", fix="save it again on a little-endian one")
