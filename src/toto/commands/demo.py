"""`toto demo`: the whole way on the embedded sample, offline, in minutes."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from toto.commands.evaluate import print_bits, print_probe
from toto.commands.parsing import parse
from toto.evaluation.features import open_backbone
from toto.evaluation.labelled import Extracted, ProceduralLabel, extract, procedural_clips
from toto.evaluation.likelihood import heldout_evaluation
from toto.evaluation.probe import ProbeConfig
from toto.evaluation.read_out import ProbeData, ProbeSide, bits, probe_sides
from toto.evaluation.result import Result
from toto.generation.rollout import continue_codes
from toto.generation.sampler import SamplerConfig
from toto.media import sample
from toto.media.decode import read_clip
from toto.media.encode import write_image, write_video
from toto.media.transforms import square
from toto.model.budget import parameter_table
from toto.model.weights import load_model
from toto.recipes.pretraining import demo as recipe
from toto.report.page import Section, write_page
from toto.report.plots import bits_by_frame, loss_curve, probe_by_layer
from toto.report.sheet import comparison_sheet, contact_sheet
from toto.runtime.metrics import read_metrics
from toto.runtime.progress import duration
from toto.runtime.provenance import versions, write_provenance
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.tokenizer import Tokenizer, load_tokenizer
from toto.training.config import TrainConfig
from toto.training.loop import train
from toto.training.source import SourceConfig

SIZE, STRIDE, FRAMES, PROMPT = 64, 4, 16, 8
SHOWN_SCENES = 3
PROBED: tuple[ProceduralLabel, ...] = ("motion", "bar")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tokenize the embedded sample, pre-train a small model, probe it, let it continue scenes, and write a page.

    The same command again continues where it was stopped.

    Attributes:
        out: the folder; the page is OUT/index.html.
        steps: training steps, by default those of the recipe.
        views: how often each training scene is tokenized, each time with another crop and first frame.
        clips: procedural clips that the probe is trained on; a third as many test it.
    """

    out: Path = Path("runs/demo")
    steps: int | None = None
    views: int = 8
    clips: int = 300


def run(words: list[str]) -> None:
    """Parse, go the whole way, and say where the page is."""
    options = parse(Options, words, verb="demo")
    began = time.monotonic()
    write_provenance(options.out, options)
    sources = tokenize_sample(options)
    config = demo_config(options, sources)
    last = train(config, options.out / "model", evaluate=heldout_evaluation(config), resume=True)
    found = bits(last, train=sources["train"][:1], heldout=sources["heldout"])
    print_bits(found)
    found.save(options.out / "bits.json")
    tokenizer = load_tokenizer()
    probed = probe_procedural(last, tokenizer, options)
    for label, result in probed.items():
        print_probe(result)
        result.save(options.out / f"probe-{label}.json")
    pictures = reconstructions(tokenizer, options.out), *continuations(last, tokenizer, options.out)
    write_demo_page(options.out, config, found, probed, pictures, seconds=time.monotonic() - began)
    print(f"{options.out / 'index.html'}: done in {duration(time.monotonic() - began)}")


def tokenize_sample(options: Options) -> dict[str, tuple[SourceConfig, ...]]:
    """Shards of the training scenes, the training photographs and the held-out scenes."""
    root = sample.sample_folder()
    jobs = {"scenes-train": options.views, "photographs-train": options.views, "scenes-heldout": 1}
    for name, views in jobs.items():
        kind, split = name.split("-")
        store = tokenize(
            TokenizeConfig(
                source=root / kind / split,
                out=options.out / "shards" / name,
                size=SIZE,
                stride=STRIDE,
                min_frames=FRAMES,
                views=views,
            )
        )
        print(f"{store.folder}: {len(store)} items, {store.frame_count * store.grid[0] * store.grid[1]:,} tokens")
    shards = options.out / "shards"
    return {
        "train": (
            SourceConfig(path=shards / "scenes-train", weight=0.9),
            SourceConfig(path=shards / "photographs-train", weight=0.1, modality="image"),
        ),
        "heldout": (SourceConfig(path=shards / "scenes-heldout", weight=1),),
    }


def demo_config(options: Options, sources: dict[str, tuple[SourceConfig, ...]]) -> TrainConfig:
    """The recipe on these shards."""
    config = recipe()
    data = replace(config.data, sources=sources["train"], heldout=sources["heldout"])
    steps = config.steps if options.steps is None else options.steps
    return replace(config, data=data, steps=steps)


