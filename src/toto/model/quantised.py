"""Weight matrices that are read fast: rounded to fewer bits, and laid out for one vector, or a few, at a time.

A token drawn at batch 1 reads every weight once, so it takes as long as they are in memory large. Only weights are
rounded; products and sums are float32. Which layout is fast depends on the device and the batch:

    fp32   CPU, one vector     columns in blocks of 32, each multiplied by itself
           CPU, a few vectors  oneDNN's own layout
    bf16   CPU                 16 bits, through FBGEMM's float16 matrices, which hold these values
    int8   CPU, one or two     8 bits, summed row by row as an embedding bag
           CPU, more vectors   like bf16, from the 8-bit values
    all    elsewhere           the ordinary product, rounded weights in bfloat16
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Weights = Literal["fp32", "bf16", "int8"]
BLOCK: Final = 32  # columns of a float32 block
GROUP: Final = 128  # outputs that share a scale and an offset, for each input, in int8
FEW: Final = 32  # vectors; for more of them the ordinary product is as fast
BAGGED: Final = 2  # vectors that int8 sums row by row


class Matrix(ABC):
    """A matrix `[O, I]` of a linear layer without bias, prepared for a device and a number of vectors."""

    @abstractmethod
    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        """The product with each vector, in float32."""


def rounded(weight: Float[Tensor, "O I"], weights: Weights) -> Float[Tensor, "O I"]:
    """The values, in float32, that a matrix has in this precision.

    int8 has 256 levels between the least and the largest of each group: 128 neighbouring outputs of one input.
    """
    weight = weight.detach().float()
    if weights == "bf16":
        return weight.bfloat16().float()
    return _unpacked(_packed(weight), weight.shape[0]).to(weight.device) if weights == "int8" else weight


def prepared(weight: Float[Tensor, "O I"], weights: Weights, vectors: int) -> Matrix:
    """A copy of the matrix in the layout that is fast for so many vectors at a time."""
    weight = weight.detach()
    on_cpu = weight.device.type == "cpu"
    if weights == "fp32":
        if on_cpu and vectors == 1 and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            return _Columns.of(weight.float())
        if on_cpu and 1 < vectors <= FEW and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return _OneDNN.of(weight.float(), vectors)
        return _Plain(weight=weight.float())
    if weights == "int8" and on_cpu and vectors <= BAGGED:
        return _Bytes.of(weight.float())
    values = rounded(weight, weights)
    if on_cpu and vectors <= FEW and has_float16_matrices():
        return _Float16.of(values)
    return _Plain(weight=values if on_cpu else values.bfloat16())


def has_float16_matrices() -> bool:
    """Whether this build and processor multiply float16 matrices by float32 vectors."""
    quantised = torch.backends.quantized
    return quantised.engine in ("x86", "fbgemm") and hasattr(torch.ops.quantized, "linear_prepack_fp16")


@dataclass(frozen=True, kw_only=True)
class _Plain(Matrix):
    """The ordinary product, in the precision of the weight `[O, I]`."""

    weight: Tensor

    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        return F.linear(x.to(self.weight.dtype), self.weight).float()


@dataclass(frozen=True, kw_only=True)
class _Columns(Matrix):
    """float32 for one vector: `[blocks, I, BLOCK]`, so that memory is read in the order in which it lies."""

    blocks: Tensor
    outputs: int

    @staticmethod
    def of(weight: Tensor) -> _Columns:
        """Blocks of columns; the last one is filled with zeros."""
        return _Columns(blocks=_in_blocks(weight, BLOCK), outputs=weight.shape[0])

    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        count, inputs, _ = self.blocks.shape
        return torch.bmm(x.expand(count, 1, inputs), self.blocks).view(1, -1)[:, : self.outputs]


@dataclass(frozen=True, kw_only=True)
class _OneDNN(Matrix):
    """float32 for a few vectors, in the layout that oneDNN chooses for them."""

    packed: Tensor

    @staticmethod
    def of(weight: Tensor, vectors: int) -> _OneDNN:
        """The layout for a number of vectors; others are right as well, only slower."""
        return _OneDNN(packed=torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), vectors))

    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out


@dataclass(frozen=True, kw_only=True)
class _Float16(Matrix):
    """float16 weights, float32 vectors. bfloat16 values of 2^-17 and above are held exactly, smaller ones to 2^-25."""

    packed: Any

    @staticmethod
    def of(weight: Tensor) -> _Float16:
        """FBGEMM's layout."""
        return _Float16(packed=torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None))

    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out


@dataclass(frozen=True, kw_only=True)
class _Bytes(Matrix):
    """8-bit weights: `[blocks x I, GROUP + 8]`, a row for each input of each block, which ends in scale and offset.

    The product is a sum of rows times the vector's numbers: an embedding bag for each block.
    """

    packed: Tensor
    rows: Tensor
    starts: Tensor
    outputs: int

    @staticmethod
    def of(weight: Tensor) -> _Bytes:
        """Rounded rows, and which of them each block sums."""
        packed, inputs = _packed(weight), weight.shape[1]
        rows = torch.arange(len(packed), dtype=torch.int32)
        starts = torch.arange(0, len(packed), inputs, dtype=torch.int32)
        return _Bytes(packed=packed, rows=rows, starts=starts, outputs=weight.shape[0])

    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        if len(x) > 1:
            return torch.cat([self(each[None]) for each in x])
        factors = x.expand(len(self.starts), -1).reshape(-1)
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        sums: Tensor = bag(self.packed, self.rows, self.starts, False, 0, False, factors, None, False)
        return sums.view(1, -1)[:, : self.outputs]


def _in_blocks(weight: Tensor, size: int) -> Tensor:
    """`[O, I]` as `[blocks, I, size]`, contiguous; the last block is filled with zeros."""
    filled = F.pad(weight, (0, 0, 0, -weight.shape[0] % size))
    return filled.view(-1, size, weight.shape[1]).transpose(1, 2).contiguous()


def _packed(weight: Tensor) -> Tensor:
    """8-bit rows `[blocks x I, GROUP + 8]`."""
    blocks = _in_blocks(weight.cpu(), min(GROUP, weight.shape[0]))
    out: Tensor = torch.ops.quantized.embedding_bag_byte_prepack(blocks.flatten(0, 1))
    return out


def _unpacked(packed: Tensor, outputs: int) -> Tensor:
    """The values `[O, I]` of 8-bit rows."""
    values: Tensor = torch.ops.quantized.embedding_bag_byte_unpack(packed)
    size = values.shape[1]
    blocks = -(-outputs // size)
    return values.view(blocks, -1, size).transpose(1, 2).reshape(blocks * size, -1)[:outputs].contiguous()
