"""From an item's decoded clips to the R x R crops that are tokenized; one view is one crop of all its frames."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from toto.media.clip import Clip
from toto.media.transforms import Box, crop_box, resized_crop, shortest_side_to
from toto.runtime.seed import stream


class View:
    """One view of an item: where its frames begin, and which part of each is taken.

    Args:
        size: R; the shortest side becomes R, then an R x R crop is taken.
        stride: every stride-th frame of a video is kept.
        rng: draws a first frame below the stride and, once the frames' size is known, the place of the crop. None is
            the centre from frame 0.

    Attributes:
        offset: the first frame.
    """

    def __init__(self, *, size: int, stride: int, rng: np.random.Generator | None = None):
        self._size, self._rng = size, rng
        self.offset = int(rng.integers(stride)) if rng else 0
        self._box: Box | None = None

    def crop(self, clip: Clip) -> UInt8[Tensor, "T R R 3"]:
        """The next frames, resized and cropped; for errors see `toto.media.transforms.resized_crop`."""
        height, width = shortest_side_to(clip.frames.shape[1], clip.frames.shape[2], self._size)
        if self._box is None:
            self._box = crop_box(height, width, self._size, "random" if self._rng else "centre", self._rng)
        return resized_crop(clip.frames, height, width, self._box)


def stored_view(item: str, number: int, *, size: int, stride: int, seed: int) -> View:
    """View `number` of an item in a store: the first is the centre, further ones are random."""
    return View(size=size, stride=stride, rng=stream(seed, "view", item, number) if number else None)
