"""The block's norms, SwiGLU and matrix products for processors without a compiler.

What a product takes is made again from its own inputs in the backward pass where that is a pass over memory only: of a
norm and the product after it, the residual stream is kept, or what it was added up from; of SwiGLU and the product
after it, gate and up. On GPUs torch has such a norm, and torch.compile fuses the rest; there the plain formulas are
used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toto.runtime.device import product_dtype

ROWS_OF_A_CAST = 2048  # a product of so many rows takes a hundred times as long as to cast its weight

_casts: dict[int, tuple[Tensor, Tensor]] | None = None


@contextlib.contextmanager
def weights_cast_once() -> Iterator[None]:
    """Within the block, a weight is cast to the precision of products once, however many forward passes take it."""
    global _casts
    before, _casts = _casts, {}
    try:
        yield
    finally:
        _casts = before


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(x)`, whose weight may have been cast before."""
    if not _by_hand(x):
        return layer(x)  # type: ignore[no-any-return]
    return F.linear(x, _weight_of(layer, x).to(product_dtype(x)), layer.bias)


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm(x)`; an RMSNorm's in the precision of the matrix product that takes it, where that comes for nothing."""
    if not isinstance(norm, nn.RMSNorm):
        return norm(x)  # type: ignore[no-any-return]
    if norm.eps is None or not _by_hand(x):  # gathered weights may be bf16
        return F.rms_norm(x, list(norm.normalized_shape), norm.weight.to(x.dtype), norm.eps)
    out: Tensor = _RMSNorm.apply(x, norm.weight, norm.eps, product_dtype(x))  # type: ignore[no-untyped-call]
    return out


def normed_linear(x: Tensor, norm: nn.RMSNorm, layer: nn.Linear) -> Tensor:
    """`layer(norm(x))` of a layer without bias."""
    if norm.eps is None or not _by_hand(x):
        return layer(normed(x, norm))  # type: ignore[no-any-return]
    weight, product = _weight_of(layer, x), product_dtype(x)
    out: Tensor = _NormedLinear.apply(x, norm.weight, norm.eps, weight, product)  # type: ignore[no-untyped-call]
    return out


def added_normed_linear(x: Tensor, branch: Tensor, norm: nn.RMSNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """`x + branch`, and of that `layer(norm(...))` of a layer without bias; the sum isn't kept."""
    if norm.eps is None or not _by_hand(x):
        total = x + branch
        return total, layer(normed(total, norm))
    weight, product = _weight_of(layer, x), product_dtype(x)
    out: tuple[Tensor, Tensor] = _AddedNormedLinear.apply(x, branch, norm.weight, norm.eps, weight, product)  # type: ignore[no-untyped-call]
    return out


def swiglu_linear(gate_up: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(silu(gate) * up)` of `[..., 2 M]`, gate first, and a layer without bias."""
    if not _by_hand(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return layer(F.silu(gate) * up)  # type: ignore[no-any-return]
    out: Tensor = _SwiGLULinear.apply(gate_up, _weight_of(layer, gate_up), product_dtype(gate_up))  # type: ignore[no-untyped-call]
    return out


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _weight_of(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer's weight, or its one copy for products of x where several passes share them."""
    weight, wanted = layer.weight, product_dtype(x)
    if _casts is None or weight.dtype == wanted or not torch.is_grad_enabled():
        return weight
    if id(weight) not in _casts:
        _casts[id(weight)] = weight, weight.to(wanted)
    return _casts[id(weight)][1]


