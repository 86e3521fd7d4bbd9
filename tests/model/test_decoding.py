"""The prepared decoder against the model itself, and rounded weights against what they are rounded from."""

from __future__ import annotations

import pytest
import torch

import toto.model.quantised as quantised
from toto.model.config import ModelConfig
from toto.model.decoding import Decoder, prepare, rounded_model
from toto.model.quantised import prepared, rounded
from toto.model.transformer import Transformer
from toto.runtime.errors import ConfigError

CONFIG = {"vocab_size": 50, "width": 48, "layers": 3, "heads": 2, "mlp_hidden": 70}
WEIGHTS = ("fp32", "bf16", "int8")


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**CONFIG)).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def read(decoder: Decoder, model: Transformer, tokens, pieces) -> torch.Tensor:
    """Logits after each piece of a sequence."""
    cache, found = model.new_cache(len(tokens), tokens.shape[1]), []
    for piece in tokens.split(pieces, dim=1):
        logits, cache = decoder.next_logits(piece, cache)
        found.append(logits)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("pieces", [[1] * 20, [15, *[1] * 5], [7, 1, 8, 1, 3], [20]])
def test_logits_are_those_of_the_model_without_a_cache(model, weights, batch, pieces, monkeypatch):
    monkeypatch.setattr("toto.model.decoding.use_bf16", lambda *_: False)
    tokens = torch.randint(0, 50, (batch, 20))
    found = read(prepare(model, batch=batch, room=20, weights=weights), model, tokens, pieces)
    wanted = rounded_model(model, weights)(tokens).logits[:, torch.tensor(pieces).cumsum(0) - 1]
    atol = 5e-3 if weights == "int8" and batch > quantised.BAGGED else 2e-5  # then float16 holds int8's values
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_prompts_read_in_bfloat16_stay_close(model, weights, monkeypatch):
    monkeypatch.setattr("toto.model.decoding.use_bf16", lambda *_: True)
    tokens = torch.randint(0, 50, (2, 20))
    found = read(prepare(model, batch=2, room=20, weights=weights), model, tokens, [10, 6, 4])
    wanted = rounded_model(model, weights)(tokens).logits[:, [9, 15, 19]]
    torch.testing.assert_close(found, wanted, atol=0.03 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("changed", [{"tie_embeddings": True}, {"vocab_size": 333, "rope_base": 100.0}, {"heads": 24}])
def test_other_shapes(changed):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**CONFIG | changed))
    tokens = torch.randint(0, 50, (1, 12))
    found = read(prepare(model, batch=1, room=12), model, tokens, [8, 1, 1, 1, 1])
    torch.testing.assert_close(found, model(tokens).logits[:, 7:], atol=1e-5, rtol=1e-4)


def test_a_cache_of_half_precision_serves_as_well(model):
    tokens, decoder = torch.randint(0, 50, (1, 9)), prepare(model, batch=1, room=9)
    cache = model.new_cache(1, 9, torch.bfloat16)
    for piece in tokens.split([5, 2, 1, 1], dim=1):
        logits, cache = decoder.next_logits(piece, cache)
    wanted = model(tokens).logits[:, -1]
    torch.testing.assert_close(logits, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


def test_no_more_positions_than_there_is_room_for(model):
    decoder, tokens = prepare(model, batch=1, room=4), torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match="room for 4"):
        decoder.next_logits(tokens, model.new_cache(1, 8))
    with pytest.raises(ConfigError, match="room for 3"):
        decoder.next_logits(tokens, model.new_cache(1, 3))


def test_models_that_draw_no_tokens_are_refused():
    config = ModelConfig(**CONFIG, inputs="patches", targets="pixels", patch_values=12)
    with pytest.raises(ConfigError, match="patches"):
        prepare(Transformer(config), batch=1, room=4)
    with pytest.raises(ConfigError, match="full attention"):
        prepare(Transformer(ModelConfig(**CONFIG, attention="full")), batch=1, room=4)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_head_that_shares_the_embedding_is_rounded_alone(weights):
    model = Transformer(ModelConfig(**CONFIG, tie_embeddings=True)).requires_grad_(False)
    other, tokens = rounded_model(model, weights), torch.randint(0, 50, (1, 6))
    assert other.embedding.weight.equal(model.embedding.weight)
    assert not other.head.weight.equal(model.head.weight)
    found = read(prepare(model, batch=1, room=6, weights=weights), model, tokens, [1] * 6)
    torch.testing.assert_close(found, other(tokens).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("vectors", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (300, 64), (128, 256)])
def test_products_are_those_of_the_rounded_weights(weights, vectors, shape):
    weight, x = torch.randn(shape), torch.randn(vectors, shape[1])
    found = prepared(weight, weights, vectors)(x)
    wanted = (x.double() @ rounded(weight, weights).double().T).float()
    tolerance = 1e-5 if weights != "int8" or vectors <= quantised.BAGGED else 1e-2  # float16 holds int8's in 11 bits
    torch.testing.assert_close(found, wanted, atol=tolerance * shape[1] ** 0.5, rtol=tolerance)


def test_without_special_kernels_products_are_the_same(monkeypatch):
    weight, x = torch.randn(300, 64), torch.randn(3, 64)
    monkeypatch.setattr(quantised, "has_float16_matrices", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for weights in WEIGHTS:
        torch.testing.assert_close(prepared(weight, weights, 3)(x), x @ rounded(weight, weights).T)


def test_int8_is_off_by_half_a_level_at_most():
    weight = torch.randn(300, 40)
    wrong = (rounded(weight, "int8") - weight).abs()
    for first in range(0, 300, quantised.GROUP):
        group = weight[first : first + quantised.GROUP]
        if len(group) < quantised.GROUP:
            group = torch.cat([group, torch.zeros(1, 40)])
        level = (group.amax(0) - group.amin(0)) / 255
        assert (wrong[first : first + quantised.GROUP] <= 0.501 * level).all()
