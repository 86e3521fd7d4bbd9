"""The decoder by itself: the cache, causality, hidden states, sizes, and checkpoints that don't fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import toto
from toto.model.budget import parameter_line, parameter_table
from toto.model.config import ModelConfig, size, with_vocabulary
from toto.model.transformer import Transformer
from toto.model.weights import Card, load_card, load_model, save_model
from toto.runtime.errors import CheckpointError, ConfigError

TINY = ModelConfig(vocab_size=40, width=32, layers=3, heads=2, mlp_hidden=48)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(TINY).eval()


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 12], [19, 1]])
def test_the_cache_changes_nothing(model, pieces):
    tokens = torch.randint(0, 40, (2, 20))
    whole = model(tokens, layers=[1, 3])
    cache = model.new_cache(2, 20)
    parts = []
    for piece in tokens.split(pieces, dim=1):
        output = model(piece, layers=[1, 3], cache=cache)
        cache = output.cache
        parts.append(output)
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-5, rtol=1e-5)
    deep = torch.cat([part.hidden_states[3] for part in parts], 1)
    torch.testing.assert_close(deep, whole.hidden_states[3], atol=1e-5, rtol=1e-5)
    assert cache.length == 20


def test_an_old_cache_can_be_continued_anew(model):
    tokens = torch.randint(0, 40, (1, 10))
    seen = model(tokens[:, :6], cache=model.new_cache(1, 10)).cache
    first = model(tokens[:, 6:], cache=seen).logits
    torch.testing.assert_close(model(tokens[:, 6:], cache=seen).logits, first)
    with pytest.raises(ConfigError, match="room for 10 positions, 11"):
        model(torch.randint(0, 40, (1, 5)), cache=seen)


def test_no_position_sees_a_later_one(model):
    tokens = torch.randint(0, 40, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 40
    a, b = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_hidden_states_are_the_residual_stream(model):
    tokens = torch.randint(0, 40, (2, 9))
    output = model(tokens, layers=[0, 3])
    torch.testing.assert_close(output.hidden_states[0], model.embedding(tokens))
    torch.testing.assert_close(model.head(model.norm(output.hidden_states[3])), output.logits)
    with pytest.raises(ConfigError, match="0 to 3"):
        model(tokens, layers=[4])


@pytest.mark.parametrize(
    ("name", "tied", "mlp", "millions"),
    [
        ("base", True, "labels", 119.6),
        ("base", False, "labels", 125.9),
        ("large", False, "labels", 285.3),
        ("1b", False, "labels", 1164.0),
        ("base", False, "llama", 97.5),
        ("large", False, "llama", 222.3),
    ],
)
def test_sizes_have_the_counted_parameters(name, tied, mlp, millions):
    from dataclasses import replace

    config = replace(size(name, vocab_size=8195, mlp=mlp), tie_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(config)
    counted = sum(weight.numel() for weight in model.parameters())
    assert counted == parameter_table(config)["total"]
    assert counted / 1e6 == pytest.approx(millions, abs=0.06)
    assert f"{counted / 1e6:.2f}M parameters" in parameter_line(config)


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"width": 0}, {"rope_base": 1.0}, {"heads": 32}])
def test_impossible_architectures_are_refused(wrong):
    with pytest.raises(ConfigError):
        ModelConfig(**({"width": 32, "layers": 2, "heads": 2, "mlp_hidden": 48} | wrong))


def test_unknown_sizes_and_other_vocabularies_are_refused():
    with pytest.raises(ConfigError, match="known sizes: nano"):
        size("huge")
    with pytest.raises(ConfigError, match="the data needs 50"):
        with_vocabulary(TINY, 50)


@pytest.fixture
def saved(model, tmp_path):
    save_model(tmp_path, model, Card(passport={"kind": "x"}, sequence={"frames": 4}, training={"step": 3}))
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_the_same(tmp_path, tied):
    from dataclasses import replace

    model = Transformer(replace(TINY, tie_embeddings=tied)).eval()
    save_model(tmp_path, model, Card(passport={"kind": "x"}, sequence={"frames": 4}))
    again = toto.load_model(tmp_path)
    tokens = torch.randint(0, 40, (1, 8))
    assert again(tokens).logits.equal(model(tokens).logits)
    assert again.config == model.config
    assert load_card(tmp_path).sequence == {"frames": 4}
    assert ("head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def test_every_misfit_of_the_weights_is_listed(saved):
    weights = load_file(saved / "model.safetensors")
    weights["surplus"] = weights.pop("norm.weight")
    weights["embedding.weight"] = weights["embedding.weight"][:, :8].clone()
    weights["head.weight"][0, 0] = float("nan")
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(saved)
    for part in (
        "norm.weight is missing",
        "surplus is surplus",
        "embedding.weight is (40, 8)",
        "head.weight holds NaN",
    ):
        assert part in str(error.value)


def test_damaged_and_missing_checkpoints_are_refused_in_one_line(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_model(saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"architecture": {"width": 3}}))
    with pytest.raises(CheckpointError, match="bad architecture"):
        load_model(saved)
    (saved / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a toto-model"):
        load_model(saved)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_model(tmp_path.parent)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(tmp_path / "a" / "b" / "c")


def test_a_hub_id_without_a_network_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hub can't give it"):
        load_model("somebody/nothing")
