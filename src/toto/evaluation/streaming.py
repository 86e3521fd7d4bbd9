"""Features made while heads learn on them: the frozen trunk runs in every epoch, and nothing but a batch is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toto.evaluation.features import Backbone
from toto.evaluation.finetune_config import Augmentation
from toto.evaluation.finetune_data import augmented
from toto.evaluation.labelled import LabelledClips
from toto.evaluation.probe import Batch
from toto.media.ledger import LedgerRow
from toto.runtime.ahead import ahead
from toto.runtime.errors import MediaError
from toto.runtime.seed import stream

Pixels = tuple[Tensor, list[Tensor]]  # which clips, and their frames


@dataclass(frozen=True, kw_only=True)
class StreamedFeatures:
    """Clips whose features a backbone makes when they are asked for; the next batch's clips are read meanwhile.

    Attributes:
        backbone: the frozen trunk.
        clips: what it sees.
        batch: clips in one pass of the trunk.
        augmentation: of training clips, another one in every epoch; None shows the centre.
        seed: of the augmentation.
        failed: what could not be read, by number; found while reading.
    """

    backbone: Backbone
    clips: LabelledClips
    batch: int = 8
    augmentation: Augmentation | None = None
    seed: int = 0
    failed: dict[int, LedgerRow] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """Of all clips that are named, `[clips]`."""
        return torch.tensor(self.clips.labels, dtype=torch.int64)

    def batches(self, groups: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Each group's features in bf16; clips that can't be read are left out, and told in the ledger."""
        for numbers, frames in ahead(self._read(groups, epoch), 2):
            parts: dict[int, list[Tensor]] = {}
            for first in range(0, len(frames), self.batch):
                states = self.backbone.features(torch.stack(frames[first : first + self.batch]))
                for layer in states:
                    parts.setdefault(layer, []).append(states[layer].to(torch.bfloat16))
            yield Batch(by_layer={layer: torch.cat(found) for layer, found in parts.items()}, numbers=numbers)

    def ledger(self) -> tuple[LedgerRow, ...]:
        """A row for every input that was offered, once all clips were asked for."""
        frames = self.backbone.frames if self.clips.modality == "video" else 1
        rows = [
            self.failed.get(number) or LedgerRow(id=id, kind=self.clips.modality, status="ok", frames=frames)
            for number, id in enumerate(self.clips.ids)
        ]
        return (*rows, *self.clips.refused)

    def _read(self, groups: Iterable[Tensor], epoch: int | None) -> Iterator[Pixels]:
        for group in groups:
            found: list[int] = []
            frames: list[Tensor] = []
            for number in group.tolist():
                try:
                    frames.append(self._shown(number, epoch))
                    found.append(number)
                except MediaError as error:
                    self.failed[number] = LedgerRow(
                        id=self.clips.ids[number], kind=self.clips.modality, status=error.status, reason=error.what
                    )
            yield torch.tensor(found, dtype=torch.int64), frames

    def _shown(self, number: int, epoch: int | None) -> Tensor:
        """A clip as the trunk sees it."""
        frames = self.clips.read(number).frames
        if epoch is None or self.augmentation is None:
            return self.backbone.prepare(frames)
        rng = stream(self.seed, "probe view", epoch, number)
        return augmented(frames, self.backbone.frame_size, rng, self.augmentation)
