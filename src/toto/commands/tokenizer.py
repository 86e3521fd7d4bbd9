"""`toto tokenizer train RECIPE --out FOLDER` and `toto tokenizer inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from toto.commands.parsing import parse, take_word
from toto.media import sample
from toto.media.catalog import list_source
from toto.media.decode import read_media
from toto.media.ledger import LedgerRow, count_by_status, summary
from toto.media.transforms import square
from toto.recipes import TOKENIZERS
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.files import write_json
from toto.runtime.progress import Progress
from toto.runtime.provenance import as_plain
from toto.tokens.quality import ReconstructionReport, reconstruction_report
from toto.tokens.tokenizer import EMBEDDED, Tokenizer, load_tokenizer
from toto.training.tokenizer import train_tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a tokenizer by a recipe; the same command with --resume continues it.

    Attributes:
        out: the tokenizer's folder.
        resume: continue the run in OUT, exactly.
        device: auto, cpu, cuda, ...
    """

    out: Path
    resume: bool = False
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """PSNR and code use of a tokenizer, on held-out frames of the embedded sample or on your own media.

    Attributes:
        tokenizer: "embedded", or a tokenizer folder.
        data: a folder of images and videos; without it the held-out scenes and photographs of the sample.
        size: the shortest side becomes this, then a square of it is cut out.
        stride: every stride-th frame of a video is looked at.
        out: write the figures to this JSON file.
        device: auto, cpu, cuda, ...
    """

    tokenizer: str = EMBEDDED
    data: Path | None = None
    size: int = 128
    stride: int = 6
    out: Path | None = None
    device: str = "auto"


def run(words: list[str]) -> None:
    """Train or inspect."""
    task, rest = take_word(words, verb="tokenizer", what="TASK", known=["train", "inspect"])
    if task == "train":
        name, rest = take_word(rest, verb="tokenizer train", what="RECIPE", known=list(TOKENIZERS))
        options = parse(TrainOptions, rest, verb=f"tokenizer train {name}")
        train_tokenizer(TOKENIZERS[name](), out=options.out, resume=options.resume, device=options.device)
        return
    asked = parse(InspectOptions, rest, verb="tokenizer inspect")
    tokenizer = load_tokenizer(asked.tokenizer, device=pick_device(asked.device))
    reports = inspect(tokenizer, asked)
    print_reports(reports, tokenizer.vocab_size)
    if asked.out:
        write_json(asked.out, as_plain(reports))


def inspect(tokenizer: Tokenizer, options: InspectOptions) -> dict[str, ReconstructionReport]:
    """Reports by source; what can't be read is printed with the reason and counted."""
    tokenizer.grid(options.size, options.size)
    if options.data is None:
        parts = {"held-out scenes": sample.scenes("heldout"), "held-out photographs": sample.photographs("heldout")}
    else:
        parts = {str(options.data): [item.path for item in list_source(options.data).items]}
    return {name: _report(name, tokenizer, paths, options) for name, paths in parts.items()}


def _report(name: str, tokenizer: Tokenizer, paths: list[Path], options: InspectOptions) -> ReconstructionReport:
    rows: list[LedgerRow] = []

    def frames() -> Iterator[Tensor]:
        with Progress(f"inspecting {name}", total=len(paths), unit="items") as progress:
            for path in paths:
                try:
                    clip = read_media(path, stride=options.stride)
                    rows.append(LedgerRow(id=str(path), kind="", status="ok", frames=len(clip)))
                    yield square(clip.frames, options.size)
                except MediaError as error:
                    rows.append(LedgerRow(id=str(path), kind="", status=error.status, reason=error.what))
                progress.advance()

    try:
        report = reconstruction_report(tokenizer, frames())
    except MediaError:
        first = next((row.reason for row in rows), "there are none")
        raise ConfigError(f"nothing could be read (the first: {first})", where=name) from None
    print(f"{name}: {summary(count_by_status(rows))}")
    for row in rows:
        if row.status != "ok":
            print(f"  {row.status:<10}{row.id}: {row.reason}")
    return report


def print_reports(reports: dict[str, ReconstructionReport], vocabulary: int) -> None:
    """The reports as a table."""
    table = Table(title="Reconstruction: mean of each frame's PSNR, and use of the codes")
    for name in ("", "frames", "PSNR, dB", f"codes used of {vocabulary:,}", "perplexity"):
        table.add_column(name, justify="right")
    for name, report in reports.items():
        used = f"{report.codes_used:,} ({report.share_used:.0%})"
        table.add_row(name, f"{report.frames:,}", f"{report.psnr_db:.2f}", used, f"{report.perplexity:,.0f}")
    Console().print(table)
