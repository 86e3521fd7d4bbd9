"""What processors compute by other ways than the plain formulas: norm, SwiGLU and attention in blocks."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toto.model import blockwise, fused
from toto.model.blockwise import blockwise_attention
from toto.model.fused import added_normed_linear, linear, normed, normed_linear, swiglu_linear, weights_cast_once
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
    norm, up, down = (
        nn.RMSNorm(6, eps=1e-5).double(),
        nn.Linear(6, 8, bias=False).double(),
        nn.Linear(4, 6, bias=False).double(),
    )
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def plain(x):
        gate, rest = up(norm(x)).chunk(2, dim=-1)
        return norm(x), down(F.silu(gate) * rest)

    def ours(x):
        return normed(x, norm), swiglu_linear(normed_linear(x, norm, up), down)

    def plain_sum(x):
        total = x + x.sin()
        return total, up(norm(total)), x

    def our_sum(x):
        return *added_normed_linear(x, x.sin(), norm, up), x

    for way, expected, wanted in (
        (ours, plain, [x, norm.weight, up.weight, down.weight]),
        (our_sum, plain_sum, [x, norm.weight, up.weight]),
    ):
        found, right = way(x), expected(x)
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-6)
        of_ours, of_plain = (
            torch.autograd.grad(sum(out.sin().sum() for out in outs), wanted) for outs in (found, right)
        )
        torch.testing.assert_close(of_ours, of_plain, atol=1e-6, rtol=1e-6)
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda gate_up, weight: F.linear(swiglu_linear(gate_up, down), weight), (gate_up, up.weight)
    )


@pytest.mark.parametrize("rows", [fused.ROWS_OF_A_CAST, 40])
def test_in_bf16_norm_and_swiglu_are_as_near_to_fp64_as_the_plain_way(rows, monkeypatch):
    monkeypatch.setattr(fused, "ROWS_OF_A_CAST", rows)  # weights are kept as they are cast, and as they are
    torch.manual_seed(0)
    norm, up, down = nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 128, bias=False), nn.Linear(64, 64, bias=False)
    norm.weight.data.normal_(1, 0.1)
    x, gradient = torch.randn(40, 64), torch.randn(40, 64)

    def plain(x, norm, up, down):
        x = x + down(norm(x))
        gate, rest = up(norm(x)).chunk(2, dim=-1)
        return x + down(F.silu(gate) * rest)

    def ours(x, norm, up, down):
        x, gate_up = added_normed_linear(x, normed_linear(x, norm, down), norm, up)
        return x + swiglu_linear(gate_up, down)

    def gradients(way, dtype):
        layers = [copy.deepcopy(layer).to(dtype) for layer in (norm, up, down)]
        given = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = way(given, *layers)
        out.backward(gradient.to(out.dtype))
        return [out.detach(), given.grad, *(layer.weight.grad for layer in layers)]

    exact = gradients(plain, torch.float64)
    for right, found, other in zip(exact, gradients(ours, torch.float32), gradients(plain, torch.float32), strict=True):
        assert found.dtype == other.dtype
        assert (found - right).norm() < 1.3 * (other - right).norm()


def test_weights_are_cast_once_for_several_passes():
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        expected.sum().backward()
        (2 * layer(x)).sum().backward()
    once, layer.weight.grad = layer.weight.grad.clone(), None
    with weights_cast_once(), torch.autocast("cpu", torch.bfloat16):
        for factor in (1, 2):
            out = linear(x, layer)
            assert out.equal(expected)
            (factor * out).sum().backward()
            assert len(fused._casts) == 1
    assert fused._casts is None
    assert layer.weight.grad.equal(once)
    with torch.no_grad():
        layer.weight.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear(x, layer).equal(expected)


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
