"""Codes <-> sequences: `[start] + T x rows x cols codes in raster order + [end]`.

The paper's start tokens are 1 for video and 3 for images, and 2 ends every sequence (section 3). How these ids lie
beside the tokenizer's codes is not published: here a code enters a sequence at code + 4, after pad (0).
The paper's context, 16 frames x 256 codes, is thus 4,096 visual tokens in a sequence of 4,098.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from toto.runtime.errors import TotoError

PAD, VIDEO_START, END, IMAGE_START = 0, 1, 2, 3
CODE_OFFSET = 4

Modality = Literal["video", "image"]
START = {"video": VIDEO_START, "image": IMAGE_START}


def sequence_vocabulary(vocab_size: int) -> int:
    """How many ids sequences of a tokenizer with `vocab_size` codes use."""
    return vocab_size + CODE_OFFSET


def sequence_length(frames: int, rows: int, cols: int) -> int:
    """How long a sequence of this many frames is, start and end included."""
    return frames * rows * cols + 2


def pack(codes: Int64[Tensor, "B T rows cols"], modality: Modality) -> Int64[Tensor, "B S"]:
    """Codes of clips, or of groups of images, as sequences."""
    batch = len(codes)
    start = torch.full((batch, 1), START[modality], dtype=torch.int64, device=codes.device)
    end = torch.full((batch, 1), END, dtype=torch.int64, device=codes.device)
    return torch.cat([start, codes.reshape(batch, -1) + CODE_OFFSET, end], dim=1)


def pack_prompt(codes: Int64[Tensor, "B T rows cols"], modality: Modality) -> Int64[Tensor, "B S"]:
    """Like `pack`, without the end: what a continuation starts from."""
    return pack(codes, modality)[:, :-1]


def unpack(sequences: Int64[Tensor, "B S"], rows: int, cols: int) -> Int64[Tensor, "B T rows cols"]:
    """The codes of sequences, with or without their end.

    Raises:
        TotoError: a sequence has no start, ends inside a frame, or holds a special id between start and end.
    """
    body = sequences[:, 1:]
    if body.shape[1] and bool((body[:, -1] == END).all()):
        body = body[:, :-1]
    if not bool(((sequences[:, 0] == VIDEO_START) | (sequences[:, 0] == IMAGE_START)).all()):
        raise TotoError("a sequence doesn't begin with a start token (1 video, 3 image)")
    if body.shape[1] % (rows * cols):
        raise TotoError(f"{body.shape[1]} codes are not whole frames of {rows} x {cols}")
    if body.numel() and int(body.min()) < CODE_OFFSET:
        raise TotoError(f"special id {int(body.min())} lies among the codes of a sequence")
    return (body - CODE_OFFSET).reshape(len(sequences), -1, rows, cols)
