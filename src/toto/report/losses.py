"""The losses of a run by source, by modality and by place in the sequence: a table, a record, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toto.report.plots import FAINT, add_legend, smoothed, style
from toto.runtime.errors import ConfigError
from toto.runtime.files import write_json, writing
from toto.runtime.metrics import read_metrics, read_positions

RECORD, PICTURE = "losses.json", "losses.png"
SOURCE, MODALITY, TOKENS = "train/loss/source/", "train/loss/modality/", "train/tokens/source/"
COLOURS = ("#1f6fd1", "#e0752d", "#3a9d7c", "#7a4fc4", "#c4417a", "#8b95a1")
ROWS_OF_POSITIONS = 5  # drawn, from the first to the last


@dataclass(frozen=True, kw_only=True)
class LossLine:
    """The loss of a source, of a modality or of everything; each number is a mean over the steps of a row of metrics.

    Attributes:
        kind: "source", "modality" or "all".
        name: of the source or modality.
        first: of the first row that has it.
        last: of the last one.
        best: the lowest.
        best_step: where that is.
        tokens: predictions in training; None for modalities.
        share: of all predictions.
        last_bits: `last` in bits per token, where codes are predicted.
    """

    kind: str
    name: str
    first: float
    last: float
    best: float
    best_step: int
    tokens: int | None = None
    share: float | None = None
    last_bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a run's metrics say about its losses.

    Attributes:
        unit: "nats" per code, or "squared error" of normalised pixels.
        steps: of the last row.
        lines: everything, then modalities, then sources.
        positions: rows of losses by frame: "step", and a list for each modality, the end token last.
    """

    unit: str
    steps: int
    lines: tuple[LossLine, ...]
    positions: tuple[dict[str, Any], ...]


def read_losses(run: Path) -> Losses:
    """The losses of a run, from its metrics.

    Raises:
        ConfigError: there are none.
    """
    rows = [row for row in read_metrics(run) if "train/loss" in row]
    if not rows:
        raise ConfigError("holds no losses", where=run, fix="give a run of `toto train`")
    codes = "train/bits_per_token" in rows[-1]
    names = list(dict.fromkeys(name for row in rows for name in row))
    seen = {name.removeprefix(TOKENS): rows[-1].get(name, 0.0) for name in names if name.startswith(TOKENS)}
    lines = [_line(rows, "all", "all", "train/loss", codes)]
    for kind, prefix in (("modality", MODALITY), ("source", SOURCE)):
        lines += [
            _line(rows, kind, name.removeprefix(prefix), name, codes, seen if kind == "source" else {})
            for name in names
            if name.startswith(prefix)
        ]
    return Losses(
        unit="nats" if codes else "squared error",
        steps=int(rows[-1]["step"]),
        lines=tuple(lines),
        positions=tuple(read_positions(run)),
    )


def _line(
    rows: Sequence[dict[str, float]], kind: str, name: str, key: str, codes: bool, seen: dict[str, float] | None = None
) -> LossLine:
    points = _points(rows, key)
    best_step, best = min(points, key=lambda point: point[1])
    tokens = (seen or {}).get(name)
    last = points[-1][1]
    return LossLine(
        kind=kind,
        name=name,
        first=points[0][1],
        last=last,
        best=best,
        best_step=int(best_step),
        tokens=None if tokens is None else int(tokens),
        share=None if tokens is None else tokens / sum((seen or {}).values()),
        last_bits=last / math.log(2) if codes else None,
    )


def loss_lines(losses: Losses) -> list[str]:
    """The table as lines of text: a line for everything, each modality and each source, and one of frames."""
    head = ["loss", "first", "last", "best", "at step", *(["bits"] if losses.unit == "nats" else []), "tokens", "share"]
    cells = [head]
    for line in losses.lines:
        bits = [] if line.last_bits is None else [f"{line.last_bits:.3f}"]
        tokens = "" if line.tokens is None else f"{line.tokens:,}"
        share = "" if line.share is None else f"{100 * line.share:.1f} %"
        values = [f"{value:.3f}" for value in (line.first, line.last, line.best)]
        name = line.name if line.kind == "all" else f"{line.kind} {line.name}"
        cells.append([name, *values, str(line.best_step), *bits, tokens, share])
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    text = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in ([*zip(row, widths, strict=True)] for row in cells)
    ]
    return [line.rstrip() for line in text] + _lines_of_positions(losses)


def _lines_of_positions(losses: Losses) -> list[str]:
    """The last row of losses by frame."""
    if not losses.positions:
        return []
    last = losses.positions[-1]
    lines = []
    for modality, values in last.items():
        if modality != "step":
            frames = " ".join("-" if value is None else f"{value:.2f}" for value in values[:-1])
            end = "" if values[-1] is None else f", end {values[-1]:.2f}"
            lines.append(f"{losses.unit} by frame of {modality} sequences: {frames}{end}")
    return lines


def write_losses(run: Path) -> Losses:
    """Read a run's losses and write `losses.json` and `losses.png` into its folder.

    Raises:
        ConfigError: there are none.
    """
    losses = read_losses(run)
    write_json(run / RECORD, asdict(losses))
    with writing(run / PICTURE):
        _picture(losses, read_metrics(run)).savefig(run / PICTURE, dpi=150, metadata={"Software": None})
    return losses


def _picture(losses: Losses, rows: Sequence[dict[str, float]]) -> Figure:
    """Loss by source while training, and loss by frame, a panel for each modality."""
    modalities = list(dict.fromkeys(name for row in losses.positions for name in row if name != "step"))
    panels = 1 + len(modalities)
    figure = Figure(figsize=(5.2 * panels, 3.6), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    _draw_curves(first, losses, rows)
    for axes, modality in zip(others, modalities, strict=True):
        _draw_positions(axes, losses, modality)
    return figure


def _draw_curves(axes: Axes, losses: Losses, rows: Sequence[dict[str, float]]) -> None:
    style(axes, "Training loss by source", "step", losses.unit)
    axes.plot(*zip(*_points(rows, "train/loss"), strict=True), color=FAINT, linewidth=0.8, label="all, as logged")
    sources = [line for line in losses.lines if line.kind == "source"]
    for number, line in enumerate(sources):
        points = _points(rows, f"{SOURCE}{line.name}")
        colour = COLOURS[number % len(COLOURS)]
        label = f"{line.name}: {line.last:.2f}"
        axes.plot(*zip(*smoothed(points), strict=True), color=colour, linewidth=1.4, label=label)
    add_legend(axes)


def _draw_positions(axes: Axes, losses: Losses, modality: str) -> None:
    style(axes, f"Loss by frame, {modality} sequences", "frame", losses.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mine = [row for row in losses.positions if modality in row]
    chosen = sorted({round(n * (len(mine) - 1) / max(1, ROWS_OF_POSITIONS - 1)) for n in range(ROWS_OF_POSITIONS)})
    for rank, number in enumerate(chosen):
        values = mine[number][modality][:-1]
        points = [(frame, value) for frame, value in enumerate(values, start=1) if value is not None]
        if points:
            colour = colormaps["viridis"](0.85 * (1 - rank / max(1, len(chosen) - 1)))
            label = f"to step {mine[number]['step']:,}"
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
    add_legend(axes)


def _points(rows: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a value."""
    return [(row["step"], row[name]) for row in rows if name in row]
