"""Fine-tuning for recognition: the paper's runs on ImageNet and Kinetics, what it compares, and the same for laptops.

What the paper doesn't publish (batch, decay, augmentation, heads) is chosen here and named in each heading.
"""

from __future__ import annotations

from dataclasses import replace

from toto.evaluation.classifier import HeadConfig
from toto.evaluation.finetune_config import Augmentation, FinetuneConfig
from toto.evaluation.views import ViewConfig
from toto.training.optimizer import OptimizerConfig

ATTENTION = HeadConfig(pool="attention", heads=16)
ONE_VIEW, THIRTY_VIEWS = ViewConfig(clips=1, crops=1), ViewConfig(clips=10, crops=3)


def imagenet() -> FinetuneConfig:
    """ImageNet-1k (section 4.1): next-token loss goes on at 32 x 32 codes, and a probe on each layer learns beside it.

    Command: toto finetune imagenet --checkpoint RUN --tokenizer DVAE --data imagenet/train --test imagenet/val
             --out OUT
    Cost: 110,340 steps of 1,024 images of 1,024 codes, 1.2e11 tokens.
    Expected: top-1 of the best layer 64.7 (base), 71.1 (large), 75.3 (1b).
    Not published: batch, weight decay, warm-up, augmentation, the losses' weights, the heads' rate and number of heads
    (base has 12).
    """
    return FinetuneConfig(
        mode="probes",
        head=ATTENTION,
        frame_size=256,
        rope_base=50_000.0,
        epochs=90,
        batch=1024,
        micro_batch=32,
        optimizer=OptimizerConfig(peak_lr=6e-5, warmup_steps=5_000, weight_decay=0.05),
        layer_decay=0.9,
        validation=0.02,
        views=ONE_VIEW,
    )


def imagenet_full() -> FinetuneConfig:
    """ImageNet-1k, full fine-tuning with bidirectional attention (Table 13).

    Command: toto finetune imagenet-full --checkpoint RUN --tokenizer DVAE --data imagenet/train --test imagenet/val
             --out OUT
    Cost: 122,600 steps of 1,024 images of 1,024 codes.
    Expected: top-1 82.6, probably of the base model.
    Not published: the whole schedule. Here it is MAE's for ViT-B (arXiv 2111.06377, Table 9): 100 epochs, rate 2e-3 at
    a batch of 1,024, layer decay 0.65, decay 0.05, label smoothing 0.1; without its mixup, cutmix and drop path.
    """
    return replace(
        imagenet(),
        mode="full",
        head=HeadConfig(pool="average"),
        epochs=100,
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=6_130, floor=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
        layer_decay=0.65,
        label_smoothing=0.1,
    )


def kinetics() -> FinetuneConfig:
    """Kinetics-400 (section 4.2, Table 8): 16 frames at stride 4, 128 pixels, fine-tuned with the probes.

    Command: toto finetune kinetics --checkpoint RUN --tokenizer DVAE --data k400/train.csv --test k400/val.csv
             --clips k400/videos --out OUT
    Cost: about 82,800 steps of 256 clips of 4,096 codes, 8.7e10 tokens; testing 30 views of 19,796 videos.
    Expected: top-1 of the best layer 59.3 (base), 65.3 (large), 74.4 (1b), by 10 x 3 views.
    Not published: epochs, rate and batch ("the same recipe"); the number of views. 1 x 1 is --views.clips 1
    --views.crops 1.
    """
    return replace(
        imagenet(),
        frame_size=128,
        rope_base=None,
        frames=16,
        stride=4,
        batch=256,
        micro_batch=8,
        augmentation=Augmentation(area=(0.5, 1.0)),
        views=THIRTY_VIEWS,
    )


def kinetics_mlp() -> FinetuneConfig:
    """Kinetics-400 with cross-attention and an MLP as head (Table 16); see `kinetics`.

    Expected: top-1 61.2 (base), 65.8 (large), 74.8 (1b).
    """
    return replace(kinetics(), head=replace(ATTENTION, classifier="mlp"))


def frozen_average() -> FinetuneConfig:
    """The frozen backbone, average pooling and a linear layer: the read-out of Tables 3, 4, 5 and 6.

    Command: toto finetune frozen-average --checkpoint RUN --tokenizer T --data imagenet/train --test imagenet/val
             --out OUT
    Expected, of the large model trained for 400 epochs on ImageNet-1k: 53.2 (dVAE, 16 x 16; Tables 3, 5 and 6),
    61.2 (dVAE, 32 x 32), 61.3 and 61.1 (VQGAN with 16k and 1k codes), 60.6 and 58.5 (patches to patches, to codes),
    48.5 (GPT-2), 40.7 (Mamba); from 16 x 16 to 32 x 32: 63.2 (RoPE base 10,000), 64.4 (50,000).
    """
    return replace(
        imagenet(),
        head=HeadConfig(pool="average"),
        frame_size=None,
        rope_base=None,
        next_token_weight=0.0,
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=1_000, weight_decay=0.0),
    )


def frozen_attention() -> FinetuneConfig:
    """The frozen backbone, attention pooling and a linear layer (Table 5); see `frozen_average`.

    Expected: top-1 61.1.
    """
    return replace(frozen_average(), head=ATTENTION)


def images_small() -> FinetuneConfig:
    """`imagenet` in small, for images of 32 pixels and the like, on a laptop: 10 epochs at 64 pixels.

    Command: toto finetune images-small --checkpoint RUN --data cifar10-train.parquet --test cifar10-test.parquet
             --out OUT
    """
    return FinetuneConfig(
        mode="probes",
        frame_size=64,
        epochs=10,
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=100, weight_decay=0.05),
        head_rate=5.0,
        augmentation=Augmentation(area=(0.35, 1.0)),
        stored_views=5,
        validate_every=5,
    )


def images_small_full() -> FinetuneConfig:
    """`imagenet_full` in small; see `images_small`."""
    return replace(images_small(), mode="full", head_rate=1.0, head=HeadConfig(pool="average"), label_smoothing=0.1)


def images_small_frozen() -> FinetuneConfig:
    """`frozen_attention` in small; see `images_small`."""
    return replace(images_small(), next_token_weight=0.0)


def clips_small() -> FinetuneConfig:
    """`kinetics` in small, for folders of short clips; views 3 x 3 at stride 4.

    Command: toto finetune clips-small --checkpoint RUN --data FOLDER_OF_CLASSES --out OUT
    """
    return FinetuneConfig(
        mode="probes",
        epochs=20,
        batch=8,
        micro_batch=8,
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=20, weight_decay=0.05),
        head_rate=5.0,
        augmentation=Augmentation(area=(0.5, 1.0)),
        stored_views=5,
        views=ViewConfig(clips=3, crops=3),
        validation=0.2,
        validate_every=5,
    )
