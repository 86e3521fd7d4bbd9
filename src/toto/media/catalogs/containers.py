"""Files that hold many items: WebDataset tars, and parquet files with the bytes of images or videos."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from toto.media.catalog import Bytes, Catalog, Item, Row, class_order, size_of
from toto.media.catalogs.entries import Entries, container_files, require_column, split_in_name
from toto.media.decode import Kind, codec_of, is_animated, media_kind
from toto.media.unpacked import TAR_ENDINGS, damage_of, open_tar
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.remote import RemotePath

LARGEST_MEMBER = 8 * 2**30
LARGEST_IMAGE = 2**28
LARGEST_LABEL = 2**20
LONGEST_TEXT_LABEL = 64
LABELS = ("cls", "json", "txt")  # in the order that they are asked
JSON_LABELS = ("label", "cls", "class", "class_name", "category")
MEDIA_COLUMNS = ("image", "img", "video", "jpg", "jpeg", "png", "webp", "mp4", "image_bytes", "bytes", "content")
VIDEO_COLUMNS = ("video", "mp4", "webm", "avi", "mov")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "category")
FEW_ROWS = 16
Member = tarfile.TarInfo


def webdataset(path: Path | RemotePath, _clips: Path | RemotePath) -> Catalog:
    """Tar shards: members of one name and several endings are a sample (jpg, png, webp, mp4, ...; cls, json or txt).

    Tars are read as they lie, compressed ones from a scratch folder (`toto.media.unpacked`). Links, devices, names that
    lead outside, members beyond a size that nobody means, and tars that unpack to a hundred times their size are
    refused, each with a ledger row.
    """
    entries = Entries("webdataset")
    for name, file in container_files(path, *TAR_ENDINGS):
        entries.split = split_in_name(name)
        damage: object = None
        try:
            with open_tar(file) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
                _read_tar(tar, handle, name, file, entries)
        except (tarfile.TarError, EOFError) as error:
            damage = error
        except MediaError as error:
            entries.refuse(name, "corrupt", error.what)
        except OSError as error:
            entries.refuse(name, "corrupt", f"the tar can't be read ({error.strerror or error})")
        if damage := damage_of(file) or damage:
            entries.refuse(
                name, "corrupt", f"the tar can't be read to its end ({damage}); what lies before that is used"
            )
    return entries.catalog()


def _read_tar(tar: tarfile.TarFile, handle: Any, name: str, file: Path | RemotePath, entries: Entries) -> None:
    sample: dict[str, Member] = {}
    key = ""
    try:
        for member in tar:
            if member.isdir():
                continue
            wrong = _refusal(member)
            if wrong:
                entries.refuse(f"{name}/{member.name}", "skipped", wrong)
                continue
            place = PurePosixPath(member.name)
            stem, _, ending = place.name.partition(".")
            now = str(place.with_name(stem)) if stem else member.name
            if now != key or ending.lower() in sample:
                _take_sample(sample, tar, name, file, entries)
                sample, key = {}, now
            sample[ending.lower()] = member
    finally:
        _take_sample(sample, tar, name, file, entries)
    handle.seek(tar.offset)
    if handle.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _refusal(member: Member) -> str | None:
    """Why a member of a tar is not touched."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        return "its name leads outside the tar"
    if member.issym() or member.islnk():
        return f"a link (to {member.linkname})"
    if not member.isreg():
        return "a device or a pipe"
    if member.issparse():
        return "a sparse file"
    if member.size > LARGEST_MEMBER:
        return f"{member.size:,} bytes, the limit is {LARGEST_MEMBER:,}"
    return None


