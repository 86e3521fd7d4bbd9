"""Contact sheets: frames in rows, with the prompt's frames marked."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

COLUMNS = 8
GAP = 4
PAPER, PROMPT = (255, 255, 255), (42, 120, 214)


def contact_sheet(
    frames: UInt8[Tensor, "T H W 3"], *, prompt: int = 0, columns: int = COLUMNS, scale: int = 1
) -> UInt8[Tensor, "h w 3"]:
    """Lay frames out in reading order on white; the first `prompt` of them have a blue frame around them."""
    large = frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    count, height, width, _ = large.shape
    rows = -(-count // columns)
    sheet = torch.tensor(PAPER, dtype=torch.uint8).repeat(
        rows * (height + 2 * GAP), min(count, columns) * (width + 2 * GAP), 1
    )
    for number, picture in enumerate(large):
        top = number // columns * (height + 2 * GAP)
        left = number % columns * (width + 2 * GAP)
        if number < prompt:
            sheet[top : top + height + 2 * GAP, left : left + width + 2 * GAP] = torch.tensor(PROMPT, dtype=torch.uint8)
        sheet[top + GAP : top + GAP + height, left + GAP : left + GAP + width] = picture
    return sheet


def comparison_sheet(*rows: UInt8[Tensor, "T H W 3"], scale: int = 1) -> UInt8[Tensor, "h w 3"]:
    """Rows of frames under each other, for example originals above reconstructions."""
    return torch.cat([contact_sheet(row, columns=len(row), scale=scale) for row in rows])
