"""RMSNorm and SwiGLU for processors without a compiler: they keep their inputs alone for the backward pass.

On GPUs torch has such a norm, and torch.compile makes both; there the plain formulas are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toto.runtime.device import product_dtype


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm(x)`; an RMSNorm's in the precision of the matrix product that takes it, where that comes for nothing."""
    if not isinstance(norm, nn.RMSNorm):
        return norm(x)  # type: ignore[no-any-return]
    if norm.eps is None or not _by_hand(x):  # gathered weights may be bf16
        return F.rms_norm(x, list(norm.normalized_shape), norm.weight.to(x.dtype), norm.eps)
    out: Tensor = _RMSNorm.apply(x, norm.weight, norm.eps, product_dtype(x))  # type: ignore[no-untyped-call]
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2 M]`, gate first."""
    if not _by_hand(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    """In fp32, whatever comes and goes; keeps x and a number for each of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, result: torch.dtype) -> Tensor:
        scale = x.float().square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        gradient = grads[0].float()
        units = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * units).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = gradient * weight
        along = torch.linalg.vecdot(grad_x, units)[..., None].div_(x.shape[-1])
        return grad_x.addcmul_(units, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None, None


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grads[0], out=grad_up)
        torch.ops.aten.silu_backward(up * grads[0], gate, grad_input=grad_gate)
        return grad_gate_up
