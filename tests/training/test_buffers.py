"""Memory is used again only when nobody can see it any more."""

from __future__ import annotations

import numpy as np
import torch

from toto.training.buffers import MOST, Buffers


def test_an_array_comes_back_when_neither_it_nor_a_view_of_it_is_held():
    buffers = Buffers()
    first = buffers.empty((4, 3), np.int64)
    place = first.ctypes.data
    second = buffers.empty((4, 3), np.int64)
    assert second.ctypes.data != place
    view = first[1:]
    del first
    assert buffers.empty((4, 3), np.int64).ctypes.data != place
    tensor = torch.from_numpy(view)
    del view
    part = tensor.chunk(3)[1]
    del tensor
    assert buffers.empty((4, 3), np.int64).ctypes.data != place
    flat = part.numpy().reshape(-1)
    del part
    assert buffers.empty((4, 3), np.int64).ctypes.data != place
    del flat
    assert buffers.empty((4, 3), np.int32).ctypes.data != place
    assert buffers.empty((4, 3), np.int64).ctypes.data == place


def test_there_is_no_end_to_them():
    buffers = Buffers()
    held = [buffers.empty((8,), np.uint16) for _ in range(2 * MOST)]
    assert len({each.ctypes.data for each in held}) == len(held)
    del held
    again = [buffers.empty((8,), np.uint16) for _ in range(MOST)]
    assert len({each.ctypes.data for each in again}) == MOST
