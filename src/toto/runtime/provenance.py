"""What made an output folder: command, versions, time and the resolved configuration."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from toto.runtime.errors import ConfigError
from toto.runtime.files import read_json, write_json
from toto.runtime.remote import RemotePath
from toto.runtime.version import __version__

RECORD = "made.json"
ANOTHER = "choose another --out"


def versions() -> dict[str, str]:
    """Versions of what computes: toto (with its commit in a checkout), Python, torch, numpy, PyAV."""
    found = {name: metadata.version(name) for name in ("torch", "numpy", "av")}
    commit = _commit()
    return {
        "toto": __version__ + (f" ({commit})" if commit else ""),
        "python": platform.python_version(),
        **found,
    }


def write_provenance(folder: Path, config: Any) -> None:
    """Write `made.json` into an output folder; `config` is the resolved (dataclass) configuration.

    Raises:
        ConfigError: the folder holds the output of another kind of job.
    """
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    if (folder / RECORD).exists():
        before = read_json(folder / RECORD, what="record of what made this folder").get("kind")
        if before != kind:
            raise ConfigError(f"holds the output of another kind of job ({before})", where=folder, fix=ANOTHER)
    write_json(
        folder / RECORD,
        {
            "kind": kind,
            "command": ["toto", *sys.argv[1:]],
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": {"system": platform.system(), "architecture": platform.machine()},
            "config": as_plain(config),
        },
    )


def as_plain(value: Any) -> Any:
    """Turn dataclasses, paths and tuples into what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path | RemotePath) else value


def _commit() -> str | None:
    """The commit of the checkout this package is imported from, or None for an installed wheel."""
    package = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in package.parents):
        return None
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
