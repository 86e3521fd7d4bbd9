"""The result: a versioned record that tables are made from, never logs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toto.runtime.errors import TotoError
from toto.runtime.files import read_json, write_json
from toto.runtime.provenance import as_plain, versions

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number with its 95 % confidence interval; None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation found, and how.

    Attributes:
        task: the evaluation's name ("probe").
        protocol: every choice that the numbers depend on.
        metrics: name -> value with its interval.
        offered: how many items there were.
        evaluated: how many of them the numbers are over.
        failed: how many could not be read; counted, never replaced.
        model_sha256: of the weight file.
        passport: of the tokenizer.
        details: tables and curves behind the metrics.
    """

    task: str
    protocol: dict[str, Any]
    metrics: dict[str, Metric]
    offered: int
    evaluated: int
    failed: int
    model_sha256: str
    passport: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    version: int = VERSION

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        write_json(path, as_plain(self))


def load_result(path: Path) -> Result:
    """Read a record back.

    Raises:
        TotoError: it is no record of this version.
    """
    plain = read_json(path, what="result record")
    names = {each.name for each in dataclasses.fields(Result)}
    if not isinstance(plain, dict) or set(plain) != names or plain["version"] != VERSION:
        raise TotoError(f"not a result record of version {VERSION}", where=path, fix="run the evaluation again")
    metrics = {name: Metric(**metric) for name, metric in plain.pop("metrics").items()}
    return Result(metrics=metrics, **plain)


def bootstrap(values: npt.NDArray[np.float64], *, seed: int = 0, draws: int = 2000) -> Metric:
    """The mean of one value per item, with its 95 % percentile bootstrap interval over items."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    means = counts @ values / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return Metric(value=float(values.mean()), low=float(low), high=float(high))
