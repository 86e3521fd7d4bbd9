"""Table 6: Toto beside GPT-2 and Mamba, at matched parameters, data and steps; and the same in small, for laptops.

Table 6 says 280M and 290M, and no shapes. Chosen are those that come nearest at the width of Toto's large model.
"""

from __future__ import annotations

from dataclasses import replace

from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.config import ModelConfig
from toto.recipes.pretraining import demo, table3_tokens
from toto.training.config import DataConfig, TrainConfig
from toto.training.optimizer import OptimizerConfig


def table6_toto() -> TrainConfig:
    """Table 6, Toto: the large model on ImageNet-1k alone, the same run as `table3_tokens`. 285.3 M parameters.

    Command: toto tokenize imagenet/train --out shards/imagenet --tokenizer DVAE
             toto train table6-toto --out runs/table6-toto --data image:shards/imagenet
    Cost: 125,114 steps of 256 sequences, 1.3e11 tokens.
    Expected: linear probe of the best layer, top-1: 53.2.
    """
    return table3_tokens()


def table6_gpt2() -> TrainConfig:
    """Table 6, GPT-2 with absolute sin-cos positions, not learnt; see `table6_toto`. 285.5 M parameters.

    Command: toto train table6-gpt2 --out runs/table6-gpt2 --data image:shards/imagenet
    Expected: linear probe of the best layer, top-1: 48.5.
    """
    return replace(table3_tokens(), model=GPT2Config(width=1024, layers=22, heads=16, mlp_hidden=4096))


def table6_mamba() -> TrainConfig:
    """Table 6, Mamba; see `table6_toto`. 288.4 M parameters.

    Command: toto train table6-mamba --out runs/table6-mamba --data image:shards/imagenet --model.scan transformers
    Cost: that scan is a fast kernel on GPUs with `mamba_ssm`; without it, leave the option out.
    Expected: linear probe of the best layer, top-1: 40.7.
    """
    return replace(table3_tokens(), model=MambaConfig(width=1024, layers=42))


def table6_nano_toto() -> TrainConfig:
    """Table 6 in small, Toto: two layers on the shards of `toto demo`. 1.001 M parameters at 4,100 ids.

    Command: toto train table6-nano-toto --out runs/toto --data S/scenes-train=0.9 image:S/photographs-train=0.1
             --heldout S/scenes-heldout       (S: runs/demo/shards)
    """
    model = ModelConfig(width=128, layers=2, heads=2, mlp_hidden=448, rope_base=100.0, tie_embeddings=True)
    return replace(demo(), model=model)


def table6_nano_gpt2() -> TrainConfig:
    """Table 6 in small, GPT-2; see `table6_nano_toto`."""
    return replace(demo(), model=GPT2Config(width=128, layers=2, heads=2, mlp_hidden=672))


def table6_nano_mamba() -> TrainConfig:
    """Table 6 in small, Mamba; see `table6_nano_toto`."""
    return replace(demo(), model=MambaConfig(width=128, layers=4))


def table6_images_toto() -> TrainConfig:
    """Table 6 in small on images, Toto: an epoch of CIFAR-10's 50,000 at 8 x 8 codes. 1.329 M parameters at 4,100 ids.

    Each architecture has a peak rate of its own, chosen in runs of 150 and 300 steps (docs/log.md).

    Command: toto tokenize cifar10-train.parquet --size 64 --out shards/cifar10
             toto train table6-images-toto --out runs/toto --data image:shards/cifar10
    Cost: six minutes on one core, 3.2 M tokens.
    """
    model = ModelConfig(width=128, layers=4, heads=4, mlp_hidden=352, tie_embeddings=True)
    return TrainConfig(
        data=DataConfig(frames=4),
        model=model,
        optimizer=OptimizerConfig(peak_lr=6e-3, warmup_steps=100, floor=0.1),
        steps=1562,
        batch=8,
        micro_batch=8,
        save_every=500,
    )


def table6_images_gpt2() -> TrainConfig:
    """Table 6 in small on images, GPT-2; see `table6_images_toto`. 1.318 M parameters."""
    toto = table6_images_toto()
    model = GPT2Config(width=128, layers=4, heads=4, mlp_hidden=512)
    return replace(toto, model=model, optimizer=replace(toto.optimizer, peak_lr=3e-3))


def table6_images_mamba() -> TrainConfig:
    """Table 6 in small on images, Mamba; see `table6_images_toto`. 1.341 M parameters. Half an hour on one core."""
    toto = table6_images_toto()
    return replace(toto, model=MambaConfig(width=128, layers=7))
