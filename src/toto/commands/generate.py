"""`toto generate --checkpoint C --prompt CLIP --out FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from toto.commands.parsing import parse
from toto.generation.rollout import continue_codes, require_token_inputs
from toto.generation.sampler import SamplerConfig
from toto.media.decode import media_kind, read_media
from toto.media.encode import write_gif, write_image, write_video
from toto.media.ledger import LedgerRow, count_by_status, summary
from toto.media.transforms import square
from toto.model.quantised import Weights
from toto.model.weights import load_card, load_model
from toto.report.sheet import contact_sheet
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError
from toto.runtime.progress import Progress
from toto.runtime.provenance import write_provenance
from toto.tokens.passport import Passport
from toto.tokens.shards import LEDGER, write_ledger
from toto.tokens.tokenizer import EMBEDDED, Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue a video or an image, or start from nothing; writes MP4, GIF and a contact sheet.

    Attributes:
        checkpoint: a checkpoint or run folder, or a hub id.
        out: the folder to write into.
        prompt: a video or an image; without it the model starts from nothing.
        prompt_frames: at most this many frames of the prompt are used, at the stride of the training data.
        start: first frame of the prompt video that is used.
        frames: how many frames to add.
        samples: how many continuations.
        temperature: logits are divided by it; 0 always takes the likeliest.
        top_k: only the k likeliest tokens, 0 for all.
        top_p: only the likeliest tokens whose probabilities reach p together.
        seed: of the draws.
        cache: keep keys and values; the same result without, only slower.
        weights: precision of the weights while tokens are drawn; bf16 and int8 are faster and predict a little worse.
        tokenizer: "embedded", or a tokenizer folder.
        rate: frames a second of what is written.
        scale: enlarge what is written by this factor.
        device: auto, cpu, cuda, ...
    """

    checkpoint: str
    out: Path
    prompt: Path | None = None
    prompt_frames: int = 8
    start: int = 0
    frames: int = 8
    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0
    cache: bool = True
    weights: Weights = "fp32"
    tokenizer: str = EMBEDDED
    rate: float = 6.0
    scale: int = 2
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("prompt_frames", "frames", "samples", "scale"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"--{name.replace('_', '-')}")
        if self.start < 0:
            raise ConfigError(f"must not be negative, is {self.start}", where="--start")
        if not 0 < self.rate <= 240:
            raise ConfigError(f"must lie in 0 .. 240, is {self.rate}", where="--rate")


def run(words: list[str]) -> None:
    """Parse, continue, and write what a person can look at."""
    options = parse(Options, words, verb="generate")
    sampler = SamplerConfig(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    card, model = load_card(options.checkpoint), load_model(options.checkpoint, device=pick_device(options.device))
    require_token_inputs(model, where=options.checkpoint)
    tokenizer = load_tokenizer(options.tokenizer)
    passport = Passport.from_dict(card.passport, where=options.checkpoint)
    passport.require_tokenizer(
        tokenizer.passport,
        where=f"tokenizer {options.tokenizer}",
        fix="give --tokenizer, the one the model was trained with",
    )
    codes = prompt_codes(options, tokenizer, passport, card.sequence["stride"])
    with Progress("generating", total=options.frames, unit="frames") as progress:
        made = continue_codes(
            model,
            codes.expand(options.samples, -1, -1, -1),
            new_frames=options.frames,
            context_frames=card.sequence["frames"],
            sampler=sampler,
            use_cache=options.cache,
            weights=options.weights,
            on_frame=progress.advance,
        )
    write_provenance(options.out, options)
    for number, sample in enumerate(made.cpu()):
        frames = tokenizer.decode(sample)
        name = options.out / f"sample-{number}"
        write_video(name.with_suffix(".mp4"), frames, rate=options.rate, scale=options.scale)
        write_gif(name.with_suffix(".gif"), frames, rate=options.rate, scale=options.scale)
        sheet = contact_sheet(frames, prompt=codes.shape[1], scale=options.scale)
        write_image(name.with_suffix(".png"), sheet)
        print(f"{name}.mp4 .gif .png: {codes.shape[1]} frames of prompt (marked), {options.frames} new")
    if options.prompt is not None:
        kind = media_kind(options.prompt) or ""
        rows = [LedgerRow(id=options.prompt.name, kind=kind, status="ok", frames=codes.shape[1])]
        write_ledger(options.out, rows)
        print(summary(count_by_status(rows), options.out / LEDGER))


def prompt_codes(options: Options, tokenizer: Tokenizer, passport: Passport, stride: int) -> torch.Tensor:
    """Codes `[1, P, rows, cols]` of the prompt's frames; P = 0 without a prompt."""
    if passport.frame_size is None or passport.grid is None:
        raise ConfigError(
            "its passport names no frame size", where=options.checkpoint, fix="train it with `toto train`"
        )
    if options.prompt is None:
        return torch.empty((1, 0, *passport.grid), dtype=torch.int64)
    clip = read_media(options.prompt, stride=stride, offset=options.start, limit=options.prompt_frames)
    return tokenizer.encode(square(clip.frames, passport.frame_size[0]))[None]
