"""Recipes of tokenizers."""

from __future__ import annotations

from toto.tokens.vqvae import StackConfig, VQVAEConfig
from toto.training.codebook import CodebookConfig
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
        model=VQVAEConfig(
            vocab_size=4096,
            code_width=12,
            encoder=StackConfig(widths=(96, 192), hidden=(96, 192), blocks=(2, 2)),
            decoder=StackConfig(widths=(128, 256), hidden=(128, 128), blocks=(2, 3)),
        ),
        codebook=CodebookConfig(begin_step=100, decay=0.99, commitment=0.06, cooldown_commitment=0.2, dead_below=0.05),
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
        absolute_error=0.0,
        average_decay=0.995,
        precision="auto",
        report_every=50,
        evaluate_every=1000,
        save_every=250,
        collapse_below=0.3,
    )
