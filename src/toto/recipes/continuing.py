"""From coarse to fine: a trained model goes on at 32 x 32 codes a frame, by another base of its rotary positions.

Every recipe wants the model it begins with: `--init RUN`. Frames are four times as large, so four frames (or images)
make a sequence of the length that the model knows.
"""

from __future__ import annotations

from dataclasses import replace

from toto.model.config import ModelConfig
from toto.recipes import pretraining
from toto.runtime.errors import ConfigError
from toto.training.config import TrainConfig

FINE_BASE = 50_000.0  # Table 4: 64.4 against 63.2 with 10,000
FINE_RATE = 1e-4  # not published
FRAMES_IN_ONE = 4  # a frame of 32 x 32 codes has as many as four of 16 x 16


def _finer(coarse: TrainConfig, *, steps: int, peak_lr: float, warmup_steps: int) -> TrainConfig:
    """The same model at frames of twice the side, in sequences of the same length."""
    if not isinstance(coarse.model, ModelConfig) or coarse.data.frames % FRAMES_IN_ONE:
        raise ConfigError("has no finer form", where="recipe", fix="use a Toto model of a multiple of 4 frames")
    return replace(
        coarse,
        model=replace(coarse.model, rope_base=FINE_BASE),
        data=replace(coarse.data, frames=coarse.data.frames // FRAMES_IN_ONE),
        optimizer=replace(coarse.optimizer, peak_lr=peak_lr, warmup_steps=warmup_steps),
        steps=steps,
    )


def _of_the_paper(coarse: TrainConfig) -> TrainConfig:
    images = pretraining.SEQUENCES_OF_THE_PAPER * coarse.data.frames // FRAMES_IN_ONE
    steps = -(-pretraining.IMAGES_OF_IMAGENET * 50 // images)
    return _finer(coarse, steps=steps, peak_lr=FINE_RATE, warmup_steps=500)


def base_32() -> TrainConfig:
    """The base model at 32 x 32 codes of 256 px; see `large_32`.

    Command: toto train base-32 --init runs/base --out runs/base-32 --data image:imagenet-256
    """
    return _of_the_paper(pretraining.base())


def large_32() -> TrainConfig:
    """Table 4, coarse to fine: the large model goes on at 32 x 32 codes of 256 px with RoPE base 50,000.

    Command: toto tokenize imagenet/train --size 256 --out imagenet-256 --tokenizer DVAE
             toto train large-32 --init runs/table3-tokens --out runs/large-32 --data image:imagenet-256
    Cost: 62,557 steps of 256 sequences of 4 images, which is 50 epochs of ImageNet-1k: what the compute of Table 4 is
    decoded to. Its text says one epoch; steps, rate and batch are not published. `toto plan large-32 --grid 32 32`.
    Expected: linear probe of the best layer, top-1: 64.4; with `--model.rope-base 10000` 63.2, before it 53.2.
    """
    return _of_the_paper(pretraining.large())


def one_b_32() -> TrainConfig:
    """The 1b model at 32 x 32 codes of 256 px; see `large_32`.

    Command: toto train 1b-32 --init runs/1b --out runs/1b-32 --data image:imagenet-256
    """
    return _of_the_paper(pretraining.one_b())


def nano_32() -> TrainConfig:
    """Coarse to fine on a laptop: `nano` goes on at 32 x 32 codes; the embedded tokenizer makes these of 256 px.

    Command: toto tokenize MEDIA --size 128 --out S/128; toto tokenize MEDIA --size 256 --out S/256
             toto train nano --out runs/nano --data S/128
             toto train nano-32 --init runs/nano --out runs/nano-32 --data S/256
    Cost: 500 steps of 4 sequences of 4,098 ids, a tenth of what `nano` takes; ask `toto plan nano-32 --grid 32 32
    --codes 4096 --machine this`.
    Expected: a first loss far below that of a new model (8.3 nats).
    """
    return _finer(pretraining.nano(), steps=500, peak_lr=1e-3, warmup_steps=50)
