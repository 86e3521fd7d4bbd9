"""What a run's folder says of it, and whether it may go on with what is asked now."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from toto.model.architectures import config_class
from toto.runtime.errors import ConfigError
from toto.runtime.files import read_json
from toto.runtime.provenance import ANOTHER, RECORD, as_plain, write_provenance
from toto.training.config import DataConfig, TrainConfig

FREE_TO_CHANGE = (
    *("device", "parallel", "guard", "keep", "keep_every", "log_every", "save_every", "save_in_background"),
    *("eval_every", "eval_sequences"),
)
FREE_DATA = ("heldout", "checks", "schedule", "workers")  # of the data; the schedule is compared by itself


def record(config: TrainConfig, out: Path) -> None:
    """Say in the run's folder what makes it; one that holds something else is refused."""
    if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise ConfigError("is not empty and holds no run", where=out, fix=ANOTHER)
    write_provenance(out, config)


def require_same_run(config: TrainConfig, out: Path, step: int) -> None:
    """Refuse to continue after `step` steps with options that would make it another run."""
    before = read_json(out / RECORD, what="record of the run")["config"]
    now = as_plain(config)
    different = differences(_comparable(before, step), _comparable(now, step))
    if different:
        raise ConfigError(
            f"holds a run with other options ({'; '.join(different)})",
            where=out,
            fix="use the same, or another --out",
        )


def record_new_mixture(config: TrainConfig, out: Path, step: int) -> None:
    """Where a run goes on with another mixture, make that its record and keep the one before beside it."""
    before = read_json(out / RECORD, what="record of the run")["config"]["data"]
    if drawn_from(before, config.steps) != drawn_from(as_plain(config.data), config.steps):
        shutil.copyfile(out / RECORD, out / f"made-before-step-{step + 1}.json")
        write_provenance(out, config)


def _comparable(config: dict[str, Any], step: int) -> dict[str, Any]:
    """The options that decided the result of the first `step` steps, or decide everything after them.

    Where the shards lie doesn't, their checksums are compared instead; nor does a mixture that is still to come.
    Options that a run's record is too old to name had their defaults.
    """
    kept = {name: value for name, value in config.items() if name not in FREE_TO_CHANGE}
    used = drawn_from(config["data"], step)
    data = {name: value for name, value in config["data"].items() if name not in FREE_DATA}
    return kept | {
        "data": {
            **_defaults(DataConfig, but=FREE_DATA),
            **data,
            "sources": used["sources"],
            f"schedule before step {step}": used["schedule"],
        },
        "model": _defaults(config_class(config["model"])) | config["model"],
    }


def drawn_from(data: dict[str, Any], step: int) -> dict[str, Any]:
    """The mixture as far as it has decided the first `step` steps: without later changes and sources that join then."""
    schedule = [change for change in data.get("schedule", []) if change["step"] < step]
    weights = [[source["weight"] for source in data["sources"]], *(change["weights"] for change in schedule)]
    used = 1 + max(number for row in weights for number, weight in enumerate(row) if weight)
    return {
        "sources": [{**source, "path": None} for source in data["sources"][:used]],
        "schedule": [{**change, "weights": change["weights"][:used]} for change in schedule],
    }


def _defaults(kind: type[Any], *, but: Collection[str] = ()) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(kind) if field.default is not MISSING and field.name not in but]
    return {field.name: as_plain(field.default) for field in fields}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested configurations, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name} was {before}, is {now}"]