def _take_sample(
    sample: dict[str, Member], tar: tarfile.TarFile, name: str, file: Path | RemotePath, entries: Entries
) -> None:
    """Add the sample's medium, with the label that lies beside it."""
    if not sample:
        return
    media = [(member, kind) for member in sample.values() if (kind := _kind(member, tar))]
    if not media:
        members = [ending for ending in sample if ending not in LABELS] or list(sample)
        first = sample[members[0]].name
        entries.refuse(f"{name}/{first}", "skipped", "no image or video in its sample, by the endings")
        return
    label = _tar_label(sample, tar, name, entries)
    for number, (member, kind) in enumerate(media):
        id = f"{name}/{member.name}"
        if number:
            entries.refuse(id, "skipped", f"its sample has {media[0][0].name} already")
        elif kind == "image" and member.size > LARGEST_IMAGE:
            entries.refuse(id, "skipped", f"an image of {member.size:,} bytes, the limit is {LARGEST_IMAGE:,}")
        elif id in entries.lines:
            entries.refuse(f"{id} (byte {member.offset})", "duplicate", "the tar holds a member of this name before it")
        else:
            entries.lines[id] = member.offset
            part = Bytes(offset=member.offset_data, size=member.size)
            entries.items.append(Item(id=id, path=file, kind=kind, label=label, part=part, split=entries.split))


def _kind(member: Member, tar: tarfile.TarFile) -> Kind | None:
    name = Path(member.name)
    if name.suffix.lower() != ".gif":
        return media_kind(name)
    if member.size > LARGEST_IMAGE:
        return "video"
    handle = tar.extractfile(member)
    return "video" if handle and is_animated(io.BytesIO(handle.read())) else "image"


def _tar_label(sample: dict[str, Member], tar: tarfile.TarFile, name: str, entries: Entries) -> str | None:
    for ending in LABELS:
        member = sample.get(ending)
        if member is None:
            continue
        if member.size > LARGEST_LABEL:
            entries.refuse(f"{name}/{member.name}", "skipped", f"a label of {member.size:,} bytes is not read")
            continue
        handle = tar.extractfile(member)
        text = handle.read().decode("utf-8", "replace").strip() if handle else ""
        label = _label_in_json(text) if ending == "json" else text
        if label and (ending != "txt" or ("\n" not in label and len(label) <= LONGEST_TEXT_LABEL)):
            entries.labels.add(label)
            return label
    return None


def _label_in_json(text: str) -> str | None:
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict):
        return str(record) if isinstance(record, str | int) and not isinstance(record, bool) else None
    found = (record.get(name) for name in JSON_LABELS)
    return next((str(value) for value in found if isinstance(value, str | int) and not isinstance(value, bool)), None)


