"""What `--checkpoint` may say, and the backbone that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.evaluation.backbones.huggingface import OverFrames, open_huggingface
from toto.evaluation.backbones.pixels import at_random, named_pixels
from toto.evaluation.features import Backbone, open_backbone
from toto.model.weights import checkpoint_folder, load_config
from toto.runtime.device import Precision, pick_device
from toto.runtime.errors import CheckpointError, ConfigError
from toto.tokens.tokenizer import EMBEDDED, Tokenizer, load_tokenizer

HUGGING_FACE: Final = "hf:"
RANDOM: Final = "random:"
PIXELS: Final = "pixels"


def load_backbone(
    name: str | Path,
    *,
    tokenizer: str | Path | Tokenizer = EMBEDDED,
    layers: Sequence[int] | None = None,
    frames: int | None = None,
    over_frames: OverFrames = "concatenate",
    keep_class: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> Backbone:
    """Open a backbone by name.

    Args:
        name: a toto checkpoint, run or hub id (Toto, GPT-2, Mamba, patches); `hf:FOLDER` or `hf:user/name`, a vision
            model of Hugging Face; `random:NAME`, the same with weights drawn at random; `pixels:SIZE/GRID`, raw pixels.
        tokenizer: a folder or "embedded", of a toto checkpoint that takes codes; read only then.
        layers: those wanted; None is all.
        frames: T of its clips, where the backbone leaves it open: models of images and pixels; None is 1.
        over_frames: of models of images, see `HuggingFaceBackbone`.
        keep_class: keep class and register tokens of Hugging Face models.
        seed: of `random:`.
        device: auto, cpu, cuda, ...
        precision: auto, bf16 or fp32.

    Raises:
        CheckpointError: nothing of that name, damaged, or its tokenizer is absent.
        PassportError: the tokenizer did not make the model's tokens.
        ConfigError: an option that the backbone has not got.
    """
    text, drawn = str(name).removeprefix(RANDOM), str(name).startswith(RANDOM)
    if text in ("", HUGGING_FACE):
        raise ConfigError("names no model", where=f"--checkpoint {name!s}", fix="add a folder or a name")
    backbone: Backbone
    if text.startswith(HUGGING_FACE):
        backbone = open_huggingface(
            text.removeprefix(HUGGING_FACE),
            frames=frames,
            over_frames=over_frames,
            keep_class=keep_class,
            device=device,
            precision=precision,
            seed=seed if drawn else None,
        )
    elif not drawn and (text == PIXELS or text.startswith(f"{PIXELS}:")):
        backbone = named_pixels(text, frames=frames, device=device)
    else:
        folder = checkpoint_folder(text)
        if keep_class or over_frames != "concatenate":
            raise ConfigError("is for Hugging Face models", where="--keep-class, --over-frames", fix="leave it out")
        opened = open_backbone(folder, _tokenizer(folder, tokenizer, device), device=device, precision=precision)
        opened.name = text
        if frames not in (None, opened.frames):
            what = f"was trained on clips of {opened.frames} frames, not {frames}"
            raise ConfigError(what, where=text, fix="leave --frames out")
        backbone = at_random(opened, seed=seed) if drawn else opened
    if layers is not None:
        backbone.select(layers)
    return backbone


def _tokenizer(folder: Path, tokenizer: str | Path | Tokenizer, device: str) -> Tokenizer | None:
    """The tokenizer, on the model's device, where that takes codes."""
    if load_config(folder).inputs != "tokens":
        return None
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    try:
        return load_tokenizer(tokenizer, device=pick_device(device))
    except CheckpointError as error:
        fix = "name the tokenizer that the model was trained with, --tokenizer FOLDER"
        raise CheckpointError(f"its tokenizer is absent: {error.what}", where=tokenizer, fix=fix) from None
