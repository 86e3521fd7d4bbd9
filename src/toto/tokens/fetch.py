"""Foreign files brought here, from a path, the web or the hub, and held against a checksum where one is given."""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP client's own
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    XetDownloadError,
)

from toto.runtime.errors import CheckpointError, ConfigError
from toto.runtime.files import sha256_of, written_aside
from toto.runtime.progress import Progress

CHECKSUM: Final = "#sha256="
HUB: Final = "hf://"
KINDS: Final = "a path, an http(s) address, or hf://user/name/file, each with #sha256=HEX behind it if you like"
TIMEOUT_SECONDS: Final = 30.0  # without a single byte
READ_AT_ONCE: Final = 2**20
SHOWN: Final = 12  # characters of a checksum in a message


def local_copy(where: str, folder: Path) -> Path:
    """The local path of a file that may lie elsewhere.

    Args:
        where: a path, an http(s) address, or `hf://user/name/path/in/repo`. With `#sha256=` and 64 hex digits behind it
            the file has to have this checksum.
        folder: where downloads from the web go, under a name of the address and its file. One that is there is
            used again only where a checksum vouches for it. Files of the hub stay in the hub's own cache.

    Returns:
        The path itself for a path, else the download's.

    Raises:
        ConfigError: this is no address of a file, or the checksum is malformed.
        CheckpointError: there is no such file, it can't be had, or it has another checksum. A download with another
            checksum isn't kept.
    """
    place, checksum = _split(where)
    if place.startswith(HUB):
        path = _from_hub(place)
    elif re.match(r"https?://", place, re.IGNORECASE):
        return _from_web(place, checksum, folder)
    elif found := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place):
        raise ConfigError(f"files can't be had by {found[0]}", where=place, fix=f"give {KINDS}")
    else:
        path = _from_disk(place)
    if checksum:
        _require(sha256_of(path), checksum, where=place)
    return path


def _split(where: str) -> tuple[str, str | None]:
    """The place, and the checksum in small letters."""
    place, mark, checksum = where.rpartition(CHECKSUM)
    if not mark:
        place = where
    elif not re.fullmatch(r"[0-9a-fA-F]{64}", checksum):
        raise ConfigError("the checksum is not 64 hex digits", where=where, fix="give #sha256=HEX as sha256sum says it")
    if "://" in place and "#" in place:
        raise ConfigError("only #sha256=HEX may follow an address", where=where, fix="write # inside of a name as %23")
    return place, checksum.lower() if mark else None


def _require(found: str, wanted: str, *, where: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"the SHA-256 is {found[:SHOWN]}..., not {wanted[:SHOWN]}...", where=where, fix="get the right file"
        )


def _from_disk(place: str) -> Path:
    path = Path(place)
    try:
        if path.is_file():
            return path
        what = "is a folder, not a file" if path.is_dir() else "no such file"
    except OSError as error:
        what = f"no such file ({_reason(error)})"
    raise CheckpointError(what, where=place, fix=f"give {KINDS}")


def _from_hub(place: str) -> Path:
    parts = place.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ConfigError("is no file on the hub", where=place, fix="write hf://user/name/path/in/repo")
    user, name, file = parts
    try:
        return Path(hf_hub_download(f"{user}/{name}", file))
    except (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        XetDownloadError,
        HTTPError,
        OSError,
    ) as error:
        raise _unavailable(place, f"the hub can't give it: {_reason(error)}") from None


def _from_web(url: str, checksum: str | None, folder: Path) -> Path:
    """Download into the folder, keeping only what is whole and has the checksum."""
    try:
        target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{_file_name(url)}"
        if checksum and target.is_file() and sha256_of(target) == checksum:
            return target
        with written_aside(target) as aside:
            _download(url, aside)
            if checksum:
                _require(sha256_of(aside), checksum, where=url)
        return target
    except urllib.error.HTTPError as error:
        raise _unavailable(url, f"the server says {error.code} {http.client.responses.get(error.code, '')}") from None
    except urllib.error.URLError as error:
        raise _unavailable(url, f"can't be downloaded: {_reason(error.reason)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unavailable(url, f"can't be downloaded: {_reason(error)}") from None


def _file_name(url: str) -> str:
    """The last part of an address as a file may be called."""
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-100:].lstrip(".") or "download"


def _download(url: str, aside: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, aside.open("wb") as file:
        told = response.headers.get("Content-Length")
        total = int(told) if told else None
        with Progress(f"downloading {_file_name(url)}", total=total, unit="bytes") as progress:
            while chunk := response.read(READ_AT_ONCE):
                file.write(chunk)
                progress.advance(len(chunk))
    if total is not None and progress.done != total:
        raise _unavailable(url, f"the download broke off after {progress.done} of {total} bytes")


def _unavailable(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=where, fix="check the address or the network, or download it yourself and give the file"
    )


def _reason(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
