"""Structured metrics: one JSON object a line, and the same numbers for TensorBoard and, where asked, for W&B."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from toto.runtime.files import write_text, writing
from toto.runtime.wandb_sink import WandbConfig, WandbSink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE, POSITIONS = "metrics.jsonl", "positions.jsonl"
Row = dict[str, float]


@final
class Metrics:
    """Writes metrics of a run into a folder: `metrics.jsonl` and TensorBoard events beside it.

    Args:
        folder: the run's folder.
        continue_from: keep rows up to and including this step and drop later ones, which the continued run
            will write again; None starts anew.
        wandb: send the same rows there.
        config: plain values of the run, for W&B.

    Raises:
        ConfigError: W&B is not installed, or refuses the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        continue_from: int | None = None,
        wandb: WandbConfig | None = None,
        config: dict[str, Any] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        before = [] if continue_from is None else read_metrics(folder)
        again = [row for row in before if row["step"] > (continue_from or 0)]
        self._wandb = None if wandb is None else WandbSink(wandb, folder, again=again, values=config or {})
        self._rows = _Lines(folder / FILE, continue_from)
        self._positions: _Lines | None = None
        self._folder, self._continue_from = folder, continue_from
        if (folder / POSITIONS).exists():
            self._positions = _Lines(folder / POSITIONS, continue_from)
        purge = None if continue_from is None else continue_from + 1
        with writing(folder):
            self._board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; names are paths such as "train/loss"."""
        self._rows.write({"step": step, **values})
        with writing(self._rows.path):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def write_positions(self, step: int, values: Mapping[str, list[float | None]]) -> None:
        """Append a row of losses by place in the sequence to `positions.jsonl`, a list for each modality."""
        if self._positions is None:
            self._positions = _Lines(self._folder / POSITIONS, self._continue_from)
        self._positions.write({"step": step, **values})

    def close(self) -> None:
        """Flush and close everything."""
        self._rows.close()
        if self._positions is not None:
            self._positions.close()
        with writing(self._rows.path):
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()


@final
class _Lines:
    """A file of JSON lines that goes on after a step."""

    def __init__(self, path: Path, continue_from: int | None):
        kept = [] if continue_from is None else [row for row in _read(path) if row["step"] <= continue_from]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path = path
        self._handle = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        with writing(self.path):
            self._handle.write(json.dumps(row) + "\n")
            self._handle.flush()

    def close(self) -> None:
        with writing(self.path):
            self._handle.close()


def read_metrics(folder: Path) -> list[Row]:
    """All rows of a run's `metrics.jsonl`; a last line that a killed process cut off is left out."""
    return _read(folder / FILE)


def read_positions(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's `positions.jsonl`: the step, and for each modality a list of losses by frame."""
    return _read(folder / POSITIONS)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
