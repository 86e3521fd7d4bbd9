"""Checkpoints for inference: `config.json` beside `model.safetensors`, in a folder or on the hub.

`config.json` holds the architecture, the passport of the tokenizer (opaque here: the rooms that join tokens and
model compare it) and the form of the sequences the model was trained on.

The other form is a folder of a `LlamaForCausalLM`, whose `config.json` is transformers' own: what only toto knows lies
in `toto.json` beside it. Both forms are loaded by the same names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from toto.model import hub, llama
from toto.model.architectures import build, config_of, described
from toto.model.causal import CausalModel
from toto.model.config import BackboneConfig
from toto.model.tensors import read_tensors, tensors_sha256, write_tensors
from toto.model.transformer import Transformer
from toto.runtime.errors import CheckpointError, ConfigError, TotoError
from toto.runtime.files import read_json, write_json

CONFIG_FILE, CARD_FILE, GENERATION_FILE = "config.json", "toto.json", "generation_config.json"
FORMAT, CARD_FORMAT, VERSION = "toto-model", "toto-card", 1
CARD_FIELDS = {"passport", "sequence", "training"}
SHARD_BYTES = 5_000_000_000
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MISFITS_SHOWN = 12
Model = TypeVar("Model", bound=CausalModel)


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


def save_model(folder: Path, model: CausalModel, card: Card) -> None:
    """Write a model into a folder that exists; the caller makes the folder atomic."""
    save_weights(folder, _weights(model), model.config, card)


def save_weights(folder: Path, weights: dict[str, torch.Tensor], config: BackboneConfig, card: Card) -> None:
    """Write weights, a tied one once, and what they are of, as `save_model` does of a model."""
    known = {"format": FORMAT, "version": VERSION, "architecture": described(config), **dataclasses.asdict(card)}
    write_tensors(folder, weights)
    write_json(folder / CONFIG_FILE, known)


def save_llama(
    folder: Path,
    model: CausalModel,
    card: Card,
    *,
    dtype: torch.dtype = torch.float32,
    most_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a `LlamaForCausalLM` into a folder that exists; the caller makes the folder atomic.

    Generating by `generation_config.json` draws codes alone, never special ids, as toto does.

    Args:
        folder: where to.
        model: of token inputs.
        card: goes into `toto.json`, so that `load_model` and `load_card` take the folder as a checkpoint.
        dtype: of the stored weights; in bfloat16 they are rounded.
        most_bytes: of weights in a file; more are split.

    Raises:
        ConfigError: the model is no Llama (patches, a baseline), or its card doesn't tell how long sequences are.
    """
    if not isinstance(model, Transformer):
        raise ConfigError(f"a {model.config.kind} model is no Llama", where="--to hf", fix="export it with --to toto")
    missing = {"frames", "rows", "cols"} - card.sequence.keys()
    if missing:
        raise ConfigError(f"its card doesn't tell {', '.join(sorted(missing))}", where="--to hf", fix="train it anew")
    frames, rows, cols = (card.sequence[name] for name in ("frames", "rows", "cols"))
    config = llama.llama_config(model.config, context=frames * rows * cols + 2, dtype=dtype)
    write_tensors(folder, llama.llama_weights(model), dtype=dtype, most_bytes=most_bytes, metadata={"format": "pt"})
    ends = {name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    special = [llama.PAD, llama.VIDEO_START, llama.END, llama.IMAGE_START]
    write_json(folder / GENERATION_FILE, {"do_sample": False, **ends, "suppress_tokens": special})
    ids = dict(zip(("pad", "video_start", "end", "image_start"), special, strict=True)) | {"first_code": len(special)}
    known = {"format": CARD_FORMAT, "version": VERSION, **dataclasses.asdict(card), "ids": ids}
    write_json(folder / CARD_FILE, known)
    write_json(folder / CONFIG_FILE, config)


def load_model(name: str | Path, *, device: str | torch.device = "cpu") -> CausalModel:
    """Load a model from a checkpoint folder, a run's folder (its newest checkpoint), or a hub id ("user/name").

    The model comes in evaluation mode, in fp32. `load_card` gives what is known about it.

    Raises:
        CheckpointError: nothing there, or the weights don't fit the configuration; every misfit is listed.
    """
    folder = checkpoint_folder(name)
    if _is_llama(folder):
        load_card(folder)
        return load_llama(folder, device=device)
    model, weights = _empty_model(folder), read_tensors(folder)
    _require_fit(_weights(model), weights, where=folder)
    return _filled(model, weights, device)


def load_llama(name: str | Path, *, device: str | torch.device = "cpu") -> Transformer:
    """Load a `LlamaForCausalLM` from a folder or the hub, whether or not toto knows what its tokens mean.

    Raises:
        CheckpointError: nothing there, it has parts that our decoder has not got, or the weights don't fit.
    """
    folder = checkpoint_folder(name)
    config = llama.config_of_llama(_read_json(folder), where=folder / CONFIG_FILE)
    with torch.device("meta"):
        model = Transformer(config)
    weights = llama.without_buffers(read_tensors(folder), config)
    _require_fit(llama.llama_weights(model), weights, where=folder)
    return _filled(model, llama.weights_of_llama(weights, config), device)


def load_card(name: str | Path) -> Card:
    """What is known about a model beside its weights; see `load_model` for names."""
    folder = checkpoint_folder(name)
    config = _read_card(folder) if _is_llama(folder) else _read_config(folder)
    return Card(passport=config["passport"], sequence=config["sequence"], training=config["training"])


def weights_sha256(name: str | Path) -> str:
    """SHA-256 of a model's weight file; see `tensors_sha256` where there are several."""
    return tensors_sha256(checkpoint_folder(name))


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
    return hub.snapshot(str(name))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = checkpoints(run)
    return found[-1] if found else None


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, in their order: `run/checkpoints/step-NNNNNNNN`."""
    return sorted((run / "checkpoints").glob("step-*"))


def _weights(model: CausalModel) -> dict[str, torch.Tensor]:
    """The tensors that are stored: a tied output layer once, as the embedding."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["head.weight"]
    return state


def load_config(name: str | Path) -> BackboneConfig:
    """The architecture of a model; see `load_model` for names."""
    folder = checkpoint_folder(name)
    if _is_llama(folder):
        return llama.config_of_llama(_read_json(folder), where=folder / CONFIG_FILE)
    try:
        return config_of(_read_config(folder)["architecture"])
    except (TypeError, AttributeError, TotoError) as error:
        raise CheckpointError(
            f"bad architecture ({error})", where=folder / CONFIG_FILE, fix="use a whole checkpoint"
        ) from None


def _empty_model(folder: Path) -> CausalModel:
    with torch.device("meta"):
        return build(load_config(folder))


def _filled(model: Model, weights: dict[str, torch.Tensor], device: str | torch.device) -> Model:
    """An empty model with its weights, in fp32."""
    whole = {name: weight.float() for name, weight in weights.items()}
    model.load_state_dict(whole, assign=True, strict=not model.config.tie_embeddings)
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(device).eval()


def _require_fit(wanted: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], *, where: Path) -> None:
    """Refuse weights of other names, shapes or kinds, and numbers that are none; every misfit is listed."""
    expected = {key: tuple(weight.shape) for key, weight in wanted.items()}
    found = {key: tuple(weight.shape) for key, weight in weights.items()}
    misfits = [f"{key} is missing" for key in expected.keys() - found.keys()]
    misfits += [f"{key} is surplus" for key in found.keys() - expected.keys()]
    misfits += [
        f"{key} is {found[key]}, not {expected[key]}"
        for key in expected.keys() & found.keys()
        if found[key] != expected[key]
    ]
    kinds = {key: weight.dtype for key, weight in weights.items() if weight.dtype not in FLOATS}
    misfits += [f"{key} holds {kind}" for key, kind in kinds.items()]
    misfits += [
        f"{key} holds NaN or infinity"
        for key, weight in weights.items()
        if key not in kinds and not bool(weight.isfinite().all())
    ]
    if misfits:
        more = f" and {len(misfits) - MISFITS_SHOWN} more" if len(misfits) > MISFITS_SHOWN else ""
        raise CheckpointError(
            f"weights don't fit the configuration: {', '.join(sorted(misfits)[:MISFITS_SHOWN])}{more}",
            where=where,
            fix="use a whole checkpoint",
        )


