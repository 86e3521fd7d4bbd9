"""Structured metrics: one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from toto.runtime.files import write_text, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics of a run into a folder: `metrics.jsonl` and TensorBoard events beside it.

    Args:
        folder: the run's folder.
        continue_from: keep rows up to and including this step and drop later ones, which the continued run
            will write again; None starts anew.
    """

    def __init__(self, folder: Path, *, continue_from: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / FILE
        kept = [] if continue_from is None else [row for row in read_metrics(folder) if row["step"] <= continue_from]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._handle = self.path.open("a")
        purge = None if continue_from is None else continue_from + 1
        self._board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; names are paths such as "train/loss"."""
        with writing(self.path):
            self._handle.write(json.dumps({"step": step, **values}) + "\n")
            self._handle.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        with writing(self.path):
            self._handle.close()
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All rows of a run's `metrics.jsonl`; a last line that a killed process cut off is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
