"""The operations that are planned are those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from toto.model.budget.flops import positions_of, training_flops
from toto.model.config import ModelConfig, size
from toto.model.transformer import Transformer
from toto.training.objective import next_token_loss

aten = torch.ops.aten
TINY = ModelConfig(vocab_size=68, width=32, layers=2, heads=2, mlp_hidden=48)


def forward_flops(query, key, value, *others, **named):
    return sdpa_flop_count(query, key, value)


def backward_flops(gradient, query, key, value, *others, **named):
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch registers only the kernels of GPUs; the CPU's has the same arguments.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}


def counted(config, *, batch, visual, device="meta", **counter):
    """What torch counts in a forward and a backward pass."""
    with torch.device(device):
        model = Transformer(config)
        tokens = torch.ones(batch, visual + 2, dtype=torch.int64)
        patches = torch.zeros(batch, visual, config.values_in_patch) if config.inputs == "patches" else None
        with FlopCounterMode(display=False, **counter) as counts:
            next_token_loss(model, tokens, patches).mean.backward()
    return counts.get_total_flops()


def planned(config, *, batch, visual):
    return training_flops(config, batch=batch, positions=positions_of(config, visual), scores="all")


@pytest.mark.parametrize("name", ["nano", "base", "large", "1b", "a1", "a6"])
@pytest.mark.parametrize("visual", [16, 4096])
def test_named_sizes_at_short_and_long_sequences(name, visual):
    config = replace(size(name, vocab_size=8196), layers=3)
    assert planned(config, batch=1, visual=visual).total == pytest.approx(
        counted(config, batch=1, visual=visual), rel=0.001
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"inputs": "patches", "patch_values": 12},
        {"inputs": "patches", "patch_values": 12, "targets": "pixels"},
    ],
)
def test_tied_and_patch_models(changes):
    config = replace(TINY, **changes)
    assert planned(config, batch=3, visual=40).total == pytest.approx(counted(config, batch=3, visual=40), rel=0.01)


@pytest.mark.parametrize("visual", [8, 300])
def test_a_flash_kernel_computes_the_scores_once_more(visual):
    flops = planned(TINY, batch=2, visual=visual)
    found = counted(TINY, batch=2, visual=visual, device="cpu", custom_mapping=CPU_ATTENTION)
    assert flops.total + flops.scores_again == found


def test_causal_pairs_are_half_of_all_and_the_diagonal():
    config = size("base", vocab_size=8196)
    causal, full = (training_flops(config, batch=1, positions=100, scores=scores) for scores in ("causal", "all"))
    assert causal.forward["attention"] / full.forward["attention"] == (100 * 101 / 2) / 100**2
    assert {**causal.forward, "attention": 0} == {**full.forward, "attention": 0}
    first = training_flops(config, batch=1, positions=1, scores="causal")
    assert first == training_flops(config, batch=1, positions=1, scores="all")


def test_published_scaling_curves_begin_where_the_reconstructed_sizes_do():
    """First points of the paper's five compute curves (its scaling figure); one unit for all of them is free."""
    published = {"a1": 2.566e13, "a2": 1.081e14, "a3": 2.817e14, "a4": 5.760e14, "a6": 2.269e15}
    units = []
    for name, compute in published.items():
        config = size(name, vocab_size=16384)
        flops = training_flops(config, batch=1, positions=256, scores="causal")
        units.append(compute / (sum(flops.forward.values()) / 2 / 256))
    assert max(units) / min(units) < 1.02