def _is_llama(folder: Path) -> bool:
    """Whether the folder's configuration is transformers', not toto's."""
    plain = _read_json(folder)
    return isinstance(plain, dict) and "model_type" in plain


def _read_json(folder: Path) -> Any:
    return read_json(folder / CONFIG_FILE, what="model configuration")


def _read_card(folder: Path) -> dict[str, Any]:
    """What `toto.json` of a Llama folder says."""
    path = folder / CARD_FILE
    if not path.exists():
        raise CheckpointError(
            f"a model of transformers without {CARD_FILE}: nobody knows which tokenizer its tokens are of",
            where=folder,
            fix="name it by `toto export FOLDER --to toto --tokenizer ... --out CHECKPOINT`",
        )
    card = read_json(path, what="card")
    if not isinstance(card, dict) or (card.get("format"), card.get("version")) != (CARD_FORMAT, VERSION):
        raise CheckpointError(f"not a {CARD_FORMAT} of version {VERSION}", where=path, fix="check the path")
    _require_fields(card, CARD_FIELDS, path)
    return card


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder)
    if not isinstance(config, dict) or (config.get("format"), config.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"not a {FORMAT} of version {VERSION}", where=folder / CONFIG_FILE, fix="check the path")
    _require_fields(config, {"architecture", *CARD_FIELDS}, folder / CONFIG_FILE)
    return config


def _require_fields(plain: dict[str, Any], names: set[str], path: Path) -> None:
    if missing := names - plain.keys():
        raise CheckpointError(f"{', '.join(sorted(missing))} missing", where=path, fix="use a whole checkpoint")
    if odd := [name for name in sorted(CARD_FIELDS) if not isinstance(plain[name], dict)]:
        raise CheckpointError(f"{odd[0]} is no mapping", where=path, fix="use a whole checkpoint")
