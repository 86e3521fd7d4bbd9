"""Checkpoints for inference: `config.json` beside `model.safetensors`, in a folder or on the hub.

`config.json` holds the architecture, the passport of the tokenizer (opaque here: the rooms that join tokens and
model compare it) and the form of the sequences the model was trained on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.runtime.errors import CheckpointError, TotoError
from toto.runtime.files import read_json, sha256_of, write_json, written_aside

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, VERSION = "toto-model", 1


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about a model beside its weights.

    Attributes:
        passport: the passport of the tokens it was trained on.
        sequence: frames, stride, rows and cols of its training sequences.
        training: step, tokens seen and whatever else its maker recorded.
    """

    passport: dict[str, Any]
    sequence: dict[str, int]
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_model(folder: Path, model: Transformer, card: Card) -> None:
    """Write a model into a folder that exists; the caller makes the folder atomic."""
    config = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": dataclasses.asdict(model.config),
        **dataclasses.asdict(card),
    }
    weights = {name: weight.detach().cpu().contiguous() for name, weight in _weights(model).items()}
    with written_aside(folder / WEIGHTS_FILE) as aside:
        save_file(weights, aside)
    write_json(folder / CONFIG_FILE, config)


def load_model(name: str | Path, *, device: str | torch.device = "cpu") -> Transformer:
    """Load a model from a checkpoint folder, a run's folder (its newest checkpoint), or a hub id ("user/name").

    The model comes in evaluation mode, in fp32. `load_card` gives what is known about it.

    Raises:
        CheckpointError: nothing there, or the weights don't fit the configuration; every misfit is listed.
    """
    folder = checkpoint_folder(name)
    model, weights = _empty_model(folder), _read_weights(folder)
    expected = {key: tuple(weight.shape) for key, weight in _weights(model).items()}
    found = {key: tuple(weight.shape) for key, weight in weights.items()}
    misfits = [f"{key} is missing" for key in expected.keys() - found.keys()]
    misfits += [f"{key} is surplus" for key in found.keys() - expected.keys()]
    misfits += [
        f"{key} is {found[key]}, not {expected[key]}"
        for key in expected.keys() & found.keys()
        if found[key] != expected[key]
    ]
    misfits += [f"{key} holds NaN or infinity" for key, weight in weights.items() if not bool(weight.isfinite().all())]
    if misfits:
        raise CheckpointError(
            f"weights don't fit the configuration: {', '.join(sorted(misfits))}",
            where=folder,
            fix="use a whole checkpoint",
        )
    model.load_state_dict(weights, assign=True, strict=not model.config.tie_embeddings)
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(device).eval()


def load_card(name: str | Path) -> Card:
    """What is known about a model beside its weights; see `load_model` for names."""
    folder = checkpoint_folder(name)
    config = _read_config(folder)
    return Card(passport=config["passport"], sequence=config["sequence"], training=config["training"])


def weights_sha256(name: str | Path) -> str:
    """SHA-256 of a model's weight file."""
    return sha256_of(checkpoint_folder(name) / WEIGHTS_FILE)


def checkpoint_folder(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, a run's newest checkpoint, or a snapshot from the hub."""
    folder = Path(name)
    if (folder / CONFIG_FILE).exists():
        return folder
    if newest := newest_checkpoint(folder):
        return newest
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):
        what = "no checkpoint here" if folder.exists() else "no such checkpoint"
        raise CheckpointError(what, where=folder, fix="give a checkpoint or run folder, or a hub id (user/name)")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"no such folder, and the hub can't give it ({reason})",
            where=str(name),
            fix="check the name or the network",
        ) from None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run: `run/checkpoints/step-NNNNNNNN`."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def _weights(model: Transformer) -> dict[str, torch.Tensor]:
    """The tensors that are stored: a tied output layer once, as the embedding."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["head.weight"]
    return state


def _empty_model(folder: Path) -> Transformer:
    config = _read_config(folder)
    try:
        architecture = ModelConfig(**config["architecture"])
    except (TypeError, TotoError) as error:
        raise CheckpointError(
            f"bad architecture ({error})", where=folder / CONFIG_FILE, fix="use a whole checkpoint"
        ) from None
    with torch.device("meta"):
        return Transformer(architecture)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG_FILE, what="model configuration")
    if not isinstance(config, dict) or (config.get("format"), config.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"not a {FORMAT} of version {VERSION}", where=folder / CONFIG_FILE, fix="check the path")
    missing = {"architecture", "passport", "sequence", "training"} - config.keys()
    if missing:
        raise CheckpointError(
            f"{', '.join(sorted(missing))} missing", where=folder / CONFIG_FILE, fix="use a whole checkpoint"
        )
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights can't be read ({error})", where=path, fix="use a whole checkpoint") from None