def parquet(
    path: Path | RemotePath,
    _clips: Path | RemotePath,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Catalog:
    """Parquet files with the bytes of images or videos: Hugging Face's struct of bytes and path, or plain binary.

    Labels are numbers, with the names that the metadata gives them where it does, or words. Columns that aren't named
    are those of `MEDIA_COLUMNS` and `LABEL_COLUMNS`.

    Raises:
        ConfigError: no such column, or one that can't hold what it should.
    """
    entries = Entries("parquet")
    named: tuple[str, ...] = ()
    for name, file in container_files(path, ".parquet"):
        entries.split = split_in_name(name)
        try:
            opened = pq.ParquetFile(file if isinstance(file, Path) else file.open("rb"))
            media = _media_column(opened.schema_arrow, file, image_column)
            label = _label_column(opened.schema_arrow, file, label_column)
            names = _class_names(opened.schema_arrow, file, label)
            for item in _rows(opened, name, file, media, label, names):
                entries.items.append(item)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            entries.refuse(name, "corrupt", f"the parquet file can't be read ({reason})")
            continue
        if named and names and named != names:
            raise ConfigError("names other classes than the files before it", where=file, fix="tokenize it by itself")
        named = named or names
    entries.labels |= {item.label for item in entries.items if item.label is not None}
    return entries.catalog(named or class_order(entries.labels))


def _rows(
    opened: pq.ParquetFile,
    name: str,
    file: Path | RemotePath,
    column: str,
    labelled: str | None,
    names: tuple[str, ...],
) -> Iterator[Item]:
    schema = opened.schema_arrow
    split = "split" if "split" in schema.names and pa.types.is_string(schema.field("split").type) else None
    field = schema.field(column).type
    paths = f"{column}.path" if pa.types.is_struct(field) and field.get_field_index("path") >= 0 else None
    wanted = [each for each in (labelled, split, paths) if each]
    count = opened.metadata.num_rows
    size = (size_of(file) or 0) // max(1, count)
    usual = _usual_kind(opened, column)
    number = 0
    for batch in opened.iter_batches(columns=wanted) if wanted else [None] * count:
        rows = [{}] if batch is None else batch.to_pylist()
        for row in rows:
            inside = row.get(column)
            said = inside.get("path") if isinstance(inside, dict) else None
            label = _row_label(row.get(labelled or ""), names, file, number)
            yield Item(
                id=f"{name}/{number:08d}",
                path=file,
                kind=_kind_by_name(said) or usual,
                label=label,
                part=Row(number=number, column=column, size=size),
                split=(row.get(split or "") or None) or split_in_name(name),
            )
            number += 1


def _kind_by_name(name: str | None) -> Kind | None:
    path = Path(name or "")
    return None if path.suffix.lower() == ".gif" else media_kind(path)


def _usual_kind(opened: pq.ParquetFile, column: str) -> Kind:
    """What the rows of a column hold that don't say it: by its name, or by the first of them."""
    if column in (*MEDIA_COLUMNS, *VIDEO_COLUMNS):
        return "video" if column in VIDEO_COLUMNS else "image"
    for batch in opened.iter_batches(FEW_ROWS, columns=[column]):
        for value in batch.column(0).to_pylist():
            content = value.get("bytes") if isinstance(value, dict) else value
            if content:
                is_image = codec_of(io.BytesIO(content), "image") != "unknown"
                return "image" if is_image or codec_of(io.BytesIO(content), "video") == "unknown" else "video"
    return "image"


def _media_column(schema: pa.Schema, file: Path | RemotePath, asked: str | None) -> str:
    holds = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    if asked is not None:
        require_column(asked, schema.names, where=file, option="--image-column")
        if asked not in holds:
            what = f"column {asked!r} holds {schema.field(asked).type}, not the bytes of images or videos"
            fix = f"columns with bytes: {', '.join(holds)}" if holds else "embed the files in the parquet file"
            raise ConfigError(what, where=file, fix=fix)
        return asked
    known = [name for name in MEDIA_COLUMNS if name in holds]
    if not known and len(holds) != 1:
        found = ", ".join(schema.names)
        raise ConfigError(
            f"no column with images or videos (columns: {found})", where=file, fix="name it with --image-column"
        )
    return (known or holds)[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _usual_label(schema: pa.Schema) -> str | None:
    return next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _label_column(schema: pa.Schema, file: Path | RemotePath, asked: str | None) -> str | None:
    if asked is None:
        return _usual_label(schema)
    require_column(asked, schema.names, where=file, option="--label-column")
    kind = schema.field(asked).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(values) or pa.types.is_string(values) or pa.types.is_large_string(values)):
        what = f"column {asked!r} holds {kind}, and labels are words or whole numbers"
        raise ConfigError(what, where=file, fix="name another one with --label-column")
    return asked


def _class_names(schema: pa.Schema, file: Path | RemotePath, labelled: str | None) -> tuple[str, ...]:
    """The names of its classes in their order, from Hugging Face's metadata or a key `classes` with commas.

    That key doesn't say which column it is about: it is the usual one.
    """
    metadata = schema.metadata or {}
    if b"huggingface" in metadata:
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            found = features[labelled].get("names") if labelled in features else None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ConfigError("its Hugging Face metadata is damaged", where=file, fix="write the file again") from None
        if found:
            return tuple(str(name) for name in found)
    told = b"classes" in metadata and labelled == _usual_label(schema)
    return tuple(metadata[b"classes"].decode().split(",")) if told else ()


def _row_label(value: object, names: tuple[str, ...], file: Path | RemotePath, number: int) -> str | None:
    if value is None or isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, str) or not names:
        return None if isinstance(value, int) and value < 0 else str(value)
    if value >= len(names):
        raise ConfigError(f"row {number}: label {value}, but {len(names)} classes are named", where=file, fix="mend it")
    return names[value] if value >= 0 else None
