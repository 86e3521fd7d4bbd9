"""The result: a versioned record that tables are made from, never logs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toto.runtime.errors import ConfigError, TotoError
from toto.runtime.files import read_json, write_json
from toto.runtime.provenance import as_plain, versions

VERSION = 2
FIRST = 1  # the oldest version that is still read
COUNTS_AT_ONCE = 4_000_000  # of a bootstrap, in memory


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number over the items that were evaluated, with its 95 % confidence interval; None where there is no interval.

    Attributes:
        value: over the items that were evaluated.
        low: lower end of the interval.
        high: upper end of the interval.
        bound: what `value` would be if every item that failed had been wrong; None where a failure has no worst value
            (bits, errors) or nobody knows it (records of version 1).
    """

    value: float
    low: float | None = None
    high: float | None = None
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation found, and how; validates its denominators on creation.

    Attributes:
        task: the evaluation's name ("probe").
        protocol: every choice that the numbers depend on.
        metrics: name -> value with its interval and bound.
        offered: how many items there were: evaluated + failed + skipped.
        evaluated: how many of them the numbers are over.
        failed: how many should have been evaluated and could not: corrupt, missing, short; never replaced.
        skipped: how many were left out on purpose: no media, named twice, of another modality, beyond a limit.
        model_sha256: of the weight file.
        passport: of the tokenizer.
        ledger: for each part of the data ("train", "test", "heldout"), how many inputs ended with each status.
        details: tables and curves behind the metrics, and the ledger's rows that are not ok.
    """

    task: str
    protocol: dict[str, Any]
    metrics: dict[str, Metric]
    offered: int
    evaluated: int
    failed: int
    skipped: int = 0
    model_sha256: str
    passport: dict[str, Any]
    ledger: dict[str, dict[str, int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.offered != self.evaluated + self.failed + self.skipped:
            what = f"{self.evaluated} evaluated, {self.failed} failed and {self.skipped} skipped"
            raise ConfigError(f"{what} are not the {self.offered} that were offered", where=f"result of {self.task}")

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        write_json(path, as_plain(self))


def load_result(path: Path) -> Result:
    """Read a record back; one of version 1 has no bounds and no ledger.

    Raises:
        TotoError: it is no record of a version that is read.
    """
    plain = read_json(path, what="result record")
    version = plain.get("version") if isinstance(plain, dict) else None
    added = {"ledger", "skipped"} if version == FIRST else set()
    names = {each.name for each in dataclasses.fields(Result)} - added
    if version not in range(FIRST, VERSION + 1) or set(plain) != names:
        raise TotoError(
            f"not a result record of version {FIRST} to {VERSION}", where=path, fix="run the evaluation again"
        )
    metrics = {name: Metric(**metric) for name, metric in plain.pop("metrics").items()}
    return Result(metrics=metrics, **(plain | {"version": VERSION}))


def bootstrap(
    values: npt.NDArray[np.float64], *, failed: int | None = None, seed: int = 0, draws: int = 2000
) -> Metric:
    """The mean of one value per item, with its 95 % percentile bootstrap interval over items.

    Args:
        values: of the items that were evaluated, at least one.
        failed: how many more items there were; each counts as 0 in the bound. None gives no bound.
        seed: of the draws.
        draws: how many times the items are drawn again.
    """
    return bootstrap_each(values[:, None], failed=failed, seed=seed, draws=draws)[0]


def bootstrap_each(
    values: npt.NDArray[np.float64], *, failed: int | None = None, seed: int = 0, draws: int = 2000
) -> list[Metric]:
    """`bootstrap` of every column of `[items, columns]`: all columns see the same draws of the items."""
    items = len(values)
    rng = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // items)
    parts = [min(at_once, draws - first) for first in range(0, draws, at_once)]
    uniform = np.full(items, 1 / items)
    means = np.concatenate([rng.multinomial(items, uniform, size=size) @ values / items for size in parts])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [
        Metric(
            value=float(column.mean()),
            low=float(low[number]),
            high=float(high[number]),
            bound=None if failed is None else float(column.sum() / (items + failed)),
        )
        for number, column in enumerate(values.T)
    ]
