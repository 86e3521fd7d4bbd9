"""The output layer with its loss, against torch's linear and cross_entropy."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.runtime.device import product_dtype
from toto.training.fused_loss import linear_cross_entropy
from toto.training.objective import next_token_loss


def inputs(rows=37, width=16, vocabulary=50):
    torch.manual_seed(0)
    states = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    return states, weight, torch.randint(0, vocabulary, (rows,))


def plain(states, weight, targets):
    return F.cross_entropy(F.linear(states, weight).float(), targets)


@pytest.mark.parametrize("rows", [1, 8, 37, 1000])
@pytest.mark.parametrize("padded_to", [1, 64])
def test_losses_and_gradients_are_torchs(rows, padded_to):
    states, weight, targets = inputs()
    mean, each = linear_cross_entropy(states, weight, targets, rows=rows, padded_to=padded_to)
    (3 * mean).backward()
    ours = states.grad, weight.grad
    states.grad = weight.grad = None
    expected = plain(states, weight, targets)
    (3 * expected).backward()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(each, F.cross_entropy(F.linear(states, weight), targets, reduction="none"))
    assert not each.requires_grad
    for found, wanted in zip(ours, (states.grad, weight.grad), strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)


def test_under_autocast_it_is_as_near_to_fp32_as_torchs():
    states, weight, targets = inputs(rows=300, width=64, vocabulary=500)
    plain(states, weight, targets).backward()
    exact, states.grad, weight.grad = (states.grad, weight.grad), None, None
    errors = []
    for way in (
        lambda: linear_cross_entropy(states, weight, targets, rows=128)[0],
        lambda: plain(states, weight, targets),
    ):
        states.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = way()
        loss.backward()
        errors.append(
            [float((found - right).norm()) for found, right in zip((states.grad, weight.grad), exact, strict=True)]
        )
    assert all(ours < 1.1 * theirs for ours, theirs in zip(*errors, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_models_loss_is_that_of_its_logits(tied, bf16):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=50, width=32, layers=2, heads=2, mlp_hidden=48, tie_embeddings=tied))
    tokens = torch.randint(0, 50, (3, 21))
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        loss = next_token_loss(model, tokens)
        logits = model(tokens[:, :-1]).logits.float()
        expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(loss.each, expected)
    torch.testing.assert_close(loss.mean, expected.mean())
    assert loss.each.shape == (3, 20)
    ours = torch.autograd.grad(loss.mean, list(model.parameters()))
    theirs = torch.autograd.grad(expected.mean(), list(model.parameters()))
    for found, wanted in zip(ours, theirs, strict=True):
        assert float((found - wanted).norm()) <= (0.02 if bf16 else 1e-5) * float(wanted.norm())


def test_logits_of_all_rows_never_lie_in_memory(monkeypatch):
    states, weight, targets = inputs(rows=400, width=8, vocabulary=900)
    with torch.profiler.profile(profile_memory=True) as profiler:
        linear_cross_entropy(states, weight, targets, rows=20)[0].backward()
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest < 400 * 900 * 4 / 4


def test_products_run_in_autocasts_precision():
    x = torch.zeros(2)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
    assert product_dtype(torch.zeros(2, device="meta")) == torch.float32
