"""What a fine-tuning run begins with: the model and its eyes, and the record that later calls must agree with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from toto.evaluation.finetune_config import FinetuneConfig
from toto.evaluation.finetune_data import Eyes
from toto.evaluation.labelled import LabelledClips
from toto.model.architectures import build
from toto.model.causal import CausalModel
from toto.model.config import ModelConfig
from toto.model.weights import Card, load_model, weights_sha256
from toto.runtime.errors import ConfigError, PassportError
from toto.runtime.files import read_json
from toto.runtime.provenance import RECORD, as_plain
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import Tokenizer

FREE_TO_CHANGE = ("device", "log_every", "micro_batch", "save_every", "timeout")


def read_backbone(checkpoint: str, config: FinetuneConfig) -> CausalModel:
    """The checkpoint's model, with another base of rotary positions or with full attention where that is asked."""
    model = load_model(checkpoint)
    if not isinstance(model.config, ModelConfig):
        asked = "--rope-base" if config.rope_base is not None else "--mode full" if config.mode == "full" else None
        if asked:
            raise ConfigError(f"a {model.config.kind} model hasn't got that", where=asked, fix="leave it out")
        return model
    if not model.config.causal and config.mode == "probes":
        raise ConfigError("has full attention, so it can't predict on", where=checkpoint, fix="use --mode full")
    changed = replace(
        model.config,
        rope_base=config.rope_base or model.config.rope_base,
        attention="full" if config.mode == "full" else "causal",
    )
    if changed == model.config:
        return model
    other = build(changed)
    other.load_state_dict(model.state_dict())
    return other


def open_eyes(
    backbone: CausalModel,
    tokenizer: Tokenizer | None,
    passport: Passport,
    before: Card,
    clips: LabelledClips,
    *,
    size: int,
    frames: int,
    stride: int,
) -> tuple[Eyes, Card]:
    """What turns pixels into sequences, and the card of a model that reads them."""
    if backbone.config.inputs == "patches":
        if passport.frame_size is None or passport.grid is None:
            raise ConfigError("names no frame size", where="passport", fix="train it with `toto train`")
        side = passport.frame_size[0] // passport.grid[0]
        if size % side:
            raise ConfigError(f"must be a multiple of {side}, is {size}", where="--frame-size")
        seen = replace(passport, frame_size=(size, size), grid=(size // side, size // side))
        tokenizer = None
    else:
        if tokenizer is None:
            raise PassportError("reads codes, and no tokenizer is given", where="--tokenizer", fix="give the model's")
        fix = "give the one the model was trained with"
        passport.require_tokenizer(tokenizer.passport, where="--tokenizer", fix=fix)
        seen = tokenizer.at(size, size)
    assert seen.grid is not None
    sequence = {"frames": frames, "rows": seen.grid[0], "cols": seen.grid[1], "stride": stride}
    return Eyes(tokenizer, seen.grid, clips.modality), replace(before, passport=seen.to_dict(), sequence=sequence)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecord:
    """What makes a run: its options, the checkpoint it began with, and its training items."""

    options: FinetuneConfig
    checkpoint: str
    checkpoint_sha256: str
    data: str
    items: int
    classes: tuple[str, ...]


def record_of(config: FinetuneConfig, checkpoint: str, clips: LabelledClips) -> FinetuneRecord:
    """What makes a run with these options."""
    return FinetuneRecord(
        options=config,
        checkpoint=checkpoint,
        checkpoint_sha256=weights_sha256(checkpoint),
        data=clips.name,
        items=len(clips.labels),
        classes=clips.classes,
    )


def require_same_run(config: FinetuneConfig, out: Path, checkpoint: str, clips: LabelledClips) -> None:
    """Refuse a folder that holds another run."""
    if not (out / RECORD).exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError("is not empty and holds no run", where=out, fix="choose another --out")
        return
    before = read_json(out / RECORD, what="record of the run")["config"]
    now = as_plain(record_of(config, checkpoint, clips))
    if "options" not in before:
        raise ConfigError("holds the output of another kind of job", where=out, fix="choose another --out")
    for plain in (before, now):
        plain.pop("checkpoint", None)
        for name in FREE_TO_CHANGE:
            plain["options"].pop(name, None)
    different = [name for name in now if name != "options" and before.get(name) != now[name]]
    different += [name for name in now["options"] if before["options"].get(name) != now["options"][name]]
    if different:
        raise ConfigError(
            f"holds a run with other {', '.join(different)}", where=out, fix="use the same, or another --out"
        )
