"""A new run from another one's weights: at another resolution, length, base of positions, schedule or mixture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toto.model.architectures import described
from toto.model.causal import CausalModel
from toto.model.weights import Card, checkpoint_folder, load_card, load_model, weights_sha256
from toto.runtime.errors import ConfigError
from toto.runtime.files import read_json, write_json
from toto.runtime.places import sha256_at
from toto.tokens.passport import Passport
from toto.tokens.sequence import sequence_length
from toto.tokens.shards import MANIFEST
from toto.training.config import TrainConfig
from toto.training.mixture import Mixture
from toto.training.record import differences

CONTINUED = "continued.json"  # of a run that began with another one's weights
MAY_CHANGE = ("rope_base", "scan")  # of the architecture: what the weights don't depend on


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a run has from the one it began with, and what is its own.

    Attributes:
        ancestors: the models before it, the oldest first: name, SHA-256 of its weights, steps and tokens of its run.
        kept: what is taken over.
        changed: what is other than it was.
        new: what begins anew.
    """

    ancestors: tuple[dict[str, Any], ...]
    kept: tuple[str, ...]
    changed: tuple[str, ...]
    new: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        last = self.ancestors[-1]
        yield f"from {last['name']} (step {last['step']:,}, {tokens_in_words(last['tokens'])} tokens):"
        yield f"  kept: {'; '.join(self.kept)}"
        yield f"  changed: {'; '.join(self.changed) or 'nothing'}"
        yield f"  new: {'; '.join(self.new)}"


def start_from(config: TrainConfig, model: CausalModel, mixture: Mixture) -> Continued:
    """Load the weights that `config.init` names into a new model; returns what is kept, changed and new.

    Sequences may be of another form (frames of another size, more or fewer of them), positions may turn by another
    base. All else of the architecture has to be the same, and so has the tokenizer.

    Raises:
        PassportError: another tokenizer made its tokens.
        ConfigError: it is of another architecture.
    """
    assert config.init is not None
    name = config.init
    card = load_card(name)
    known = Passport.from_dict(card.passport, where=name)
    mixture.passport.require_tokenizer(known, where=name, fix="start from a model of the same tokenizer")
    other = load_model(name)
    before, now = described(other.config), described(model.config)
    if before["kind"] != now["kind"]:
        before, now = {"kind": before["kind"]}, {"kind": now["kind"]}
    different = differences(
        {field: value for field, value in before.items() if field not in MAY_CHANGE},
        {field: value for field, value in now.items() if field not in MAY_CHANGE},
    )
    if different:
        raise ConfigError(f"is of another architecture ({'; '.join(different)})", where=name, fix="use the same")
    model.load_state_dict(other.state_dict())
    itself = {
        "name": name,
        "checkpoint": checkpoint_folder(name).name,
        "weights_sha256": weights_sha256(name),
        "step": card.training.get("step", 0),
        "tokens": card.training.get("tokens", 0),
    }
    weights = sum(weight.numel() for weight in model.parameters())
    return Continued(
        ancestors=(*card.training.get("ancestors", ()), itself),
        kept=(
            f"{weights / 1e6:.1f} M weights",
            f"{known.vocab_size:,} codes of tokenizer {known.kind} ({known.weights_sha256[:12]})",
        ),
        changed=tuple(_changed(before, now, card.sequence, mixture)),
        new=tuple(_new(config, card, mixture)),
    )


def write_continued(continued: Continued | None, run: Path) -> None:
    """Leave it in the run's folder as `continued.json`; one of a run that began there otherwise is removed."""
    if continued is None:
        (run / CONTINUED).unlink(missing_ok=True)
    else:
        write_json(run / CONTINUED, asdict(continued))


def ancestors_of(run: Path) -> dict[str, Any]:
    """What a checkpoint's card says of the models before it: `ancestors`, where the run began with another's weights.

    Raises:
        StoreError: the run's note of it is damaged.
    """
    if not (run / CONTINUED).exists():
        return {}
    return {"ancestors": read_json(run / CONTINUED, what="note of what the run began with")["ancestors"]}


def tokens_in_words(tokens: int) -> str:
    """A number of tokens for people.

    >>> tokens_in_words(52_000_000_000)
    '52 B'
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:,}"


def _changed(before: dict[str, Any], now: dict[str, Any], was: dict[str, int], mixture: Mixture) -> Iterator[str]:
    """What is other than it was, each as `name before -> now`."""
    for field in MAY_CHANGE:
        if before.get(field) != now.get(field):
            yield f"{field} {_plain(before.get(field))} -> {_plain(now.get(field))}"
    rows, cols = mixture.grid
    if (was["rows"], was["cols"]) != (rows, cols):
        yield f"frames of {was['rows']} x {was['cols']} -> {rows} x {cols} codes"
    if was["frames"] != mixture.frames:
        yield f"{was['frames']} -> {mixture.frames} frames"
    lengths = sequence_length(was["frames"], was["rows"], was["cols"]), sequence_length(mixture.frames, rows, cols)
    if lengths[0] != lengths[1]:
        yield f"sequence {lengths[0]:,} -> {lengths[1]:,}"
    if was["stride"] != mixture.stride:
        yield f"stride {was['stride']} -> {mixture.stride}"


def _new(config: TrainConfig, card: Card, mixture: Mixture) -> Iterator[str]:
    """What begins anew; of sources, which of them the ancestor has seen."""
    rate = config.optimizer
    yield "optimizer"
    yield f"schedule ({config.steps:,} steps, peak {rate.peak_lr:g}, warm-up {rate.warmup_steps:,})"
    yield f"order of the data (seed {config.seed})"
    seen = set(card.training.get("data", ()))
    for source in mixture.sources:
        again = ", which it has seen" if sha256_at(source.config.path / MANIFEST) in seen else ""
        yield f"{source.config.modality} source {source.config.path}={source.config.weight:g}{again}"


def _plain(value: Any) -> str:
    return f"{value:,g}" if isinstance(value, float) else str(value)
