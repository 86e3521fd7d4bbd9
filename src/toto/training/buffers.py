"""Memory for batches that is used again: fresh memory costs as much as copying into it, and more in threads."""

from __future__ import annotations

import sys
import threading
from typing import Any, final

import numpy as np
import numpy.typing as npt

MOST = 64
HELD_BY_NOBODY = 3  # references to an array in the list below while it is looked at: the list, the loop, the question


@final
class Buffers:
    """Arrays that go to whoever asks for their shape and type, once nobody holds them or a view of them any more.

    Tensors made of an array by `torch.from_numpy`, and their views, hold it as arrays' views do.
    """

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """An array with anything in it."""
        with self._lock:
            for array in self._arrays:
                fits = array.shape == shape and array.dtype == dtype
                if fits and sys.getrefcount(array) == HELD_BY_NOBODY:
                    return array
            made: npt.NDArray[Any] = np.empty(shape, dtype)
            self._arrays = [*self._arrays[1 - MOST :], made]
            return made
