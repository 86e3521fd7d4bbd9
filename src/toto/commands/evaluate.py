"""`toto evaluate image`, `video` and `probe`, `toto evaluate bits` and `toto evaluate patches`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from toto.commands.parsing import parse, parse_source, take_word
from toto.commands.printing import classes_line
from toto.commands.sides import training_and_test
from toto.evaluation.backbones.huggingface import OverFrames
from toto.evaluation.backbones.names import load_backbone
from toto.evaluation.feature_cache import AUTO, CacheConfig
from toto.evaluation.features import Backbone
from toto.evaluation.finetune_config import Augmentation
from toto.evaluation.labelled import LabelledClips, procedural_clips
from toto.evaluation.overlap import require_apart
from toto.evaluation.probe import ProbeConfig
from toto.evaluation.read_out import ProbeData, bits, patch_errors, probe
from toto.evaluation.result import Metric, Result
from toto.media.ledger import LedgerRow, summary, unused
from toto.report.plots import PLOTTED, write_probe_plot
from toto.runtime.device import Precision
from toto.runtime.errors import ConfigError
from toto.runtime.places import AnyPath
from toto.tokens.tokenizer import EMBEDDED

PROCEDURAL = "procedural"
PROBES = ("image", "video", "probe")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Train average-pool and attention-pool probes on every layer of a frozen backbone, at several rates, in one go.

    `image` takes still images, `video` takes clips, `probe` either.

    Attributes:
        checkpoint: a checkpoint or run folder, or a hub id; or another backbone: hf:NAME_OR_FOLDER, a vision model of
            Hugging Face; random:CHECKPOINT, the same with weights drawn at random; pixels:SIZE/GRID, raw pixels.
        data: labelled videos or images, in any form that `toto tokenize` reads, or "procedural" for the motions that
            are made by code.
        clips: the folder that holds what a manifest names; by default the manifest's own.
        split: train on this split alone.
        image_column: of parquet files, the column with the bytes of images or videos; by default one with a usual name.
        label_column: of parquet files and CSVs, the column with the labels; by default one with a usual name.
        test: another source to test on; without it and without --test-split, a share of DATA is held back.
        test_clips: the same for TEST; by default --clips.
        test_split: test on this split, of TEST or of DATA.
        test_image_column: the same for TEST; by default --image-column.
        test_label_column: the same for TEST; by default --label-column.
        test_share: the share that is held back.
        procedural_clips: how many procedural clips are made for training; a third as many for testing.
        allow_overlap: test also on items that hold the same bytes or show the same pixels as a training item; else they
            are refused.
        limit: train on so many clips of each class at most, and test on so many; None takes all.
        out: write the result record to this JSON file.
        plot: write accuracy by layer with intervals to this SVG or PNG file.
        tokenizer: "embedded", or a tokenizer folder; a model with patch inputs needs none.
        frames: T of a clip, where the backbone leaves it open.
        over_frames: of a model of images that sees clips: the tokens of all frames, or their mean over frames.
        keep_class: keep class and register tokens of Hugging Face models beside the visual ones.
        stride: of the frames of videos; by default that of the model's training data.
        features: kept after one pass of the trunk, or streamed: the trunk runs in every epoch, and only a batch of
            features is in memory.
        cache: keep the features on disk for the next time, in this folder, which is for one backbone, or `auto`.
        cache_gb: most that the cache may take.
        cache_tokens: keep the means of so many runs of neighbouring tokens of a clip, instead of all tokens.
        augment: show other parts of the training clips in every epoch, mirrored or not; needs `--features streamed`.
        batch: clips in one pass of the trunk.
        precision: auto, bf16 or fp32, of the trunk.
        device: auto, cpu, cuda, ...
        probe: how the heads are trained.
    """

    checkpoint: str
    data: str
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    test: str | None = None
    test_clips: AnyPath | None = None
    test_split: str | None = None
    test_image_column: str | None = None
    test_label_column: str | None = None
    test_share: float = 0.3
    procedural_clips: int = 480
    allow_overlap: bool = False
    limit: int | None = None
    out: Path | None = None
    plot: Path | None = None
    tokenizer: str = EMBEDDED
    frames: int | None = None
    over_frames: OverFrames = "concatenate"
    keep_class: bool = False
    stride: int | None = None
    features: Literal["kept", "streamed"] = "kept"
    cache: str | None = None
    cache_gb: float = CacheConfig.gigabytes
    cache_tokens: int | None = None
    augment: bool = False
    batch: int = 8
    precision: Precision = "auto"
    device: str = "auto"
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.plot is not None and self.plot.suffix not in PLOTTED:
            raise ConfigError(f"is no {' or '.join(PLOTTED)} file", where=self.plot, fix="give it one of these endings")


