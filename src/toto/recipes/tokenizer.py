"""Recipes of tokenizers."""

from __future__ import annotations

from dataclasses import replace

from toto.tokens.dvae import DVAEConfig
from toto.tokens.fsq import FSQConfig
from toto.tokens.vqgan import VQGANConfig
from toto.tokens.vqvae import StackConfig, VQVAEConfig
from toto.training.adversary import Adversarial
from toto.training.codebook import UnitCodebook
from toto.training.gumbel import Gumbel
from toto.training.learner import Reconstruction
from toto.training.tokenizer import TokenizerTrainConfig
from toto.training.tokenizer_data import CropConfig, Source


def embedded() -> TokenizerTrainConfig:
    """The tokenizer that ships with toto, from the embedded sample alone.

    Command: toto tokenizer train embedded --out runs/tokenizer
    Cost: about 35 minutes on two busy cores, 1.5 GB of memory; a tokenizer of 9.0 MB.
    Expect: 25.5 dB on the held-out scenes and 23.1 dB on the held-out photographs at 128 px. On the way, on the
        scenes: 24.9 dB after 1,000 steps, 25.2 dB after 3,000, where the rate still stands at its height.
    """
    return TokenizerTrainConfig(
        name="embedded",
        kind="vqvae",
        model=VQVAEConfig(
            vocab_size=4096,
            code_width=12,
            encoder=StackConfig(widths=(96, 192), hidden=(96, 192), blocks=(2, 2)),
            decoder=StackConfig(widths=(128, 256), hidden=(128, 128), blocks=(2, 3)),
        ),
        method=UnitCodebook(begin_step=100, decay=0.99, commitment=0.06, cooldown_commitment=0.2, dead_below=0.05),
        crops=CropConfig(size=64, zoom=0.3, native=0.4, colour_share=0.4, colour_mix=0.15, colour_shift=0.1),
        cooldown_crops=CropConfig(size=64, zoom=0.4, native=0.6, colour_share=0.1, colour_mix=0.1, colour_shift=0.05),
        sources=(
            Source(name="scenes", where="sample:scenes/train", stride=2, share=0.72),
            Source(name="photographs", where="sample:photographs/train", stride=1, share=0.28),
        ),
        heldout=(
            Source(name="scenes", where="sample:scenes/heldout", stride=24, share=0.0),
            Source(name="photographs", where="sample:photographs/heldout", stride=1, share=0.0),
        ),
        heldout_size=128,
        seed=0,
        steps=5400,
        batch=16,
        parts=2,
        learning_rate=2e-3,
        warmup_steps=100,
        cooldown_steps=2150,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        clip=0.25,
        average_decay=0.995,
        precision="auto",
        report_every=50,
        evaluate_every=1000,
        save_every=250,
        collapse_below=0.3,
    )


def fsq() -> TokenizerTrainConfig:
    """An alternative to the embedded tokenizer without a codebook: 4,375 codes by finite scalar quantisation.

    Command: toto tokenizer train fsq --out runs/fsq
    Cost: that of `embedded`, about 35 minutes on two cores; not run to its end yet.
    """
    recipe = embedded()
    return replace(
        recipe,
        name="fsq",
        kind="fsq",
        model=FSQConfig(levels=(7, 5, 5, 5, 5), encoder=recipe.model.encoder, decoder=recipe.model.decoder),
        method=Reconstruction(),
    )


def dvae_small() -> TokenizerTrainConfig:
    """DALL-E's dVAE on a laptop: a quarter of its widths, 1,024 codes, the embedded sample.

    Command: toto tokenizer train dvae-small --out runs/dvae-small
    Cost: about 20 minutes of one thread, 1.6 GB of memory.
    Expect: 20.6 dB and SSIM 0.56 on the held-out scenes at 128 px, with 125 of the codes.
    """
    return replace(
        embedded(),
        name="dvae-small",
        kind="dvae",
        model=DVAEConfig(vocab_size=1024, n_hid=64, n_init=64, blocks=1),
        method=Gumbel(
            begin_step=100,
            sharpness=30,
            temperature_steps=2600,
            kl_steps=1,
            kl_weight=2.0,
            noise_steps=12_000,  # it only reaches a fifth
            dead_below=0.1,
            decay=0.98,
        ),
        steps=3400,
        cooldown_steps=1200,
        batch=8,
        learning_rate=1e-3,
        clip=1.0,
    )


