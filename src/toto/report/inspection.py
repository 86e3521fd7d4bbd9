"""What tokenizers do to the same frames, side by side: the table, the plots and the page."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from toto.media.encode import write_image
from toto.media.ledger import LedgerRow
from toto.report.page import Section, write_page
from toto.report.plots import INK, add_legend, as_svg, new_figure
from toto.report.sheet import comparison_sheet
from toto.tokens.quality import Fidelity
from toto.tokens.statistics import CodeStatistics, Map

COLOURS = ("#1f6fd1", "#e0752d", "#3a9d7c", "#7a4fc4", "#c23b5e", "#8b95a1")
MAP_COLOURS, ERROR_COLOURS = "viridis", "magma"
ERROR_FACTOR = 5
SHEET_SIDE = 128
LEAST_SPAN = 1.0
COLLAPSE_BELOW = 0.30
REMEDY = (
    "if you train it, raise dead_below, or lower learning_rate or model.vocab_size (docs/tokenizer.md); "
    "else take a smaller vocabulary"
)
GRAM_NAMES = {1: "Single codes", 2: "Pairs of neighbours", 3: "Runs of three"}
NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """How much of a source was looked at; the items add up to what was offered.

    Attributes:
        read: items that were looked at.
        failed: inputs that could not be read, or are missing.
        skipped: files that are neither images nor videos, and what is named twice.
        beyond_limit: items that were not opened, since there are more of them than frames may be looked at.
        frames: frames that were looked at.
        frames_available: how many there are; None where some were not opened or not read to their end.
        items_cut: items that have more frames than were looked at.
        unusable: what could not be read or was skipped, with the reason.
    """

    read: int
    failed: int
    skipped: int
    beyond_limit: int
    frames: int
    frames_available: int | None
    items_cut: int
    unusable: tuple[LedgerRow, ...]

    @property
    def offered(self) -> int:
        """All items."""
        return self.read + self.failed + self.skipped + self.beyond_limit

    def in_words(self) -> str:
        """How many of how many, as a sentence without a full stop."""
        of = "" if self.frames_available is None else f" of {self.frames_available:,}"
        more = [f"{self.items_cut:,} of them have more"] if self.items_cut else []
        more += [f"{self.beyond_limit:,} items were left out"] if self.beyond_limit else []
        limit = f" ({', '.join(more)}: raise --frames)" if more else ""
        return f"looked at {self.frames:,}{of} frames of {self.read:,} items{limit}"


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One tokenizer on one source.

    Attributes:
        tokenizer: its display name.
        fidelity: how much of the frames came back; None where there are no originals.
        codes: how its codes are distributed.
        shown: what it made of a few frames.
    """

    tokenizer: str
    fidelity: Fidelity | None
    codes: CodeStatistics
    shown: UInt8[Tensor, "T H W 3"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of frames, and every tokenizer on it.

    Attributes:
        name: what the source is called.
        kind: files of media, or a store of shards.
        size: height and width of the frames in pixels.
        accounts: how much of it was looked at.
        originals: the few frames whose reconstructions are shown; None where there are only codes.
        inspected: a result for each tokenizer, in the order they were named.
        ledger: what became of every input (of a store: of the inputs it was made from).
    """

    name: str
    kind: Literal["media", "shards"]
    size: tuple[int, int]
    accounts: Accounts
    originals: UInt8[Tensor, "T H W 3"] | None
    inspected: tuple[Inspected, ...]
    ledger: tuple[LedgerRow, ...] = ()


def side_by_side(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """The figures as rows of cells, a column for each tokenizer on each part; the first row is the heading."""
    columns = [(part, each) for part in parts for each in part.inspected]
    several = len({each.tokenizer for _, each in columns}) > 1
    rows: list[tuple[str, ...]] = [("", *(_heading(part, each, several, len(parts) > 1) for part, each in columns))]
    cells = [_cells(each) for _, each in columns]
    return rows + [(name, *(column[name] for column in cells)) for name in cells[0]]


def collapse_warnings(parts: Sequence[Part]) -> list[str]:
    """A line for each tokenizer that uses less than 30 % of its vocabulary where there are as many tokens as codes.

    Of such parts the one that uses most of it counts.
    """
    lines = []
    for number, first in enumerate(parts[0].inspected):
        found = [part.inspected[number].codes for part in parts]
        enough = [codes for codes in found if codes.tokens >= codes.vocab_size]
        codes = max(enough, key=lambda codes: codes.share_used, default=None)
        if codes is not None and codes.share_used < COLLAPSE_BELOW:
            lines.append(
                f"{first.tokenizer}: only {codes.codes_used:,} of {codes.vocab_size:,} codes occur "
                f"({codes.share_used:.1%}) in {codes.tokens:,} tokens; {REMEDY}"
            )
    return lines


def write_inspection_page(path: Path, parts: Sequence[Part], *, foot: str) -> None:
    """Draw everything and write one self-contained page."""
    names = [each.tokenizer for each in parts[0].inspected]
    with tempfile.TemporaryDirectory() as folder:
        sections = [_table_section(parts)]
        for number, part in enumerate(parts):
            sections += _part_sections(part, Path(folder) / str(number), alone=len(parts) == 1)
        write_page(
            path,
            title="What a tokenizer keeps" if len(names) == 1 else "What tokenizers keep, side by side",
            lead="How much of a picture survives the codes, which codes are used, and how they follow each other: "
            + ", ".join(names)
            + ".",
            facts=_facts(parts),
            sections=sections,
            foot=foot,
        )


def error_maps(frames: UInt8[Tensor, "T H W 3"], others: UInt8[Tensor, "T H W 3"]) -> UInt8[Tensor, "T H W 3"]:
    """Absolute error, its mean over the channels, times `ERROR_FACTOR`, in colours from dark (none) to bright."""
    error = (frames.to(torch.int16) - others.to(torch.int16)).abs().float().mean(-1)
    levels = (error * ERROR_FACTOR).round().clamp(max=255).long()
    colours = matplotlib.colormaps[ERROR_COLOURS](np.arange(256))[:, :3]
    return torch.from_numpy((colours * 255).round().astype(np.uint8))[levels]


def rank_frequency(part: Part, n: int) -> str:
    """How often runs of `n` codes occur, the most frequent first, a line for each tokenizer; log y, as in the paper."""
    figure, axes = new_figure(f"{GRAM_NAMES[n]} ({n}-grams)", "rank", "how often it occurs")
    for number, each in enumerate(part.inspected):
        grams = each.codes.ngrams[n - 1]
        label = f"{each.tokenizer}: {grams.distinct:,} of {grams.total:,}"
        marker = "o" if grams.distinct == 1 else None
        axes.plot(grams.ranks, grams.counts, color=_colour(number), linewidth=1.8, marker=marker, label=label)
    figure.set_size_inches(3.9, 3.2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0.8)
    add_legend(axes)
    return as_svg(figure)


def cell_maps(part: Part) -> list[str]:
    """For each tokenizer a map of the entropy at each cell and, where frames follow each other, one of the repeats."""
    lows, highs = zip(*(_range(each.codes.entropy_by_position) for each in part.inspected), strict=True)
    high = max(*highs, LEAST_SPAN)
    bits = min(*lows, high - LEAST_SPAN), high  # a wide scale, or one odd cell would look like an event
    return [_cell_maps(each, bits) for each in part.inspected]


def _cell_maps(each: Inspected, bits: tuple[float, float]) -> str:
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    entropy, repeats = figure.subplots(1, 2)
    figure.suptitle(each.tokenizer, x=0.02, ha="left", fontsize=10, color=INK, fontweight="bold")
    _heat(entropy, each.codes.entropy_by_position, "entropy, bits", bits)
    if each.codes.repeats_by_position is None:
        repeats.set_axis_off()
    else:
        shares = tuple(tuple(100 * share for share in row) for row in each.codes.repeats_by_position)
        _heat(repeats, shares, "repeats, %", (0.0, 100.0))
    return as_svg(figure)


def _heat(axes: Axes, values: Map, title: str, limits: tuple[float, float]) -> None:
    axes.set_title(title, fontsize=9, color=INK)
    drawn = axes.imshow(values, cmap=MAP_COLOURS, vmin=limits[0], vmax=limits[1], interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)


def _heading(part: Part, each: Inspected, several_tokenizers: bool, several_parts: bool) -> str:
    names = [each.tokenizer] if several_tokenizers or not several_parts else []
    return ", ".join(names + ([part.name] if several_parts else []))


def _cells(each: Inspected) -> dict[str, str]:
    codes, fidelity = each.codes, each.fidelity
    cells = {"frames": f"{codes.frames:,}", "codes a frame": f"{codes.grid[0]} x {codes.grid[1]}"}
    if fidelity is not None:
        cells["PSNR, dB"] = f"{fidelity.psnr_db:.2f}"
        cells["PSNR of the mean error, dB"] = f"{fidelity.psnr_of_mean_error_db:.2f}"
        cells["SSIM"] = NONE if fidelity.ssim is None else f"{fidelity.ssim:.3f}"
    cells["codes in use"] = f"{codes.codes_used:,} of {codes.vocab_size:,} ({codes.share_used:.0%})"
    cells["entropy, bits"] = f"{codes.entropy_bits:.2f} of {math.log2(codes.vocab_size):.2f}"
    cells["perplexity"] = f"{codes.perplexity:,.0f}"
    for grams in codes.ngrams[1:]:
        cells[f"different {grams.n}-grams"] = f"{grams.distinct:,} of {grams.total:,}"
    mean = float(np.mean(codes.entropy_by_position))
    cells["entropy at a cell, bits"] = f"{mean:.2f} of {_most_bits(codes):.2f}"
    cells["repeats between frames"] = NONE if codes.repeats is None else f"{codes.repeats:.1%}"
    return cells


def _most_bits(codes: CodeStatistics) -> float:
    """What the entropy at one cell can't exceed."""
    return math.log2(min(codes.frames, codes.vocab_size))


def _facts(parts: Sequence[Part]) -> dict[str, str]:
    first = parts[0]
    where = f", {first.name}" if len(parts) > 1 else ""
    facts = {
        "frames looked at": f"{sum(part.accounts.frames for part in parts):,}",
        "height x width in pixels": f"{first.size[0]} x {first.size[1]}",
    }
    for each in first.inspected:
        whose = f" of {each.tokenizer}" if len(first.inspected) > 1 else ""
        if each.fidelity is not None:
            facts[f"PSNR{whose}{where}"] = f"{each.fidelity.psnr_db:.2f} dB"
            if each.fidelity.ssim is not None and not whose:
                facts[f"SSIM{where}"] = f"{each.fidelity.ssim:.3f}"
        facts[f"of the codes{whose} in use{where}"] = f"{each.codes.share_used:.0%}"
    return facts


def _table_section(parts: Sequence[Part]) -> Section:
    looked = [f"{part.name}: {part.accounts.in_words()}." for part in parts]
    unusable = [
        f"{part.name}: {part.accounts.failed:,} inputs could not be read, {part.accounts.skipped:,} are no images or "
        "videos, or are named twice."
        for part in parts
        if part.accounts.failed or part.accounts.skipped
    ]
    warnings = [f"Warning: {line}." for line in collapse_warnings(parts)]
    return Section(title="The figures", text=(*warnings, *looked, *unusable), table=tuple(side_by_side(parts)))


def _part_sections(part: Part, folder: Path, *, alone: bool) -> list[Section]:
    after = "" if alone else f": {part.name}"
    most = f"{math.log2(part.accounts.frames):.2f}"
    return [
        Section(title=f"What the codes hold{after}", text=_picture_text(part), pictures=_pictures(part, folder)),
        Section(
            title=f"How often codes and runs of codes occur{after}",
            text=(
                "The most frequent on the left; a flat line is an even use. Runs are neighbours in raster order inside "
                "one frame. The legends say how many different ones there are, of how many in all.",
            ),
            plots=tuple(rank_frequency(part, grams.n) for grams in part.inspected[0].codes.ngrams),
            plots_in_row=3,
        ),
        Section(
            title=f"Where on the frame{after}",
            text=(
                f"How varied the codes at each cell are over the frames. {part.accounts.frames:,} frames can't show "
                f"more than log2({part.accounts.frames:,}) = {most} bits, so compare maps of equally many frames.",
                "Repeats are codes that equal the code at the same cell one frame before."
                if any(each.codes.repeats is not None for each in part.inspected)
                else "No item has a second frame, so there are no repeats between frames.",
            ),
            plots=tuple(cell_maps(part)),
        ),
    ]


def _picture_text(part: Part) -> tuple[str, ...]:
    if part.originals is None:
        return ("Decoded from the store's codes.",)
    return (
        "Above the originals, in the middle what the codes give back, below the absolute error (mean over R, G and B) "
        f"times {ERROR_FACTOR}: black is none, the brightest yellow {255 // ERROR_FACTOR} levels of 255 or more.",
    )


def _pictures(part: Part, folder: Path) -> tuple[tuple[Path, str], ...]:
    scale = max(1, SHEET_SIDE // max(part.size))
    pictures = []
    for number, each in enumerate(part.inspected):
        rows = [each.shown]
        if part.originals is not None:
            rows = [part.originals, each.shown, error_maps(part.originals, each.shown)]
        path = folder / f"{number}.png"
        write_image(path, comparison_sheet(*rows, scale=scale))
        grid = " x ".join(str(side) for side in each.codes.grid)
        pictures.append((path, f"{each.tokenizer}: {grid} codes a frame, of {each.codes.vocab_size:,}"))
    return tuple(pictures)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _range(values: Map) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))
