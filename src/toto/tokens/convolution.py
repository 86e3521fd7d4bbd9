"""Convolutions of fixed weights on a CPU, prepared once: oneDNN's with packed weights, Winograd's, and an exact argmax.

For inference alone: nothing here has a gradient, and the prepared weights are copies. All maps are channels-last.
"""

from __future__ import annotations

import itertools
from typing import Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

TILE: Final = 4  # side of the square of outputs that Winograd's algorithm computes together
PATCH: Final = TILE + 2  # side of the inputs it needs
# F(4 x 4, 3 x 3) with the points 0, 1, -1, 1/2, -2 and infinity: with bfloat16 products it errs 1.5 times less than
# with the usual 0, 1, -1, 2, -2, and every number of the two-dimensional transforms of maps is exact in bfloat16.
POINTS: Final = (0.0, 1.0, -1.0, 0.5, -2.0)
STRIP: Final = 2**21  # numbers of transformed input that are held at once: what caches can hold
STRIP_TILES: Final = 128  # or so many tiles, where that is more: the weights are read anew for every strip
CANDIDATES: Final = 32  # codes a cell that are worth an exact second look, on average; with more all are computed
ROUNDING: Final = 1.01 * 2.0**-8  # of a number to bfloat16, relative to what comes out
RUN: Final = 64  # codes that are passed over together when none may be the largest
PAIRS: Final = 256  # second looks at once


def available(dtype: torch.dtype) -> bool:
    """Whether torch and the CPU have what is used here, and fast enough for it to pay in this dtype."""
    operators = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (built and all(hasattr(torch.ops.mkldnn, name) for name in operators)):
        return False
    return _has("avx2") if dtype == torch.float32 else _has("avx512_bf16") or _has("amx_tile")


def _has(instructions: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)())


def winograd_matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Transforms of input, weights and products in one dimension (B^T, G and A^T of Lavin and Gray, 2016)."""
    inputs, weights = torch.zeros(PATCH, PATCH, dtype=torch.float64), torch.zeros(PATCH, 3, dtype=torch.float64)
    outputs = torch.zeros(TILE, PATCH, dtype=torch.float64)
    for row, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        inputs[row, :-1] = _polynomial(others)
        distance = torch.tensor([point - other for other in others], dtype=torch.float64).prod()
        weights[row] = torch.tensor([1, point, point**2], dtype=torch.float64) / distance
        outputs[:, row] = torch.tensor([point**power for power in range(TILE)], dtype=torch.float64)
    inputs[-1], weights[-1, -1], outputs[-1, -1] = _polynomial(list(POINTS)), 1, 1
    return inputs, weights, outputs


def _polynomial(roots: list[float]) -> Tensor:
    """Coefficients of the product of all (x - root), the constant first."""
    found = torch.ones(1, dtype=torch.float64)
    for root in roots:
        found = F.pad(found, (1, 0)) - root * F.pad(found, (0, 1))
    return found


@final
class Packed:
    """A convolution with padding through oneDNN, its weights in the layout that its kernels want."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype):
        side = weight.shape[-1] // 2
        self.padding = [side, side]
        self.bias = bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach().to(dtype).contiguous(), self.padding, [1, 1], [1, 1], 1, [1, weight.shape[1], 32, 32]
        )

    def __call__(self, x: Float[Tensor, "B C H W"], *, relu: bool = False) -> Float[Tensor, "B O H W"]:
        """The convolution, and the ReLU of it where asked."""
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, [1, 1], [1, 1], 1, "relu" if relu else "none", [], ""
        )
        return found

    def add_to(self, total: Float[Tensor, "B O H W"], x: Float[Tensor, "B C H W"]) -> None:
        """Add the convolution of `x` to `total`, rounding once."""
        torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self.weight, self.bias, self.padding, [1, 1], [1, 1], 1, "add", 1.0, None, [], None
        )


