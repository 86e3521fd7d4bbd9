"""The parametrisation is asked everywhere it matters: one that differs in everything shows up everywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from toto.model import parametrisation as module
from toto.model.config import ModelConfig
from toto.model.parametrisation import Parametrisation, Standard, WeightRule
from toto.model.transformer import Transformer
from toto.training.optimizer import OptimizerConfig, make_optimizer, set_learning_rate

CONFIG = ModelConfig(vocab_size=40, width=32, layers=3, heads=2, mlp_hidden=48)


class Other(Parametrisation):
    """Differs from `Standard` in everything."""

    def attention_scale(self, config):
        return 1 / config.head_size

    def output_multiplier(self, config):
        return 0.25

    def rule(self, name, dimensions, config):
        rule = Standard().rule(name, dimensions, config)
        if "mlp" in name and dimensions == 2:
            return replace(rule, std=0.5, rate=0.1, decay=3.0)
        return rule


@pytest.fixture
def other(monkeypatch):
    monkeypatch.setitem(module.PARAMETRISATIONS, "standard", Other())
    torch.manual_seed(0)
    return Transformer(CONFIG)


def test_standard_is_llamas():
    rules = Transformer(CONFIG).weight_rules()
    assert rules["embedding.weight"] == WeightRule(std=0.02, decay=1.0)
    assert rules["blocks.1.attention.out.weight"].std == rules["blocks.1.mlp.down.weight"].std == 0.02 / math.sqrt(6)
    assert rules["norm.weight"] == WeightRule(mean=1.0, decay=0.0)
    assert {rule.rate for rule in rules.values()} == {1.0}
    assert Standard().attention_scale(CONFIG) == 16**-0.5
    assert Standard().output_multiplier(CONFIG) == 1


def test_initial_weights_follow_the_rules(other):
    assert float(other.blocks[0].mlp.gate_up.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert float(other.blocks[0].attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert bool((other.norm.weight == 1).all())


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_is_multiplied_once(monkeypatch, tied):
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, tie_embeddings=tied))
    tokens = torch.randint(0, 40, (1, 6))
    plain = model(tokens).logits
    monkeypatch.setattr(model.head, "multiplier", 0.25)
    torch.testing.assert_close(model(tokens).logits, 0.25 * plain)


def test_scores_are_scaled_with_and_without_a_cache(other):
    tokens = torch.randint(0, 40, (1, 6))
    whole = other(tokens).logits
    cached = other(tokens[:, 3:], cache=other(tokens[:, :3], cache=other.new_cache(1, 6)).cache).logits
    torch.testing.assert_close(cached, whole[:, 3:], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for block in other.blocks:
            block.attention.qkv.weight[:32] *= 16**0.5  # queries that make up for 1 / K
            block.attention.scale /= 16**0.5
    torch.testing.assert_close(other(tokens).logits, whole, atol=1e-5, rtol=1e-5)


def test_rates_and_decay_follow_the_rules(other):
    optimizer = make_optimizer(other, OptimizerConfig(weight_decay=0.1), rules=other.weight_rules())
    set_learning_rate(optimizer, 1e-2)
    names = {id(weight): name for name, weight in other.named_parameters()}
    found = {
        names[id(weight)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["blocks.2.mlp.down.weight"] == pytest.approx((1e-3, 0.3))
    assert found["blocks.2.attention.out.weight"] == pytest.approx((1e-2, 0.1))
    assert found["norm.weight"] == pytest.approx((1e-2, 0.0))


def test_each_weight_is_in_one_group_where_the_output_is_tied():
    model = Transformer(replace(CONFIG, tie_embeddings=True))
    optimizer = make_optimizer(model, OptimizerConfig(), rules=model.weight_rules())
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())
