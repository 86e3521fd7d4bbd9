"""Everything that decides a fine-tuning run, in one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from toto.evaluation.classifier import HeadConfig
from toto.evaluation.views import ViewConfig
from toto.runtime.device import Precision
from toto.runtime.errors import ConfigError
from toto.training.optimizer import OptimizerConfig

Mode = Literal["probes", "full"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How a training view is drawn; the same for all frames of a clip. A video's first frame is drawn, too.

    Attributes:
        area: smallest and largest share of the frame's area that is cut out and resized; None resizes the shortest side
            and cuts a square anywhere, as in pre-training.
        aspect: smallest and largest width / height of what is cut out.
        flip: how often a view is mirrored.
    """

    area: tuple[float, float] | None = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.area is not None and not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"must rise within 0 .. 1, is {self.area}", where="--augmentation.area")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ConfigError(f"must rise from above 0, is {self.aspect}", where="--augmentation.aspect")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"must lie in 0 .. 1, is {self.flip}", where="--augmentation.flip")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run.

    Attributes:
        mode: "probes": the backbone goes on with next-token loss, while a head on each layer learns to classify
            features that are cut off from it (section 4.1 of the paper). "full": attention becomes bidirectional, and
            one head's gradients train everything (Table 13).
        head: the form of the heads.
        layers: that get one; None takes all, in mode "full" the last.
        frame_size: of the crops in pixels; None keeps that of pre-training. 256 gives 32 x 32 codes of 8 pixels.
        frames: T of a clip; None keeps it. An image is one frame.
        stride: of a clip's frames; None keeps it.
        rope_base: None keeps it (the paper: 50,000 at 32 x 32 codes).
        epochs: passes over the training items.
        batch: items in a step.
        micro_batch: items in one forward pass of a process. Heads are normalised over those of all processes, so a job
            of N processes equals one process with N times as many.
        optimizer: AdamW; its peak rate is that of the last block, its steps of warm-up are steps.
        head_rate: the heads' rate as a multiple of the last block's.
        layer_decay: block l of L has the rate x decay^(L - l), embeddings x decay^L.
        next_token_weight: of the next-token loss in mode "probes"; with 0 the backbone stays as it is.
        label_smoothing: share of the target that all classes have in common.
        augmentation: of training views.
        stored_views: of each item so many augmented views are made once, and taken in turn, an epoch each; 0 makes a
            new one in every epoch. Codes cost 2 bytes each.
        views: what is tested.
        validation: share of each class's training items that chooses the layer.
        validate_every: epochs between looks at it; the last epoch has one.
        seed: of order, views and heads.
        precision: auto, bf16 or fp32.
        device: auto, cpu, cuda, ...
        log_every: steps between rows of metrics.jsonl.
        save_every: steps between checkpoints.
        timeout: seconds after which one of several processes gives up that hears nothing of another one.
    """

    mode: Mode = "probes"
    head: HeadConfig = field(default_factory=HeadConfig)
    layers: tuple[int, ...] | None = None
    frame_size: int | None = None
    frames: int | None = None
    stride: int | None = None
    rope_base: float | None = None
    epochs: int = 90
    batch: int = 64
    micro_batch: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(peak_lr=6e-5, weight_decay=0.05))
    head_rate: float = 1.0
    layer_decay: float = 0.9
    next_token_weight: float = 1.0
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    stored_views: int = 0
    views: ViewConfig = field(default_factory=lambda: ViewConfig(clips=1, crops=1))
    validation: float = 0.05
    validate_every: int = 10
    seed: int = 0
    precision: Precision = "auto"
    device: str = "auto"
    log_every: int = 10
    save_every: int = 500
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "micro_batch", "validate_every", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"--{name.replace('_', '-')}")
        for name in ("frame_size", "frames", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, is {value}", where=f"--{name.replace('_', '-')}")
        if self.batch % self.micro_batch:
            raise ConfigError(f"{self.batch} is no multiple of {self.micro_batch}", where="--micro-batch")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"must lie in 0 .. 1, is {self.layer_decay}", where="--layer-decay")
        if not self.timeout > 0:
            raise ConfigError(f"must be positive, is {self.timeout}", where="--timeout")
        if self.stored_views < 0:
            raise ConfigError(f"must not be negative, is {self.stored_views}", where="--stored-views")
        if not 0 < self.head_rate < math.inf:
            raise ConfigError(f"must be positive, is {self.head_rate}", where="--head-rate")
        if not 0 <= self.next_token_weight < math.inf:
            raise ConfigError(f"must not be negative, is {self.next_token_weight}", where="--next-token-weight")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"must lie in 0 .. 1, is {self.label_smoothing}", where="--label-smoothing")
        if self.rope_base is not None and not 1 < self.rope_base < math.inf:
            raise ConfigError(f"must be above 1, is {self.rope_base}", where="--rope-base")
        if not 0 < self.validation < 1:
            raise ConfigError(f"must lie between 0 and 1, is {self.validation}", where="--validation")
        if self.layers is not None and not self.layers:
            raise ConfigError("name at least one", where="--layers", fix="leave it out for all")
        if self.mode == "full" and self.layers is not None and len(self.layers) > 1:
            raise ConfigError("full fine-tuning has one head", where="--layers", fix="name one layer")
