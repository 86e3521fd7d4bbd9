"""The loss by source, by modality and by place in the sequence, added up on the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from toto.runtime.errors import CheckpointError
from toto.training.source import SourceConfig


@final
class LossWatch:
    """Adds up the losses of predictions by source and frame; the end token has a place of its own behind the frames.

    Numbers since the last row of metrics lie on the device, those since the last positions and over the whole run on
    the host. All are sums and counts, so several processes add theirs up, and a run that goes on logs the rows of one
    that was never interrupted.

    Args:
        sources: of the mixture, in its order.
        frames: T, frames in a window.
        cells: rows x cols, predictions of a frame.
        ends: an end token is predicted, as among codes; not among pixels.
        device: of the losses.
    """

    def __init__(
        self, sources: Sequence[SourceConfig], *, frames: int, cells: int, ends: bool, device: torch.device | str
    ):
        self.names = source_names(sources)
        self._modalities = [source.modality for source in sources]
        self._cells, self._ends, self._device = cells, ends, device
        self._shape = len(sources), frames + 1
        self._sums = torch.zeros(self._shape, dtype=torch.float64, device=device)
        self._counts = np.zeros(self._shape)
        self._held_sums, self._held_counts = np.zeros(self._shape), np.zeros(self._shape)
        self._seen = np.zeros(len(sources))

    def add(self, each: Float[Tensor, "B N"], source: Int64[np.ndarray, " windows"]) -> None:
        """Add the losses of a part of a batch.

        Args:
            each: the loss of every prediction, without gradients.
            source: the number of each window's source. Where windows are cut into short sequences, each window is
                B / windows neighbouring rows.
        """
        rows = np.repeat(source, len(each) // len(source))
        frames = each.shape[1] // self._cells if not self._ends else (each.shape[1] - 1) // self._cells
        places = each.double()[:, : frames * self._cells].reshape(len(each), frames, self._cells).sum(-1)
        of_source = np.arange(self._shape[0])[:, None] == rows
        chosen = torch.from_numpy(of_source.astype(np.float64)).to(self._device, non_blocking=True)
        self._sums[:, :frames] += chosen @ places
        drawn = of_source.sum(1)
        self._counts[:, :frames] += drawn[:, None] * self._cells
        if self._ends:
            self._sums[:, -1] += chosen @ each[:, -1].double()
            self._counts[:, -1] += drawn

    def totals(self) -> Float64[Tensor, " totals"]:
        """Sums and counts of this process since the last row, as one new tensor, to be added over all processes."""
        return torch.cat([self._sums.flatten(), torch.from_numpy(self._counts.ravel()).to(self._device)])

    def take(self, totals: Float64[Tensor, " totals"] | None = None) -> dict[str, float]:
        """Means since the last row, and begin a new one; `totals` are those of all processes, by default of this one.

        Returns `train/loss/source/NAME`, `train/loss/modality/NAME` (of what was drawn since) and
        `train/tokens/source/NAME`, predictions since the beginning of the run.
        """
        sums, counts = self._known(totals)
        self._held_sums += sums
        self._held_counts += counts
        self._seen += counts.sum(1)
        self._sums.zero_()
        self._counts[:] = 0
        values: dict[str, float] = {}
        for number, name in enumerate(self.names):
            if counts[number].any():
                values[f"train/loss/source/{name}"] = float(sums[number].sum() / counts[number].sum())
        for modality in dict.fromkeys(self._modalities):
            mine = self._of(modality)
            if counts[mine].any():
                values[f"train/loss/modality/{modality}"] = float(sums[mine].sum() / counts[mine].sum())
        seen = {f"train/tokens/source/{name}": float(seen) for name, seen in zip(self.names, self._seen, strict=True)}
        return values | seen

    def positions(self) -> dict[str, list[float | None]]:
        """Mean loss by frame of the rows taken since this was last called, by modality, the end token last.

        Frames that weren't predicted are None, as is the end where none is predicted.
        """
        values: dict[str, list[float | None]] = {}
        for modality in dict.fromkeys(self._modalities):
            mine = self._of(modality)
            sums, counts = self._held_sums[mine].sum(0), self._held_counts[mine].sum(0)
            if counts.any():
                pairs = zip(sums, counts, strict=True)
                values[modality] = [float(total / count) if count else None for total, count in pairs]
        self._held_sums[:] = 0
        self._held_counts[:] = 0
        return values

    def state(self, totals: Float64[Tensor, " totals"] | None = None) -> dict[str, Any]:
        """Everything that `restore` needs, as lists of numbers; `totals` are those of all processes."""
        sums, counts = self._known(totals)
        return {
            "sums": sums.tolist(),
            "counts": counts.tolist(),
            "held_sums": self._held_sums.tolist(),
            "held_counts": self._held_counts.tolist(),
            "seen": self._seen.tolist(),
        }

    def restore(self, state: dict[str, Any], *, first: bool = True) -> None:
        """Go on from a state; sources may have joined since.

        Args:
            state: of a process or of all of them together.
            first: whether this is the first process, which takes over what all of them had added up.

        Raises:
            CheckpointError: the state is of other sources or sequences.
        """
        if first:
            self._sums.copy_(torch.from_numpy(self._whole(state, "sums")))
            self._counts[:] = self._whole(state, "counts")
        self._held_sums[:] = self._whole(state, "held_sums")
        self._held_counts[:] = self._whole(state, "held_counts")
        self._seen[: len(state["seen"])] = state["seen"]

    def _known(self, totals: Tensor | None) -> tuple[Any, Any]:
        sums, counts = (self.totals() if totals is None else totals).cpu().numpy().reshape(2, *self._shape)
        return sums, counts

    def _of(self, modality: str) -> list[int]:
        return [number for number, each in enumerate(self._modalities) if each == modality]

    def _whole(self, state: dict[str, Any], name: str) -> Any:
        """A table of the state, with rows of noughts for sources that have joined."""
        before = np.array(state[name], dtype=np.float64)
        if before.ndim != 2 or before.shape[1] != self._shape[1] or len(before) > self._shape[0]:
            raise CheckpointError(f"sums of losses {before.shape} don't fit {self._shape}", where="training.watch")
        return np.concatenate([before, np.zeros((self._shape[0] - len(before), self._shape[1]))])


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A short name for each source: the end of its path, as long as it takes to tell it from the others.

    Of one path that is read twice, the modality follows, and a number where that is the same too.
    """
    parts = [str(source.path).rstrip("/").split("/") for source in sources]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        names.append("/".join(mine[-length:]))
    for labels in ([source.modality for source in sources], [str(number + 1) for number in range(len(sources))]):
        twice = {name for name in names if names.count(name) > 1}
        names = [f"{name}:{label}" if name in twice else name for name, label in zip(names, labels, strict=True)]
    return names
