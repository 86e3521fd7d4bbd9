"""Weight files of a folder: one `model.safetensors`, or several with an index that says which tensor lies where."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toto.runtime.errors import CheckpointError, ConfigError
from toto.runtime.files import read_json, sha256_of, write_json, written_aside

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
FIX: Final = "use a whole checkpoint"


def write_tensors(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    most_bytes: int | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors in their order, in one file or, where they are more, in files of at most so many bytes.

    Args:
        folder: exists.
        weights: by name.
        dtype: to store them in; None keeps each one's own.
        most_bytes: of tensors in a file, a single larger one excepted; None writes one file.
        metadata: of each file's header.
    """
    if most_bytes is not None and most_bytes < 1:
        raise ConfigError(f"must be at least 1 byte, is {most_bytes}", where="size of a weight file")
    sizes = {name: weight.numel() * (dtype or weight.dtype).itemsize for name, weight in weights.items()}
    parts: list[list[str]] = [[]]
    for name in weights:
        if most_bytes is not None and parts[-1] and sum(sizes[each] for each in parts[-1]) + sizes[name] > most_bytes:
            parts.append([])
        parts[-1].append(name)
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [WEIGHTS_FILE]
    for file, names in zip(files, parts, strict=True):
        copies = {name: weights[name].detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        with written_aside(folder / file) as aside:
            aside.touch()
            mode = aside.stat().st_mode  # as the umask wants it; safetensors lets nobody else read
            save_file(copies, aside, metadata=metadata)
            aside.chmod(mode)
    if len(parts) > 1:
        places = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as they are stored.

    Raises:
        CheckpointError: no weights, or files that are missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for path, names in _files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                held = list(file.keys())
                if missing := sorted(names - set(held)):
                    raise CheckpointError(f"{', '.join(missing[:3])} should lie here", where=path, fix=FIX)
                weights |= {name: file.get_tensor(name) for name in held}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"weights can't be read ({error})", where=path, fix=FIX) from None
    return weights


def tensors_sha256(folder: Path) -> str:
    """SHA-256 of the weight file; of several, that of what `sha256sum` prints for them in order of their names."""
    files = sorted(_files(folder))
    if len(files) == 1:
        return sha256_of(files[0])
    lines = "".join(f"{sha256_of(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _files(folder: Path) -> dict[Path, set[str]]:
    """The weight files, and the tensors that an index wants in each."""
    if (folder / WEIGHTS_FILE).exists() or not (folder / INDEX_FILE).exists():
        return {folder / WEIGHTS_FILE: set()}
    places: Any = read_json(folder / INDEX_FILE, what="index of weights")
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places or not all(_is_file_name(file) for file in places.values()):
        raise CheckpointError("names no weight files", where=folder / INDEX_FILE, fix=FIX)
    files: dict[Path, set[str]] = {}
    for name, file in places.items():
        files.setdefault(folder / file, set()).add(name)
    return files


def _is_file_name(file: object) -> bool:
    """Whether it is a file of the folder itself; an index from elsewhere might name any path."""
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
