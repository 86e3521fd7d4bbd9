"""Rows of metrics for Weights & Biases, an extra; a run that goes on goes on there too."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from toto.runtime.errors import ConfigError
from toto.runtime.files import read_json, write_json

ID_FILE = "wandb.json"


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where W&B keeps a run. `WANDB_MODE=offline` keeps it in the run's folder, for `wandb sync` later.

    Attributes:
        project: its project.
        entity: the account or team; None for one's own.
        name: of the run; None for its folder's.
        group: of runs that belong together.
    """

    project: str
    entity: str | None = None
    name: str | None = None
    group: str | None = None


def parse_project(text: str) -> WandbConfig:
    """`[ENTITY/]PROJECT`, as the command line has it.

    Raises:
        ConfigError: it is something else.
    """
    *entity, project = text.split("/")
    if len(entity) > 1 or not project or "" in entity:
        raise ConfigError(f"{text!r} is no [ENTITY/]PROJECT", where="--wandb")
    return WandbConfig(project=project, entity=entity[0] if entity else None)


@final
class WandbSink:
    """Sends rows to one run of W&B, whose id is kept in the run's folder.

    Args:
        config: where to.
        folder: the run's folder.
        again: rows that were sent before and will be written once more, since the run goes on from before them.
        values: plain values of the run, shown beside it.

    Raises:
        ConfigError: the package is not installed, or W&B refuses the run.
    """

    def __init__(
        self, config: WandbConfig, folder: Path, *, again: Sequence[dict[str, float]] = (), values: dict[str, Any]
    ):
        wandb = _package()
        kept = folder / ID_FILE
        known = kept.exists()
        name = read_json(kept, what="id of the run at W&B")["id"] if known else uuid.uuid4().hex[:12]
        self._again = {_key(int(row["step"]), row) for row in again} if known else set()
        write_json(kept, {"id": name})
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or folder.resolve().name,
                group=config.group,
                id=name,
                resume="allow",
                dir=str(folder),
                config=values,
                settings={"console": "off"},
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"W&B refuses the run ({reason})", where="--wandb", fix="wandb login, or set WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Send a row, unless it lies there already."""
        key = _key(step, values)
        if key in self._again:
            self._again.discard(key)
            return
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def _key(step: int, values: dict[str, float]) -> tuple[int, frozenset[str]]:
    return step, frozenset(values) - {"step"}


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            "needs the package wandb, which is not installed", where="--wandb", fix="pip install 'toto-video[wandb]'"
        ) from None
