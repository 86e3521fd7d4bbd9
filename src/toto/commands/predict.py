"""`toto predict --checkpoint CLASSIFIER FILES...`: what is seen in images or videos, by the classes' names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from toto.commands.parsing import parse
from toto.evaluation.classifier import classifier_sha256, load_classifier
from toto.evaluation.recognition import Predictor
from toto.media.catalogs import open_source, takes_column
from toto.media.ledger import LedgerRow, count_by_status, summary, unused
from toto.runtime.device import Precision, pick_device
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.files import write_json
from toto.runtime.provenance import versions
from toto.tokens.tokenizer import EMBEDDED, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Name what files show, by a classifier that `toto finetune` made.

    Attributes:
        files: images, videos, or folders of them, or any other source that `toto tokenize` reads.
        checkpoint: a run of `toto finetune`, or its classifier folder.
        image_column: of parquet files, the column with the bytes of images or videos; by default one with a usual name.
        tokenizer: "embedded", or a tokenizer folder; a model with patch inputs needs none.
        clips: of a video, spread over it; by default those the classifier was tested with.
        crops: 1 or 3; likewise.
        top: so many classes are named.
        out: write all of it to this JSON file, with every class's probability.
        batch: views in one pass.
        precision: auto, bf16 or fp32.
        device: auto, cpu, cuda, ...
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    checkpoint: str
    image_column: str | None = None
    tokenizer: str = EMBEDDED
    clips: int | None = None
    crops: Literal[1, 3] | None = None
    top: int = 5
    out: Path | None = None
    batch: int = 16
    precision: Precision = "auto"
    device: str = "auto"


def run(words: list[str]) -> bool:
    """Parse, look at each file, print what it shows; returns whether nothing could be read."""
    options = parse(Options, words, verb="predict")
    if not options.files:
        raise ConfigError("no files are given", where="toto predict", fix="name images, videos or folders")
    for name in ("top", "batch"):
        if getattr(options, name) < 1:
            raise ConfigError(f"must be at least 1, is {getattr(options, name)}", where=f"--{name}")
    device = pick_device(options.device)
    loaded = load_classifier(options.checkpoint, device=device)
    views = loaded.card.views
    views = replace(views, clips=options.clips or views.clips, crops=options.crops or views.crops)
    see = Predictor(
        loaded,
        load_tokenizer(options.tokenizer, device=device),
        views=views,
        batch=options.batch,
        precision=options.precision,
    )
    rows: list[LedgerRow] = []
    found = []
    for source in options.files:
        try:
            column = options.image_column if takes_column(source, "image_column") else None
            catalog = open_source(source, image_column=column)
        except ConfigError as error:
            rows.append(LedgerRow(id=source, kind="", status="corrupt", reason=error.what))
            continue
        rows += catalog.skipped
        for item in catalog.items:
            name = str(item.path) if item.part is None else item.id
            try:
                probabilities = see(item)
            except MediaError as error:
                rows.append(LedgerRow(id=name, kind=item.kind, status=error.status, reason=error.what))
                continue
            rows.append(LedgerRow(id=name, kind=item.kind, status="ok"))
            found.append({"file": name, "classes": dict(zip(loaded.card.classes, probabilities.tolist(), strict=True))})
            values, places = probabilities.topk(min(options.top, len(probabilities)))
            said = [
                f"{100 * value:5.1f} %  {loaded.card.classes[place]}"
                for value, place in zip(values, places, strict=True)
            ]
            print("\n  ".join([name, *said]))
    counts = count_by_status(rows)
    views_seen = f"{views.name} views, " if loaded.card.modality == "video" else ""
    print(f"layer {loaded.card.speaker}, {views_seen}{summary(counts, options.out)}")
    if lines := unused(rows, rest_in=options.out):
        print("\n".join(lines))
    if options.out:
        write_json(
            options.out,
            {
                "checkpoint": options.checkpoint,
                "model_sha256": classifier_sha256(loaded.folder),
                "layer": loaded.card.speaker,
                "views": {"clips": views.clips, "crops": views.crops},
                "predictions": found,
                "ledger": counts,
                "failures": [vars(row) for row in rows if row.status != "ok"],
                "versions": versions(),
            },
        )
    return not found
