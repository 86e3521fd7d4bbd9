"""Clipping inside the optimizer's kernel is clipping before it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from toto.training.optimizer import OptimizerConfig, clipped_step, gradient_norm, make_optimizer


@pytest.mark.parametrize("size", [0.01, 30.0], ids=["below the limit", "above it"])
def test_a_clipped_step_is_torchs(size):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3))
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(peak_lr=0.1, clip=0.5)
    steps = [make_optimizer(model, config) for model in (ours, theirs)]
    for _ in range(4):
        for weight, same in zip(ours.parameters(), theirs.parameters(), strict=True):
            weight.grad = size * torch.randn_like(weight)
            same.grad = weight.grad.clone()
        norm = gradient_norm(ours.parameters())
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip))
        clipped_step(steps[0], norm, config.clip)
        steps[1].step()
        for weight, same in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(weight, same)
    assert not hasattr(steps[0], "grad_scale")