def probe_procedural(checkpoint: Path, tokenizer: Tokenizer, options: Options) -> dict[ProceduralLabel, Result]:
    """Probe every label of the procedural corpus at every layer, on features of one pass over its clips."""
    counts = (options.clips, max(6, options.clips // 3))
    data, backbone = ProbeData(), open_backbone(checkpoint, tokenizer)
    found: list[Extracted] = []
    results: dict[ProceduralLabel, Result] = {}
    for label in PROBED:
        sides = []
        for seed, count in enumerate(counts, 1):
            clips = procedural_clips(seed, count, frames=FRAMES, size=SIZE, label=label)
            if len(found) < len(counts):
                found.append(extract(backbone, clips, batch=data.batch))
            features = replace(found[seed - 1].features, labels=torch.tensor(clips.labels))
            sides.append(ProbeSide.kept(clips, replace(found[seed - 1], features=features)))
        results[label] = probe_sides(backbone, *sides, config=ProbeConfig(), data=data)
    return results


def shown_frames(path: Path) -> Tensor:
    """The first frames of a scene as the model sees them."""
    return square(read_clip(path, frames=FRAMES, stride=STRIDE).frames, SIZE)


def shown_scenes() -> list[Path]:
    """The held-out scenes in the middle of each third of the film."""
    paths = sample.scenes("heldout")
    return [paths[(2 * third + 1) * len(paths) // (2 * SHOWN_SCENES)] for third in range(SHOWN_SCENES)]


def reconstructions(tokenizer: Tokenizer, out: Path) -> tuple[Path, str]:
    """Held-out frames above what the tokenizer makes of them, at 128 pixels."""
    frames = torch.cat(
        [square(read_clip(path, frames=1, stride=1).frames, 128) for path in sample.scenes("heldout")[::2]]
    )
    path = out / "reconstructions.png"
    write_image(path, comparison_sheet(frames, tokenizer.decode(tokenizer.encode(frames))))
    return path, "Held-out scenes, 128 x 128 pixels (above), and what their 16 x 16 codes hold (below)"


def continuations(checkpoint: Path, tokenizer: Tokenizer, out: Path) -> list[tuple[Path, str]]:
    """Continue held-out scenes; a film and a sheet for each, the true frames beside the model's."""
    model = load_model(checkpoint)
    sheets: list[tuple[Path, str]] = []
    films: list[tuple[Path, str]] = []
    for path in shown_scenes():
        truth = shown_frames(path)
        codes = tokenizer.encode(truth)
        continued = continue_codes(
            model,
            codes[None, :PROMPT],
            new_frames=FRAMES - PROMPT,
            context_frames=FRAMES,
            sampler=SamplerConfig(temperature=0.8, top_k=20, top_p=0.9),
        )
        frames = tokenizer.decode(continued[0])
        film, sheet = out / f"continuation-{path.stem}.mp4", out / f"continuation-{path.stem}.png"
        write_video(film, torch.cat([truth, frames], dim=2), rate=24 / STRIDE, scale=3)
        rows = contact_sheet(truth, columns=FRAMES), contact_sheet(frames, prompt=PROMPT, columns=FRAMES)
        write_image(sheet, torch.cat(rows))
        told = f"the film (above); {PROMPT} frames of prompt (blue) and the model's {FRAMES - PROMPT}"
        sheets.append((sheet, f"Scene {path.stem}: {told}"))
        films.append((film, f"Scene {path.stem}: the film (left), prompt and continuation (right)"))
    return sheets + films


def write_demo_page(
    out: Path,
    config: TrainConfig,
    found: Result,
    probed: dict[ProceduralLabel, Result],
    pictures: tuple[tuple[Path, str], ...],
    *,
    seconds: float,
) -> None:
    """Everything that was found, on one page."""
    rows = read_metrics(out / "model")
    speed = sorted(row["speed/tokens_per_second"] for row in rows if "speed/tokens_per_second" in row)
    later = {name: found.metrics[f"{name}_bits_later_frames"].value for name in ("model", "unigram", "copy")}
    model = load_model(out / "model")
    facts = {
        "parameters": f"{parameter_table(model.config)['total'] / 1e6:.2f} M",
        "tokens seen": f"{max(row.get('train/tokens', 0) for row in rows) / 1e6:.1f} M",
        "tokens/s while training (median)": f"{speed[len(speed) // 2]:,.0f}",
        "bits per token on later frames": f"{later['model']:.2f}",
        "copying the frame before": f"{later['copy']:.2f}",
        "unigram": f"{later['unigram']:.2f}",
    }
    write_page(
        out / "index.html",
        title="Toto learns from video",
        lead="A small transformer learnt to predict the next visual token of a film. It never saw these scenes.",
        facts=facts,
        sections=_sections(rows, found, probed, pictures),
        foot=f"Made by `{shlex.join(['toto', *sys.argv[1:]])}` in {duration(seconds)} with "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + f". Training: {config.steps} steps, {config.batch} sequence(s) each, seed {config.seed}. "
        "Film: Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0, cut and scaled.",
    )


def _sections(
    rows: list[dict[str, float]],
    found: Result,
    probed: dict[ProceduralLabel, Result],
    pictures: tuple[tuple[Path, str], ...],
) -> list[Section]:
    table: list[tuple[str, ...]] = [("", "all frames", "first frame", "later frames")]
    for name in ("model", "copy", "unigram"):
        parts = ("", "_first_frame", "_later_frames")
        table.append((name, *(f"{found.metrics[f'{name}_bits{part}'].value:.2f}" for part in parts)))
    return [
        Section(
            title="It continues scenes it has never seen",
            text=("Each code is drawn from the model; nothing of the film after the prompt is shown to it.",),
            pictures=pictures[1:],
        ),
        Section(
            title="It learnt more than how often codes occur",
            text=(
                "Bits per visual token on held-out scenes. The unigram knows how often each code occurs; copying "
                "repeats the code at the same place one frame ago, with a rate fitted on the training scenes.",
            ),
            plots=(loss_curve(rows, found), bits_by_frame(found)),
            table=tuple(table),
        ),
        Section(
            title="What can be read out of it",
            text=(
                "Probes on frozen features of clips that are made by code and were never trained on: which of six ways "
                "a shape moves, and what stands in front of it. Bands are 95 % bootstrap intervals over test clips; "
                "rings mark the layers that held-back training clips chose.",
            ),
            plots=(
                probe_by_layer(probed["motion"], "How does the shape move? (six motions)"),
                probe_by_layer(probed["bar"], "What stands in front? (nothing, upright bar, lying bar)"),
            ),
        ),
        Section(
            title="What the codes hold",
            text=("The tokenizer turns each square of 8 x 8 pixels into one code.",),
            pictures=pictures[:1],
        ),
    ]
