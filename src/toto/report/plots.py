"""Plots of result records and metrics, as SVG that a page can hold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toto.evaluation.result import Result
from toto.runtime.files import written_aside

INK, FAINT = "#1d2733", "#c9d1da"
MODEL, UNIGRAM, COPY = "#1f6fd1", "#8b95a1", "#e0752d"
PLOTTED = (".svg", ".png")
POOL_COLOURS = {"average": "#3a9d7c", "attention": "#7a4fc4"}


def loss_curve(rows: Sequence[dict[str, float]], bits: Result) -> str:
    """Held-out bits of later frames while training, beside the two baselines."""
    name = "heldout/video_bits_later_frames"
    points = [(row["step"], row[name]) for row in rows if name in row]
    train = [(row["step"], row["train/loss"] / 0.6931471805599453) for row in rows if "train/loss" in row]
    figure, axes = new_figure("Training: bits per token", "step", "bits")
    axes.plot(*zip(*smoothed(train), strict=True), color=FAINT, linewidth=1.2, label="training loss, all tokens")
    axes.plot(*zip(*points, strict=True), color=MODEL, marker="o", markersize=3, label="model, held-out, later frames")
    for label, colour in (("unigram", UNIGRAM), ("copy", COPY)):
        level = bits.metrics[f"{label}_bits_later_frames"].value
        axes.axhline(level, color=colour, linestyle="--", linewidth=1.2, label=f"{label}, held-out: {level:.2f}")
    add_legend(axes)
    return as_svg(figure)


def bits_by_frame(bits: Result) -> str:
    """Held-out bits by the frame's place in the sequence."""
    figure, axes = new_figure("Held-out bits per token by frame", "frame", "bits")
    for name, colour in (("unigram", UNIGRAM), ("copy", COPY), ("model", MODEL)):
        values = bits.details[f"{name}_by_frame"]
        axes.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=3, label=name)
    axes.set_ylim(bottom=0)
    add_legend(axes)
    return as_svg(figure)


def probe_by_layer(probe: Result, title: str) -> str:
    """Probe accuracy by layer with intervals, the chosen layers marked, and the chance level (Figure 4)."""
    return as_svg(probe_figure(probe, title))


def write_probe_plot(path: Path, probe: Result) -> None:
    """The same as a file, SVG or PNG by its ending."""
    figure = probe_figure(probe, f"Probes of {probe.protocol['backbone']}")
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=200, facecolor="white")


def probe_figure(probe: Result, title: str) -> Figure:
    """The figure of `probe_by_layer`."""
    figure, axes = new_figure(title, "layer (0: embedding)", "test accuracy, %")
    for pool, chosen in probe.details["chosen_layer"].items():
        colour = POOL_COLOURS[pool]
        rows = sorted((row for row in probe.details["by_layer"] if row["pool"] == pool), key=lambda row: row["layer"])
        layers = [row["layer"] for row in rows]
        low, high = ([100 * row[end] for row in rows] for end in ("low", "high"))
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
        tests = [100 * row["test"] for row in rows]
        axes.plot(layers, tests, color=colour, marker="o", markersize=4, label=f"{pool} pool")
        best = tests[layers.index(chosen)]
        axes.plot(chosen, best, marker="o", markersize=10, mfc="none", color=colour)
    chance = 100 * probe.metrics["chance"].value
    axes.axhline(chance, color=UNIGRAM, linestyle="--", linewidth=1.2, label=f"chance: {chance:.1f}")
    largest = 100 * probe.details["largest_class"]
    if largest > chance + 1:
        axes.axhline(largest, color=UNIGRAM, linestyle=":", linewidth=1.2, label=f"largest class: {largest:.1f}")
    axes.set_ylim(0, 100)
    axes.set_xticks(sorted({row["layer"] for row in probe.details["by_layer"]}))
    add_legend(axes)
    return figure


def new_figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A small figure in the style of all plots, with its axes."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    style(axes, title, x, y)
    return figure, axes


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes the style of all plots."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def add_legend(axes: Axes) -> None:
    """A legend that hides no line."""
    axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.85)


def smoothed(points: list[tuple[float, float]], most: int = 80) -> list[tuple[float, float]]:
    """Means over runs of neighbouring points, so that at most `most` are drawn."""
    width = max(1, len(points) // most)
    groups = [points[first : first + width] for first in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def as_svg(figure: Figure) -> str:
    """The figure as text that a page can hold."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