def _rms(x: Tensor, weight: Tensor, eps: float, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm in fp32, and the factor of each row."""
    scale = x.float().square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(result), scale


def _rms_backward(
    grad: Tensor, x: Tensor, units: Tensor, scale: Tensor, weight: Tensor, *, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the weight; `units` are x times its rows' factors."""
    gradient = grad.float()
    product = gradient * units
    along = (product @ weight.to(product.dtype)).div_(x.shape[-1])[..., None]
    grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if wants_weight else None
    del product
    grad_x = gradient * weight if gradient is grad else gradient.mul_(weight)
    return grad_x.addcmul_(units, along, value=-1).mul_(scale).to(x.dtype), grad_weight


def _cast(weight: Tensor, x: Tensor, wanted: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight as a product with x takes it, and what of it is kept: of few rows the cast, of many the weight."""
    taken = weight.to(wanted)
    return taken, weight if x[..., 0].numel() >= ROWS_OF_A_CAST else taken


def _product_backward(grad: Tensor, x: Tensor, ctx: Any, place: int) -> Tensor | None:
    """The gradient of the weight, input number `place`, of a product of x; `[..., M]`, `[..., D]` -> `[M, D]`."""
    if not ctx.needs_input_grad[place]:
        return None
    return (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.weight_dtype)


def _normed_product_backward(
    ctx: Any, grad: Tensor, x: Tensor, units: Tensor, kept: tuple[Tensor, Tensor, Tensor], place: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of what was normed, of the norm's weight, input number `place`, and of the product's, two inputs on.

    Args:
        ctx: of the pass.
        grad: of the product's result.
        x: of the precision that was normed.
        units: what was normed times its rows' factors.
        kept: the norm's weight, the factors, and the product's weight.
        place: of the norm's weight.
    """
    norm, scale, weight = kept
    grad_weight = _product_backward(grad, (units * norm).to(ctx.product), ctx, place + 2)
    grad_normed = grad @ weight.to(ctx.product)
    wants_norm = ctx.needs_input_grad[place]
    grad_x, grad_norm = _rms_backward(grad_normed, x, units, scale, norm, wants_weight=wants_norm)
    return grad_x, grad_norm, grad_weight


class _RMSNorm(torch.autograd.Function):
    """In fp32, whatever comes and goes; keeps x and a number for each of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, result: torch.dtype) -> Tensor:
        out, scale = _rms(x, weight, eps, result)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1]
        return *_rms_backward(grads[0], x, x * scale, scale, weight, wants_weight=wants_weight), None, None


class _NormedLinear(torch.autograd.Function):
    """Keeps what `_RMSNorm` does; the norm's result is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, weight: Tensor, product: torch.dtype) -> Tensor:
        ctx.weight_dtype, ctx.product = weight.dtype, product
        taken, kept = _cast(weight, x, product)
        normed, scale = _rms(x, norm, eps, product)
        ctx.save_for_backward(x, norm, scale, kept)
        return F.linear(normed, taken)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale, weight = ctx.saved_tensors
        grad_x, grad_norm, grad_weight = _normed_product_backward(ctx, grads[0], x, x * scale, (norm, scale, weight), 1)
        return grad_x, grad_norm, None, grad_weight, None


class _AddedNormedLinear(torch.autograd.Function):
    """Keeps x and the branch, which has half of its bytes under autocast; their sum is made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, norm: Tensor, eps: float, weight: Tensor, product: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.weight_dtype, ctx.product = weight.dtype, product
        taken, kept = _cast(weight, x, product)
        total = x + branch
        normed, scale = _rms(total, norm, eps, product)
        ctx.save_for_backward(x, branch, norm, scale, kept)
        return total, F.linear(normed, taken)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, branch, norm, scale, weight = ctx.saved_tensors
        total = x + branch
        units = total.mul_(scale) if total.dtype == scale.dtype else total * scale
        grad, grad_norm, grad_weight = _normed_product_backward(ctx, grads[1], x, units, (norm, scale, weight), 2)
        grad = grad.add_(grads[0])
        return grad, grad.to(branch.dtype), grad_norm, None, grad_weight, None


class _SwiGLULinear(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, product: torch.dtype) -> Tensor:
        ctx.weight_dtype, ctx.product = weight.dtype, product
        taken, kept = _cast(weight, gate_up, product)
        ctx.save_for_backward(gate_up, kept)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), taken)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = F.silu(gate)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_up.copy_(hidden)
        grad_weight = _product_backward(grads[0], hidden.mul_(up), ctx, 1)
        del hidden
        grad_hidden = grads[0] @ weight.to(ctx.product)
        grad_up.mul_(grad_hidden)
        torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weight, None