@dataclass(frozen=True, kw_only=True)
class BitsOptions:
    """Held-out bits per visual token, beside the unigram entropy and copying the frame before.

    Attributes:
        checkpoint: a checkpoint or run folder, or a hub id.
        train: the shards that the baselines are fitted on, [image:|video:]FOLDER.
        heldout: the shards that are measured, in the same form.
        train_split: fit the baselines on this split of TRAIN alone.
        split: measure this split of HELDOUT alone.
        windows: at most this many of each held-out source, spread evenly over it.
        out: write the result record to this JSON file.
        precision: auto, bf16 or fp32.
        device: auto, cpu, cuda, ...
    """

    checkpoint: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    train_split: str | None = None
    split: str | None = None
    windows: int = 256
    out: Path | None = None
    precision: Precision = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PatchesOptions:
    """Held-out error of predicted patches, beside their mean and copying the frame before.

    Attributes:
        checkpoint: a checkpoint or run folder, or a hub id.
        heldout: the shards that are measured, made with --keep-pixels, [image:|video:]FOLDER.
        split: measure this split of HELDOUT alone.
        windows: at most this many of each held-out source, spread evenly over it.
        out: write the result record to this JSON file.
        precision: auto, bf16 or fp32.
        device: auto, cpu, cuda, ...
    """

    checkpoint: str
    heldout: tuple[str, ...]
    split: str | None = None
    windows: int = 256
    out: Path | None = None
    precision: Precision = "auto"
    device: str = "auto"


def run(words: list[str]) -> None:
    """Parse, evaluate, print a table, and write the record where one is asked for."""
    task, rest = take_word(words, verb="evaluate", what="TASK", known=[*PROBES, "bits", "patches"])
    if task == "bits":
        options = parse(BitsOptions, rest, verb="evaluate bits")
        result, out = evaluate_bits(options), options.out
        print_bits(result, out)
    elif task == "patches":
        wanted = parse(PatchesOptions, rest, verb="evaluate patches")
        result, out = evaluate_patches(wanted), wanted.out
        print_patches(result, out)
    else:
        asked = parse(ProbeOptions, rest, verb=f"evaluate {task}")
        result, out = evaluate_probe(asked, task), asked.out
        print_probe(result, out)
        if asked.plot is not None:
            write_probe_plot(asked.plot, result)
            print(f"{asked.plot}: accuracy by layer")
    if out:
        result.save(out)


def evaluate_probe(options: ProbeOptions, task: str = "probe") -> Result:
    """The probe's record for these options."""
    backbone = load_backbone(
        options.checkpoint,
        tokenizer=options.tokenizer,
        frames=options.frames,
        over_frames=options.over_frames,
        keep_class=options.keep_class,
        seed=options.probe.seed,
        device=options.device,
        precision=options.precision,
    )
    train, test = _clips(options, backbone, stride=options.stride or backbone.stride)
    if task != "probe" and task != train.modality:
        raise ConfigError(f"holds {train.modality}s", where=train.name, fix=f"use `toto evaluate {train.modality}`")
    if options.limit is not None:
        train, test = train.first_of_each(options.limit), test.first_of_each(options.limit)
    if not options.allow_overlap:
        require_apart(train, test)
    backbone.modality = train.modality
    data = ProbeData(
        features=options.features,
        augmentation=Augmentation() if options.augment else None,
        batch=options.batch,
        cache=_cache(options),
    )
    return probe(backbone, train, test, config=options.probe, data=data, task=task)


def _cache(options: ProbeOptions) -> CacheConfig | None:
    if options.cache is None:
        return None
    folder: Path | Literal["auto"] = AUTO if options.cache == AUTO else Path(options.cache)
    return CacheConfig(folder=folder, gigabytes=options.cache_gb, tokens=options.cache_tokens)


def evaluate_bits(options: BitsOptions) -> Result:
    """The record of held-out bits for these options."""
    return bits(
        options.checkpoint,
        train=tuple(parse_source(text) for text in options.train),
        heldout=tuple(parse_source(text) for text in options.heldout),
        most=options.windows,
        split=options.split,
        train_split=options.train_split,
        device=options.device,
        precision=options.precision,
    )


def evaluate_patches(options: PatchesOptions) -> Result:
    """The record of held-out patch errors for these options."""
    return patch_errors(
        options.checkpoint,
        heldout=tuple(parse_source(text) for text in options.heldout),
        most=options.windows,
        split=options.split,
        device=options.device,
        precision=options.precision,
    )