@final
class Winograd:
    """A 3 x 3 convolution with padding of the ReLU of its input, with a quarter of the multiplications.

    The weights take four times their memory. Rounding errors: about thrice those of a plain convolution in float32
    (2e-6 of the result), seven times in bfloat16 (1.7 % of it).
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype):
        inputs, weights, outputs = winograd_matrices()
        self.inputs = torch.kron(inputs, inputs).to(dtype)
        self.outputs = torch.kron(outputs, outputs).to(dtype)
        wide = torch.einsum("oiyx,ax->ayio", weight.detach().double(), weights)
        self.weight = torch.empty(PATCH**2, weight.shape[1], weight.shape[0], dtype=dtype)
        for place, kernel in enumerate(self.weight):
            down, across = divmod(place, PATCH)
            kernel.copy_(torch.einsum("yio,y->io", wide[across], weights[down]))
        self.bias = bias.detach().to(dtype)

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O H W"]:
        """The convolution of the ReLU of `x`."""
        count, channels, height, width = x.shape
        rows, cols = -(-height // TILE), -(-width // TILE)
        padded = x.new_empty(count, rows * TILE + 2, cols * TILE + 2, channels)
        for border in (padded[:, :1], padded[:, height + 1 :], padded[:, :, :1], padded[:, :, width + 1 :]):
            border.zero_()
        torch.clamp_min(x.permute(0, 2, 3, 1), 0, out=padded[:, 1 : height + 1, 1 : width + 1])
        found = padded.new_empty(count, rows, TILE, cols, TILE, self.weight.shape[2])
        tiles = max(STRIP // (PATCH**2 * channels), STRIP_TILES)
        strips = max(1, -(-count * rows * cols // tiles))
        edges = [rows * strip // strips for strip in range(strips + 1)]
        for top, bottom in itertools.pairwise(edges):
            if bottom > top:
                self._strip(padded, top, bottom - top, cols, found)
        whole = found.view(count, rows * TILE, cols * TILE, -1)[:, :height, :width]
        return whole.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _strip(self, padded: Tensor, top: int, rows: int, cols: int, found: Tensor) -> None:
        count, _, _, channels = padded.shape
        line, frame = padded.stride(1), padded.stride(0)
        patches = padded.as_strided(
            (PATCH, PATCH, count, rows, cols, channels),
            (line, channels, frame, TILE * line, TILE * channels, 1),
            padded.storage_offset() + top * TILE * line,
        )
        tiles = count * rows * cols
        transformed = torch.mm(self.inputs, patches.reshape(PATCH**2, -1)).view(PATCH**2, tiles, channels)
        products = torch.bmm(transformed, self.weight).view(PATCH**2, -1)
        squares = torch.mm(self.outputs, products).view(TILE, TILE, count, rows, cols, -1)
        torch.add(squares.permute(2, 3, 0, 4, 1, 5), self.bias, out=found[:, top : top + rows])


def _at_least(logits: Float[Tensor, "cells V"], threshold: Float[Tensor, " cells"]) -> Int64[Tensor, "pairs 2"]:
    """Cells and codes whose logits are not below the cell's threshold, in order; most are passed over by the run."""
    if logits.shape[1] % RUN:
        return (logits >= threshold[:, None]).nonzero()
    runs = logits.view(len(logits), -1, RUN)
    cell, run = (runs.amax(2) >= threshold[:, None]).nonzero().unbind(1)
    place, within = (runs[cell, run] >= threshold[cell, None]).nonzero().unbind(1)
    return torch.stack([cell[place], run[place] * RUN + within], dim=1)


@final
class LargestLogit:
    """Which of many linear functions is largest, as float32 has it, found with most of the work in bfloat16.

    bfloat16 products come first. A bound on their error says which codes may be the largest one; those alone are
    computed in float32. The bound is Cauchy and Schwarz's with the rounding errors as they are, so no code is missed.
    Where too many are left, or a number isn't finite, or the CPU has no bfloat16 products, all are computed.
    """

    def __init__(self, weight: Float[Tensor, "V C 1 1"], bias: Float[Tensor, " V"]):
        self.weight, self.bias = weight.detach(), bias.detach()
        self.rough = Packed(weight, bias, torch.bfloat16) if available(torch.bfloat16) else None
        table = self.weight[:, :, 0, 0]
        self.table = table.contiguous()
        self.largest = float(table.norm(dim=1).max())
        self.rounded = float((table - table.bfloat16().float()).norm(dim=1).max())
        self.shift = float(self.bias.abs().max())

    def __call__(self, x: Float[Tensor, "B C H W"]) -> Int64[Tensor, "B H W"]:
        """The first code with the largest logit in every cell."""
        count, channels, height, width = x.shape
        cells = x.permute(0, 2, 3, 1).reshape(-1, channels).float()
        pairs = None
        if self.rough is not None:
            logits = self.rough(x.bfloat16()).permute(0, 2, 3, 1).reshape(-1, len(self.bias))
            threshold = self._threshold(cells, logits.amax(1).float())
            pairs = _at_least(logits, threshold) if threshold.isfinite().all() else None
        if pairs is None or len(pairs) > CANDIDATES * len(cells):
            codes = F.linear(cells, self.table, self.bias).argmax(1)
        else:
            codes = self._exact(cells, pairs)
        return codes.view(count, height, width)

    def _threshold(self, cells: Tensor, best: Tensor) -> Tensor:
        """No code whose bfloat16 logit is below can be the largest; not finite where nothing can be said."""
        length = cells.norm(dim=1)
        error = (cells - cells.bfloat16().float()).norm(dim=1) * self.largest + length * self.rounded * 1.01
        # Sums in float32 err by their number of terms x 2^-24 of the lengths at most; bfloat16 rounds by 2^-8 of a
        # number at most: the bias, and the logits on both sides of the comparison.
        error += cells.shape[1] * 2.0**-23 * length * self.largest + 2.0**-8 * self.shift
        low = best - ROUNDING * best.abs() - 2 * error
        low = low / (1 + ROUNDING * low.sign())
        threshold: Tensor = low - 2 * ROUNDING * low.abs()  # stays below although it is rounded
        return threshold.bfloat16()

    def _exact(self, cells: Tensor, pairs: Tensor) -> Tensor:
        where, code = pairs.unbind(1)
        logits = torch.cat(
            [
                (cells[some[:, 0]] * self.table[some[:, 1]]).sum(1) + self.bias[some[:, 1]]
                for some in torch.split(pairs, PAIRS)
            ]
        )
        best = logits.new_full((len(cells),), -torch.inf).scatter_reduce_(0, where, logits, "amax")
        code = torch.where(logits == best[where], code, len(self.bias))
        return code.new_full((len(cells),), len(self.bias)).scatter_reduce_(0, where, code, "amin")
