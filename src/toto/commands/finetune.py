"""`toto finetune RECIPE --checkpoint C --data TRAIN --test TEST --out RUN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from toto.commands.parsing import options_with, parse, take_word
from toto.commands.printing import classes_line
from toto.commands.sides import training_and_test
from toto.evaluation.finetune import CLASSIFIER, RESULT, finetune
from toto.evaluation.finetune_config import FinetuneConfig
from toto.evaluation.labelled import LabelledClips
from toto.evaluation.overlap import require_apart
from toto.evaluation.result import Metric, Result
from toto.media.ledger import LedgerRow, summary, unused
from toto.recipes import RECOGNITION
from toto.runtime.device import pick_device
from toto.runtime.places import AnyPath
from toto.runtime.ranks import joined_ranks
from toto.tokens.tokenizer import EMBEDDED, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune a checkpoint on labelled files and test it; `--resume` continues a run.

    Attributes:
        checkpoint: a checkpoint or run folder, or a hub id.
        data: labelled videos or images, in any form that `toto tokenize` reads.
        out: the run's folder; OUT/classifier is for `toto predict`, OUT/result.json is the record.
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
        allow_overlap: test also on items that hold the same bytes or show the same pixels as a training item; else they
            are refused.
        limit: train on so many items of each class at most, and test on so many; None takes all.
        tokenizer: "embedded", or a tokenizer folder; a model with patch inputs needs none.
        resume: continue the run in OUT from its newest checkpoint, exactly.
    """

    checkpoint: str
    data: str
    out: Path
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
    allow_overlap: bool = False
    limit: int | None = None
    tokenizer: str = EMBEDDED
    resume: bool = False


def run(words: list[str]) -> None:
    """Parse, fine-tune, test, and print the layers' accuracies."""
    name, rest = take_word(words, verb="finetune", what="RECIPE", known=list(RECOGNITION))
    options = parse(options_with(Options, RECOGNITION[name]()), rest, verb=f"finetune {name}")
    recipe: FinetuneConfig = vars(options)["recipe"]
    with joined_ranks(device=recipe.device, timeout=recipe.timeout) as ranks:
        train, test = labelled(options, recipe)
        result = finetune(
            recipe,
            options.out,
            checkpoint=options.checkpoint,
            tokenizer=load_tokenizer(options.tokenizer, device=pick_device(ranks.device(recipe.device))),
            train=train,
            test=test,
            resume=options.resume,
        )
    if ranks.first:
        print_result(result, options.out)


def labelled(options: Options, recipe: FinetuneConfig) -> tuple[LabelledClips, LabelledClips]:
    """Training and test items.

    Raises:
        ConfigError: no split to test on, media of another kind there, or test items that are training items.
    """
    frames, stride = recipe.frames or 1, recipe.stride or 1  # the frames are chosen later
    train, test = training_and_test(options, frames=frames, stride=stride, seed=recipe.seed)
    if options.limit is not None:
        train, test = train.first_of_each(options.limit), test.first_of_each(options.limit)
    if not options.allow_overlap:
        require_apart(train, test)
    return train, test


def print_result(result: Result, out: Path) -> None:
    """Accuracy by layer with intervals, and what it is over."""
    table = Table(title=f"{result.protocol['mode']}: accuracy on {result.protocol['test']}, 95 % bootstrap intervals")
    for heading in ("layer", "held back", "top-1", "top-5"):
        table.add_column(heading, justify="right")
    for row in result.details["by_layer"]:
        mark = " *" if row["layer"] == result.protocol["layer"] else "  "
        held = "-" if row["validation"] is None else f"{100 * row['validation']:.1f}"
        table.add_row(str(row["layer"]), held, _cell(Metric(**row["top1"])) + mark, _cell(Metric(**row["top5"])))
    Console().print(table)
    chance, largest = result.metrics["chance"].value, result.details["largest_class"]
    print(f"* chosen on {result.protocol['held_back']} held-back training items; chance {100 * chance:.1f}, ", end="")
    print(f"largest class {100 * largest:.1f}")
    print(classes_line(result.protocol["classes"]))
    views = result.protocol["views"]
    print(
        f"{views['clips']} x {views['crops']} views of {result.evaluated:,} decoded of {result.offered:,} offered "
        f"({result.failed:,} failed, {result.skipped:,} left out)"
    )
    for part, counts in result.ledger.items():
        print(f"{part}: {summary(counts, out / RESULT)}")
    rows = [LedgerRow(**row) for row in result.details["failures"]]
    print("\n".join(unused(rows, rest_in=out / RESULT)), end="\n" if rows else "")
    print(f"{out / CLASSIFIER}: try `toto predict --checkpoint {out} FILES`")


def _cell(metric: Metric) -> str:
    assert metric.low is not None
    assert metric.high is not None
    return f"{100 * metric.value:.1f} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"
