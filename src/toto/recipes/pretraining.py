"""Pre-training runs: the paper's three models, its comparison of inputs and targets, and small ones for laptops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toto.model.config import ModelConfig, size
from toto.tokens.sequence import Modality
from toto.training.config import DataConfig, TrainConfig
from toto.training.optimizer import OptimizerConfig
from toto.training.source import SourceConfig

SEQUENCES_OF_THE_PAPER = 256  # 1 M tokens in a batch (section 3.2) = 256 sequences x 4,096 visual tokens
STEPS_OF_THE_PAPER = 1_000_000  # the published loss curve ends at about 1.05 T tokens
IMAGES_OF_IMAGENET, EPOCHS_OF_TABLE_3 = 1_281_167, 400
# The paper's data: shares of a batch by dataset, with the modality each is read in.
MIXTURE_OF_THE_PAPER: dict[str, tuple[Modality, float]] = {
    "imagenet": ("image", 0.2),
    "ego4d": ("video", 0.1),
    "kinetics": ("video", 0.1),
    "howto100m": ("video", 0.6),
}


def sources_of_the_paper(shards: Path) -> tuple[SourceConfig, ...]:
    """The paper's mixture, from one folder that holds a store for each dataset under its name."""
    return tuple(
        SourceConfig(path=shards / name, weight=weight, modality=modality)
        for name, (modality, weight) in MIXTURE_OF_THE_PAPER.items()
    )


def demo() -> TrainConfig:
    """The model of `toto demo`: made to find copying, and then more than copying, in a few minutes on two cores.

    Command: toto demo --out runs/demo
    Cost: about five minutes on two cores, 1.4 GB of memory, 4.1 M tokens.
    Expected: about 4.4 bits per token on later frames of held-out scenes (copying 5.22, unigram 11.84).
    """
    return TrainConfig(
        data=DataConfig(frames=16, short_steps=500, short_frames=2),
        model=ModelConfig(width=128, layers=2, heads=2, mlp_hidden=384, rope_base=100.0, tie_embeddings=True),
        optimizer=OptimizerConfig(peak_lr=6e-3, warmup_steps=100, floor=0.02),
        steps=4000,
        batch=1,
        micro_batch=1,
        eval_every=250,
        save_every=500,
    )


def nano() -> TrainConfig:
    """A first model on your own shards, on a laptop; what it costs and reaches depends on them.

    Command: toto train nano --out runs/nano --data SHARDS --heldout OTHER_SHARDS
    """
    return TrainConfig(
        model=size("nano"),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=200),
        steps=5000,
        batch=4,
        micro_batch=4,
    )


def tiny() -> TrainConfig:
    """A larger one for a laptop, 9 M parameters; see `nano`."""
    return replace(nano(), model=size("tiny"))


def small() -> TrainConfig:
    """The largest one for a laptop, 34 M parameters; see `nano`, and ask `toto plan small --machine this`."""
    return replace(nano(), model=size("small"), micro_batch=1)


def _paper(name: str, *, micro_batch: int) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(frames=16),
        model=size(name),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        steps=STEPS_OF_THE_PAPER,
        batch=SEQUENCES_OF_THE_PAPER,
        micro_batch=micro_batch,
    )


def base() -> TrainConfig:
    """The paper's base model, 120m (Table 1, section 3.2): 16 frames of 256 tokens, 1 M tokens a step.

    Command: toto train base --out runs/base --data image:imagenet=0.2 ego4d=0.1 kinetics=0.1 howto100m=0.6
    Expected: final training loss about 3.58 nats after 1.05 T tokens (the authors' figure).
    """
    return _paper("base", micro_batch=8)


def large() -> TrainConfig:
    """The paper's large model, 280m; see `base`. Expected: about 3.47 nats."""
    return _paper("large", micro_batch=4)


def one_b() -> TrainConfig:
    """The paper's 1b model; see `base`. Expected: about 3.31 nats."""
    return _paper("1b", micro_batch=2)


def scaling(name: str) -> TrainConfig:
    """A model of the paper's scaling study, a1 to a6 (Table 15), reconstructed; see `toto.model.config.size`.

    Batch, steps and rates of those runs aren't published: these are the ones of its main runs. The study's tokenizer
    has 16,384 codes.

    Command: toto train a1 --out runs/a1 --data image:imagenet=0.2 ego4d=0.1 kinetics=0.1 howto100m=0.6
    Cost: `toto plan a1 --codes 16384`.
    """
    return _paper(name, micro_batch=4)


def _table3(**changes: Any) -> TrainConfig:
    """The large model on ImageNet-1k alone: 16 images in a sequence, 400 epochs in the paper's batches."""
    recipe = _paper("large", micro_batch=4)
    images = SEQUENCES_OF_THE_PAPER * recipe.data.frames
    steps = -(-IMAGES_OF_IMAGENET * EPOCHS_OF_TABLE_3 // images)
    return replace(recipe, model=replace(recipe.model, **changes), steps=steps)


def table3_tokens() -> TrainConfig:
    """Table 3, discrete tokens: codes in, the next code out. One recipe for every tokenizer of the table.

    Command: toto tokenize imagenet/train --out shards/imagenet --tokenizer TOKENIZER
             toto train table3-tokens --out runs/table3-tokens --data image:shards/imagenet
    Cost: 125,114 steps of 256 sequences; at 16 x 16 tokens 1.3e11 tokens.
    Expected: linear probe of layer 9, top-1: dVAE 53.2; VQGAN 61.1 (1k codes), 61.3 (16k); dVAE at 32 x 32, 61.2.
    """
    return _table3()


def table3_patch_patch() -> TrainConfig:
    """Table 3, patch-patch: patches in, the next patch's normalised pixels out.

    Command: toto tokenize imagenet/train --out shards/imagenet --tokenizer TOKENIZER --keep-pixels
             toto train table3-patch-patch --out runs/table3-patch-patch --data image:shards/imagenet
    Cost: as `table3_tokens`, and 63 GB of pixels at 128 px. A patch is the cell of a code: 8 px with an f8 tokenizer.
    The paper gives 16 x 16 patches without their size; its remark that dVAE makes four times as many tokens of a
    256 px image would mean 16 px, which are the cells of an f16 tokenizer at --size 256 (252 GB).
    Expected: linear probe of layer 9, top-1: 60.6.
    """
    return _table3(inputs="patches", targets="pixels")


def table3_patch_dvae() -> TrainConfig:
    """Table 3, patch-dVAE: patches in, the next code out; on dVAE's shards, which the table's name comes from.

    Command: toto tokenize imagenet/train --out shards/imagenet --tokenizer TOKENIZER --keep-pixels
             toto train table3-patch-dvae --out runs/table3-patch-dvae --data image:shards/imagenet
    Cost: as `table3_patch_patch`.
    Expected: linear probe of layer 9, top-1: 58.5.
    """
    return _table3(inputs="patches")
