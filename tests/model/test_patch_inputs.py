"""The decoder with patch inputs: what it sees, what it predicts, and what it costs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from toto.model.budget import parameter_table
from toto.model.config import SPECIAL_IDS, ModelConfig, size, with_patch_values
from toto.model.transformer import Transformer
from toto.model.weights import Card, load_model, save_model
from toto.runtime.errors import ConfigError
from toto.tokens.sequence import CODE_OFFSET, pack

CODES = ModelConfig(
    vocab_size=40, width=32, layers=3, heads=2, mlp_hidden=48, inputs="patches", targets="codes", patch_values=12
)
PIXELS = dataclasses.replace(CODES, targets="pixels")


@pytest.fixture(params=[CODES, PIXELS], ids=["codes", "pixels"])
def model(request):
    torch.manual_seed(0)
    return Transformer(request.param).eval()


def sequence(batch=2):
    return pack(torch.randint(0, 36, (batch, 2, 2, 2)), "video"), torch.randn(batch, 8, 12)


def test_the_models_special_ids_are_those_of_the_sequences():
    assert SPECIAL_IDS == CODE_OFFSET


def test_the_ids_of_visual_positions_are_never_looked_at(model):
    tokens, patches = sequence()
    others = tokens.clone()
    others[:, 1:-1] = 10_000  # no such id: embedding it would fail
    assert model(others, patches=patches).logits.equal(model(tokens, patches=patches).logits)
    images = tokens.clone()
    images[:, 0] = 3
    assert not model(images, patches=patches).logits.allclose(model(tokens, patches=patches).logits)


def test_no_position_sees_a_later_patch(model):
    tokens, patches = sequence(1)
    changed = patches.clone()
    changed[0, 5] += 1  # at position 6, after the start
    a, b = model(tokens, patches=patches).logits, model(tokens, patches=changed).logits
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert all(not torch.allclose(a[:, place], b[:, place]) for place in range(6, 10))


@pytest.mark.parametrize("pieces", [[10], [1, 4, 4, 1], [5, 5], [1] * 10])
def test_the_cache_changes_nothing(model, pieces):
    tokens, patches = sequence()
    whole = model(tokens, patches=patches).logits
    cache, parts, place = model.new_cache(2, 10), [], 0
    for piece in tokens.split(pieces, dim=1):
        first, place = max(0, place - 1), place + piece.shape[1]
        output = model(piece, patches=patches[:, first : min(8, place - 1)], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_outputs_are_the_next_codes_or_the_next_patches(model):
    tokens, patches = sequence()
    output = model(tokens, patches=patches, layers=[0, 3])
    assert output.logits.shape == (2, 10, 12 if model.config.targets == "pixels" else 40)
    torch.testing.assert_close(model.head(model.norm(output.hidden_states[3])), output.logits)
    torch.testing.assert_close(output.hidden_states[0][:, 1:-1], model.patch_embedding(patches))
    torch.testing.assert_close(output.hidden_states[0][:, [0, -1]], model.embedding(tokens[:, [0, -1]]))


def test_biases_begin_at_zero_and_norms_at_one(model):
    names = {name for name, weight in model.named_parameters() if name.endswith("bias") and not weight.any()}
    assert names == {"patch_embedding.bias"} | ({"head.bias"} if model.config.targets == "pixels" else set())
    assert all(bool((weight == 1).all()) for name, weight in model.named_parameters() if "norm" in name)


def test_the_counted_parameters_are_there(model):
    assert sum(weight.numel() for weight in model.parameters()) == parameter_table(model.config)["total"]


def test_patches_that_do_not_fit_are_refused(model):
    tokens, patches = sequence()
    with pytest.raises(ConfigError, match="inputs are patches, and none are given"):
        model(tokens)
    with pytest.raises(ConfigError, match="patches: 6 don't fit a sequence of 10 ids"):
        model(tokens, patches=patches[:, :6])
    with pytest.raises(ConfigError, match="inputs are tokens"):
        Transformer(size("nano", vocab_size=40))(tokens, patches=patches)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inputs": "tokens", "patch_values": None}, "predicted from patches alone; set model.inputs"),
        ({"inputs": "tokens", "targets": "codes"}, "token inputs have no patches"),
        ({"tie_embeddings": True}, "no embedding to share"),
        ({"patch_values": 0}, "at least 1"),
    ],
)
def test_impossible_combinations_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PIXELS, **wrong)
    with pytest.raises(ConfigError, match="the data has patches of 48"):
        with_patch_values(PIXELS, 48)
    with pytest.raises(ConfigError, match=r"model\.patch_values: is not set yet"):
        Transformer(dataclasses.replace(PIXELS, patch_values=None))


def test_a_saved_model_comes_back_the_same(model, tmp_path):
    save_model(tmp_path, model, Card(passport={"kind": "x"}, sequence={"frames": 2}))
    tokens, patches = sequence()
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again(tokens, patches=patches).logits.equal(model(tokens, patches=patches).logits)


def test_checkpoints_that_are_older_than_patches_load(tmp_path):
    model = Transformer(size("nano", vocab_size=40))
    save_model(tmp_path, model, Card(passport={"kind": "x"}, sequence={"frames": 2}))
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("inputs", "targets", "patch_values"):
        del config["architecture"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).config == model.config
