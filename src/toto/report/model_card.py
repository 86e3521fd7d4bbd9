"""The model card (`README.md`) of an exported model: tokens, data, recipe, results, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from toto.evaluation.result import Metric, Result
from toto.model.architectures import described
from toto.model.config import BackboneConfig
from toto.model.weights import Card
from toto.runtime.errors import ConfigError, TotoError
from toto.runtime.files import read_json
from toto.runtime.network import URL
from toto.runtime.places import as_path, sha256_at
from toto.runtime.provenance import RECORD, versions
from toto.tokens.shards import LEDGER, MANIFEST

PAPER: Final = "https://arxiv.org/abs/2501.05453"
Form = Literal["hf", "toto"]

NOT_SHOWN = ("data", "ancestors", "watch", "guard")  # what is shown otherwise, or is there to go on from


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """What is known about a store that a model was trained on.

    Attributes:
        manifest: SHA-256 of its manifest, which holds the checksums of all its files.
        name: of its folder; None where the run's record is not at hand.
        ledger: SHA-256 of its ledger, where the store is still where it was and still the same.
        counts: how many inputs ended with each status, likewise.
    """

    manifest: str
    name: str | None = None
    ledger: str | None = None
    counts: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a model card tells.

    Attributes:
        name: of the model: its name on the hub, or its folder's.
        form: which files lie beside the card.
        config: the architecture.
        card: tokens, sequences, training.
        data: what it was trained on.
        recipe: the run's record (command, versions, configuration); None where it is not at hand.
        results: of evaluations.
        sha256: of the weights that were evaluated.
        dtype: of the stored weights.
        licence: as the hub writes it ("apache-2.0").
    """

    name: str
    form: Form
    config: BackboneConfig
    card: Card
    data: tuple[DataSource, ...] = ()
    recipe: dict[str, Any] | None = None
    results: tuple[Result, ...] = ()
    sha256: str
    dtype: str
    licence: str | None = None


def recipe_of(checkpoint: Path) -> dict[str, Any] | None:
    """The record of the run that a checkpoint lies in, with folders by their names alone; None without a run.

    >>> recipe_of(Path("nowhere/checkpoints/step-00000001")) is None
    True
    """
    path = checkpoint.resolve().parent.parent / RECORD
    if checkpoint.resolve().parent.name != "checkpoints" or not path.exists():
        return None
    record = read_json(path, what="record of the run")
    return {"versions": record["versions"], "started": record["started"], "config": _anonymous(record["config"])}


def data_of(checkpoint: Path, card: Card) -> tuple[DataSource, ...]:
    """The stores that a checkpoint was trained on, as far as they are at hand."""
    hashes = card.training.get("data", [])
    path = checkpoint.resolve().parent.parent / RECORD
    sources = read_json(path, what="record of the run")["config"]["data"]["sources"] if path.exists() else []
    if len(sources) != len(hashes):
        return tuple(DataSource(manifest=each) for each in hashes)
    return tuple(_source(each, plain["path"]) for each, plain in zip(hashes, sources, strict=True))


def require_of_model(results: Sequence[tuple[Path, Result]], sha256: str) -> None:
    """Refuse results of other weights."""
    for path, result in results:
        if result.model_sha256 != sha256:
            raise ConfigError(
                f"is of other weights ({result.model_sha256[:12]}, not {sha256[:12]})",
                where=path,
                fix="evaluate the checkpoint that is exported",
            )


def model_card(facts: ModelFacts) -> str:
    """The card as Markdown, with the header that the hub reads."""
    parts = [_header(facts), f"# {facts.name}\n", _what(facts), _loading(facts), _tokens(facts)]
    return "\n".join([*parts, _training(facts), _results(facts), _made_by(facts)])


def _header(facts: ModelFacts) -> str:
    library = "transformers" if facts.form == "hf" else "toto"
    lines = ["---", f"library_name: {library}", *([f"license: {facts.licence}"] if facts.licence else [])]
    return "\n".join([*lines, "tags:", "- toto", "- video", "- autoregressive", "---\n"])


def _what(facts: ModelFacts) -> str:
    rows = [(name, value) for name, value in described(facts.config).items() if value is not None]
    said = (
        f"A causal model that learnt to continue videos, token by token ([paper]({PAPER})); weights in {facts.dtype}."
    )
    return f"{said}\n\n## Architecture\n\n{_table(('', ''), rows)}\n"