def print_probe(result: Result, stored: Path | None = None) -> None:
    """The table by layer, with intervals, the chance level, the classes, the denominators and the bound."""
    pools = list(result.details["chosen_layer"])
    table = Table(title=f"Probe of {result.protocol['test']}: accuracy by layer, 95 % bootstrap intervals")
    for name in ("layer", *(f"{pool} pool" for pool in pools)):
        table.add_column(name, justify="right")
    rows: dict[int, dict[str, str]] = {}
    for row in result.details["by_layer"]:
        mark = " *" if result.details["chosen_layer"][row["pool"]] == row["layer"] else "  "
        text = f"{100 * row['test']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]{mark}"
        rows.setdefault(row["layer"], {})[row["pool"]] = text
    for layer, cells in rows.items():
        table.add_row(str(layer), *(cells[pool] for pool in pools))
    Console().print(table)
    chance, largest = result.metrics["chance"].value, result.details["largest_class"]
    print(f"* chosen on a slice of the training clips; chance {100 * chance:.1f}, largest class {100 * largest:.1f}")
    for pool in pools:
        of_layers = [row for row in result.details["by_layer"] if row["pool"] == pool]
        row = next(row for row in of_layers if row["layer"] == result.details["chosen_layer"][pool])
        five = f", top-5 {100 * row['top5']:.1f}" if f"{pool}_top5" in result.metrics else ""
        print(f"{pool} pool: layer {row['layer']}, rate {row['rate']:g}, decay {row['decay']:g}{five}")
    print(classes_line(result.protocol["classes"]))
    print(f"accuracy is over {_denominators(result)}")
    if result.failed:
        bounds = [f"{pool} pool {100 * (result.metrics[f'{pool}_accuracy'].bound or 0):.1f}" for pool in pools]
        print(f"with every failed clip counted wrong, at the chosen layers: {', '.join(bounds)}")
    _print_ledger(result, stored)


def print_bits(result: Result, stored: Path | None = None) -> None:
    """Bits of model and baselines, over all frames, first frames and later ones."""
    _print_by_part(result, "Held-out bits per visual token", [f"{name}_bits" for name in ("model", "unigram", "copy")])
    gain = result.metrics.get("gain_over_copy_later_frames")
    if gain is not None:
        print(f"model against copying on later frames, window by window: {_cell(gain)} bits fewer")
    print(f"copy rate {result.protocol['copy_rate']:.3f}")
    _print_windows(result, stored)


def print_patches(result: Result, stored: Path | None = None) -> None:
    """Errors of model and baselines, over all frames, first frames and later ones."""
    names = [f"{name}_error" for name in ("model", "mean", "copy")]
    _print_by_part(result, "Held-out squared error of normalised patches", names)
    gain = result.metrics.get("gain_over_copy_later_frames")
    if gain is not None:
        print(f"copying less model on later frames, window by window: {_cell(gain)}")
    _print_windows(result, stored)


def _print_windows(result: Result, stored: Path | None) -> None:
    """Over how many windows and inputs a loss is, and the share of inputs that it says nothing about."""
    print(f"{result.protocol['windows']} windows of {result.protocol['frames']} frames, of {_denominators(result)}")
    missing = result.metrics["missing_share"].value
    if missing:
        print(f"{100 * missing:.1f} % of the inputs are missing: a loss has no bound, so nothing is known about them")
    _print_ledger(result, stored)


def _denominators(result: Result) -> str:
    """Every count, since no number says anything without them."""
    skipped = f", {result.skipped:,} left out" if result.skipped else ""
    return f"{result.evaluated:,} evaluated of {result.offered:,} offered ({result.failed:,} failed{skipped})"


def _print_ledger(result: Result, stored: Path | None) -> None:
    """The common line for each part of the data, and what failed."""
    for part, counts in result.ledger.items():
        print(f"{part}: {summary(counts, stored)}")
    failures = [LedgerRow(**row) for row in result.details.get("failures", ())]
    print("\n".join(unused(failures, rest_in=stored)), end="\n" if failures else "")


def _print_by_part(result: Result, title: str, names: list[str]) -> None:
    table = Table(title=title)
    for heading in ("", "all frames", "first frame", "later frames"):
        table.add_column(heading, justify="right")
    for name in names:
        cells = [result.metrics.get(f"{name}{part}") for part in ("", "_first_frame", "_later_frames")]
        table.add_row(name.partition("_")[0], *(_cell(metric) for metric in cells))
    Console().print(table)


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.2f}, {metric.high:.2f}]"
    return f"{metric.value:.3f}{interval}"


def _clips(options: ProbeOptions, backbone: Backbone, *, stride: int) -> tuple[LabelledClips, LabelledClips]:
    frames = backbone.frames
    if options.data == PROCEDURAL:
        size = backbone.frame_size
        train = procedural_clips(1, options.procedural_clips, frames=frames, size=size)
        return train, procedural_clips(2, max(6, options.procedural_clips // 3), frames=frames, size=size)
    return training_and_test(options, frames=frames, stride=stride, seed=options.probe.seed)
