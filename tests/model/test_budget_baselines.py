"""Operations that are planned for the baselines are those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from toto.model.architectures import build
from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.budget.baselines import baseline_flops, uncounted_share

GPT = GPT2Config(vocab_size=260, width=64, layers=3, heads=4, mlp_hidden=224)
MAMBA = MambaConfig(vocab_size=260, width=64, layers=3)


def counted(config, *, batch, positions):
    """What torch counts in a forward and a backward pass, its matrix products and attention over all pairs."""
    with torch.device("meta"):
        model = build(config)
        ids = torch.ones(batch, positions, dtype=torch.int64)
        with FlopCounterMode(display=False) as counts:
            model(ids).logits.sum().backward()
    return counts.get_total_flops()


@pytest.mark.parametrize("config", [GPT, replace(GPT, tie_embeddings=False), MAMBA, replace(MAMBA, state_size=8)])
@pytest.mark.parametrize("positions", [17, 200])
def test_planned_operations_are_counted_ones(config, positions):
    planned = baseline_flops(config, batch=2, positions=positions, scores="all").total
    assert planned == pytest.approx(counted(config, batch=2, positions=positions), rel=0.01)


def test_the_models_of_table_6():
    gpt = GPT2Config(vocab_size=8196, width=1024, layers=2, heads=16, mlp_hidden=4096)
    mamba = MambaConfig(vocab_size=8196, width=1024, layers=2)
    for config in (gpt, mamba):
        planned = baseline_flops(config, batch=1, positions=129, scores="all").total
        assert planned == pytest.approx(counted(config, batch=1, positions=129), rel=0.01)
    assert uncounted_share(gpt) == 0
    assert 0.005 < uncounted_share(replace(mamba, layers=42)) < 0.02


def test_causal_pairs_are_fewer_and_mamba_has_none():
    causal, full = (baseline_flops(GPT, batch=3, positions=50, scores=scores) for scores in ("causal", "all"))
    assert causal.forward["attention"] * 2 * 50 == full.forward["attention"] * 51
    assert baseline_flops(MAMBA, batch=3, positions=50) == baseline_flops(MAMBA, batch=3, positions=50, scores="all")
    once, twice = (baseline_flops(MAMBA, batch=1, positions=n).total for n in (40, 80))
    assert twice == 2 * once
