"""What processors compute by other ways than the plain formulas: norm, SwiGLU and attention in blocks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toto.model import blockwise
from toto.model.blockwise import blockwise_attention
from toto.model.fused import normed, swiglu
from toto.model.layers import rotary_angles, rotate


def attention(qkv, angles, heads, scale):
    """The plain way, in the precision of what is given."""
    B, S, packed = qkv.shape
    q, k, v = qkv.view(B, S, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, *angles), rotate(k, *angles)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return mixed.transpose(1, 2).reshape(B, S, packed // 3)


def with_gradient(function, x, gradient, *others):
    x = x.clone().requires_grad_()
    out = function(x, *others)
    out.backward(gradient)
    return out.detach().double(), x.grad.double()


@pytest.mark.parametrize("queries", [16, 64, 256])
@pytest.mark.parametrize(("batch", "positions"), [(2, 1), (1, 16), (2, 70)])
def test_attention_in_blocks_is_as_near_to_fp64_as_torchs_kernel(monkeypatch, queries, batch, positions):
    monkeypatch.setattr(blockwise, "QUERIES", queries)
    torch.manual_seed(0)
    qkv, gradient = torch.randn(batch, positions, 3 * 96), torch.randn(batch, positions, 96)
    angles = rotary_angles(0, positions, 24, 100.0, torch.device("cpu"))
    qkv, gradient = qkv.bfloat16(), gradient.bfloat16()
    exact = with_gradient(attention, qkv.double(), gradient.double(), tuple(a.double() for a in angles), 4, 0.2)
    ours = with_gradient(blockwise_attention, qkv, gradient, angles, 4, 0.2)
    theirs = with_gradient(attention, qkv, gradient, angles, 4, 0.2)
    for right, found, kernel in zip(exact, ours, theirs, strict=True):
        assert (found - right).norm() < 1.5 * (kernel - right).norm() + 2e-3 * right.norm()


def test_no_position_in_blocks_sees_a_later_one(monkeypatch):
    monkeypatch.setattr(blockwise, "QUERIES", 8)
    torch.manual_seed(0)
    angles = rotary_angles(0, 14, 8, 100.0, torch.device("cpu"))
    qkv = torch.randn(1, 14, 48).bfloat16()
    changed = qkv.clone()
    changed[:, 9:] += 1
    a, b = (blockwise_attention(x, angles, 2, 0.3) for x in (qkv, changed))
    assert a[:, :9].equal(b[:, :9])
    assert not a[:, 9:].equal(b[:, 9:])


def test_the_operators_keep_torchs_rules():
    angles = rotary_angles(0, 6, 8, 100.0, torch.device("cpu"))
    qkv = torch.randn(2, 6, 48).bfloat16().requires_grad_()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.toto.blockwise_attention.default, (qkv, *angles, 2, 0.3), test_utils=tests)
    out, turned = torch.ops.toto.blockwise_attention(qkv.detach(), *angles, 2, 0.3)
    backward = torch.ops.toto.blockwise_attention_backward.default
    torch.library.opcheck(backward, (out, turned, *angles, 0.3), test_utils=tests)


def test_norm_and_swiglu_have_the_gradients_of_the_formulas():
    torch.manual_seed(0)
    norm = nn.RMSNorm(6, eps=1e-5).double()
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normed(x, norm), norm(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(normed(x, norm).sin().sum(), [x, norm.weight]),
        torch.autograd.grad(norm(x).sin().sum(), [x, norm.weight]),
        atol=1e-6,
        rtol=1e-6,
    )
    assert torch.autograd.gradcheck(swiglu, x)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up)


def test_a_norm_gives_what_the_product_after_it_takes():
    norm = nn.RMSNorm(8, eps=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert normed(torch.randn(2, 8), norm).dtype == torch.bfloat16
    assert normed(torch.randn(2, 8), norm).dtype == torch.float32


COMPILED = """
import torch
from toto.model.config import ModelConfig
from toto.model.layers import Block, rotary_angles
torch.manual_seed(0)
block = Block(ModelConfig(vocab_size=8, width=16, layers=1, heads=2, mlp_hidden=24), 0)
angles = rotary_angles(0, 9, 8, 100.0, torch.device("cpu"))
x = torch.randn(1, 9, 16)
compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
for bf16 in (False, True):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        plain, ours = block(x, angles, None), compiled(x, angles, None)
    torch.testing.assert_close(ours, plain, atol=0.02 if bf16 else 1e-5, rtol=0.02)
    ours.sum().backward()
assert all(weight.grad is not None for weight in block.parameters())
"""


def test_a_block_is_compiled_as_one_graph():
    """In a process of its own, where shapes aren't checked: the checks can't be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