def vqgan_small() -> TokenizerTrainConfig:
    """A VQGAN on a laptop: f8, 1,024 codes, no discriminator, the embedded sample.

    Command: toto tokenizer train vqgan-small --out runs/vqgan-small
    Cost: about 16 minutes of one thread, 1.4 GB of memory.
    Expect: 19.2 dB and SSIM 0.63 on the held-out scenes at 128 px, with nearly all codes.
    """
    return replace(
        embedded(),
        name="vqgan-small",
        kind="vqgan",
        model=VQGANConfig(
            vocab_size=1024,
            code_width=64,
            z_channels=64,
            resolution=64,
            ch=32,
            ch_mult=(1, 2, 2, 4),
            num_res_blocks=1,
            attn_resolutions=(8,),
        ),
        method=Adversarial(
            codebook="average", commitment=0.25, begin_step=100, dead_below=0.05, discriminator_start=None
        ),
        steps=1400,
        cooldown_steps=450,
        batch=8,
        learning_rate=1e-3,
        clip=1.0,
    )


def dvae() -> TokenizerTrainConfig:
    """DALL-E's dVAE as published (arXiv 2102.12092, appendix A), on your images; for GPUs.

    Command: toto tokenizer train dvae --out runs/dvae --data imagenet/train --heldout imagenet/val-1000
    Cost: 3,000,000 steps of 512 crops of 256 px; published on 64 V100. Use --steps, --batch and --method.* for less.
    """
    return replace(
        on_your_own(embedded(), size=256),
        name="dvae",
        kind="dvae",
        model=DVAEConfig(),
        method=Gumbel(),
        steps=3_000_000,
        batch=512,
        learning_rate=1e-4,
        final_learning_rate=1.25e-6,
        warmup_steps=0,
        cooldown_steps=3_000_000,
        cooldown="cosine",
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        clip=4.0,
        average_decay=0.999,
    )


def vqgan(codes: int = 1024) -> TokenizerTrainConfig:
    """VQGAN f16 as published (configs/imagenet_vqgan.yaml of taming-transformers), on your images; for GPUs.

    The perceptual loss of the publication is off; see `toto.training.adversary`. The rate is 4.5e-6 a crop.

    Command: toto tokenizer train vqgan-1k --out runs/vqgan --data imagenet/train --heldout imagenet/val-1000
    Cost: the published run's length isn't known; its discriminator starts after 250,001 steps.
    """
    batch = 12
    return replace(
        on_your_own(embedded(), size=256),
        name=f"vqgan-{codes // 1024}k",
        kind="vqgan",
        model=VQGANConfig(vocab_size=codes),
        method=Adversarial(),
        steps=1_000_000,
        batch=batch,
        learning_rate=4.5e-6 * batch,
        warmup_steps=0,
        cooldown_steps=0,
        betas=(0.5, 0.9),
        weight_decay=0.0,
        clip=1e9,
        average_decay=0.0,
    )


def on_your_own(recipe: TokenizerTrainConfig, *, size: int) -> TokenizerTrainConfig:
    """The recipe without data, for whole-scale crops of this size without changed colours."""
    crops = CropConfig(size=size, zoom=0.5, native=0.0, colour_share=0.0, colour_mix=0.0, colour_shift=0.0)
    return replace(
        recipe, crops=crops, cooldown_crops=crops, sources=(), heldout=(), heldout_size=size, parts=1, save_every=1000
    )