def _loading(facts: ModelFacts) -> str:
    toto = f'import toto\n\nmodel = toto.load_model("{facts.name}")  # a folder, or a name on the hub'
    if facts.form == "toto":
        return f"## Loading\n\n```python\n{toto}\n```\n"
    sequence = facts.card.sequence
    codes = sequence["rows"] * sequence["cols"]
    return (
        f"## Loading\n\n```python\n{toto}\n```\n\n"
        "or, as the Llama it also is,\n\n"
        "```python\nimport torch\nfrom transformers import LlamaForCausalLM\n\n"
        f'llama = LlamaForCausalLM.from_pretrained("{facts.name}")\n'
        f"sequence = llama.generate(torch.tensor([[1]]), max_new_tokens={codes})  # the codes + 4 of one frame\n```\n\n"
        "There is no text tokenizer: ids come from a tokenizer of frames (below). Ids of a sequence: 0 pad, 1 start of "
        "a video, 2 end, 3 start of images; a code enters at code + 4, frame by frame, in raster order. "
        f"A frame has {codes} codes. `generation_config.json` never draws ids 0 to 3.\n"
    )


def _tokens(facts: ModelFacts) -> str:
    sequence = facts.card.sequence
    rows = [(name, value) for name, value in facts.card.passport.items() if value is not None]
    rows += [(f"sequence: {name}", value) for name, value in sequence.items()]
    return f"## Tokens\n\n{_table(('', ''), rows)}\n"


def _training(facts: ModelFacts) -> str:
    training = facts.card.training
    rows = [(name, value) for name, value in training.items() if name not in NOT_SHOWN]
    before = [
        f"{each['name']} (step {each['step']:,}, weights {each['weights_sha256'][:12]})" for each in _before(training)
    ]
    rows += [("began with the weights of", ", which began with ".join(reversed(before)))] if before else []
    parts = ["## Training\n", _table(("", ""), rows) if rows else "Not recorded."]
    if facts.data:
        cells = [
            (each.name or "-", each.manifest, each.ledger or "not at hand", _counts(each.counts)) for each in facts.data
        ]
        parts.append("\nData, by the SHA-256 of each store's manifest (which covers all its files) and ledger:\n")
        parts.append(_table(("store", "manifest", "ledger", "inputs"), cells))
    if facts.recipe is None:
        return "\n".join([*parts, "\nThe recipe is not at hand.\n"])
    text = json.dumps(facts.recipe, indent=2)
    return "\n".join([*parts, f"\nRecipe:\n\n```json\n{text}\n```\n"])


def _before(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The models whose weights this one began with, the oldest first."""
    return list(training.get("ancestors", []))


def _results(facts: ModelFacts) -> str:
    if not facts.results:
        return "## Results\n\nNone recorded.\n"
    rows = [
        (result.task, name, _interval(metric), f"{result.evaluated:,} of {result.offered:,}")
        for result in facts.results
        for name, metric in result.metrics.items()
    ]
    table = _table(("task", "metric", "value [95 % interval]", "evaluated"), rows)
    return f"## Results\n\nOf the weights with SHA-256 `{facts.sha256}`.\n\n{table}\n"


def _made_by(facts: ModelFacts) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"## Made by\n\n`toto export` ({listed}), from weights with SHA-256 `{facts.sha256}`.\n"


def _source(manifest: str, path: str) -> DataSource:
    """A store of the run, with its ledger where it is still the one that was read."""
    folder = as_path(path)
    try:
        if sha256_at(folder / MANIFEST) != manifest:
            return DataSource(manifest=manifest, name=folder.name)
        plain = read_json(folder / MANIFEST, what="shard manifest")
    except (OSError, TotoError):
        return DataSource(manifest=manifest, name=folder.name)
    return DataSource(
        manifest=manifest, name=folder.name, ledger=plain["tables"].get(LEDGER), counts=plain.get("ledger")
    )


def _anonymous(value: Any) -> Any:
    """A configuration without the folders of the machine it ran on: of absolute places, the last name is kept."""
    if isinstance(value, dict):
        return {name: _anonymous(item) for name, item in value.items()}
    if isinstance(value, str) and (Path(value).is_absolute() or URL.fullmatch(value)):
        return as_path(value).name
    return [_anonymous(item) for item in value] if isinstance(value, list) else value


def _interval(metric: Metric) -> str:
    between = "" if metric.low is None or metric.high is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
    return f"{metric.value:.4g}{between}"


def _counts(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in counts.items()) if counts else "-"


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join([f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *(f"| {row} |" for row in cells)])
