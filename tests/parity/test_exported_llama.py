"""Exported folders in transformers: logits and greedy tokens equal, and what transformers saves comes back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import toto
from toto.generation.rollout import continue_codes
from toto.generation.sampler import SamplerConfig
from toto.model.config import SHAPES, ModelConfig, size
from toto.model.parametrisation import PARAMETRISATIONS, Standard
from toto.model.transformer import Transformer
from toto.model.weights import Card, load_llama, save_llama
from toto.tokens.sequence import CODE_OFFSET, VIDEO_START

transformers = pytest.importorskip("transformers")
CARD = Card(passport={"kind": "x"}, sequence={"frames": 4, "rows": 3, "cols": 3, "stride": 4}, training={"step": 3})
TINY = ModelConfig(vocab_size=60, width=32, layers=2, heads=2, mlp_hidden=48)


def random_model(config: ModelConfig) -> Transformer:
    """A model whose norms are not one and whose likeliest tokens differ clearly."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for weight in model.parameters():
        weight.data = 3 * weight.data + 0.05 * torch.randn_like(weight)
    return model


def exported(model: Transformer, folder, **kind):
    """The exported folder in transformers."""
    save_llama(folder, model, CARD, **kind)
    llama, told = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return llama.eval()


def require_equal(model: Transformer, llama, *, length: int = 40) -> None:
    """Logits to 1e-5 in fp32."""
    tokens = torch.randint(0, model.config.vocabulary, (2, length))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_size_has_llamas_logits(tmp_path, name):
    model = random_model(replace(size(name, vocab_size=40), layers=1))
    require_equal(model, exported(model, tmp_path), length=12)


@pytest.mark.parametrize(
    "change",
    [{"tie_embeddings": True}, {"rope_base": 50_000.0}, {"norm_eps": 1e-3}, {"heads": 1, "mlp_hidden": 33}],
    ids=str,
)
@pytest.mark.parametrize("most_bytes", [5_000_000_000, 10_000], ids=["one file", "many files"])
def test_every_field_of_the_architecture_arrives(tmp_path, change, most_bytes):
    model = random_model(replace(TINY, **change))
    require_equal(model, exported(model, tmp_path, most_bytes=most_bytes))
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (most_bytes > 10_000)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_generation_draws_the_codes_that_toto_draws(tmp_path, tied):
    model = random_model(replace(TINY, tie_embeddings=tied))
    llama = exported(model, tmp_path)
    ours = continue_codes(
        model, torch.randint(0, 56, (2, 1, 3, 3)), new_frames=3, context_frames=4, sampler=SamplerConfig(temperature=0)
    )
    prompt = torch.cat([torch.full((2, 1), VIDEO_START), ours[:, 0].flatten(1) + CODE_OFFSET], dim=1)
    theirs = llama.generate(prompt, max_new_tokens=27)
    assert (theirs[:, 1:] - CODE_OFFSET).equal(ours.flatten(1))


def test_bf16_rounds_the_weights_and_nothing_else(tmp_path):
    model = random_model(TINY)
    llama = exported(model, tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert llama.dtype == torch.bfloat16
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    require_equal(model, llama.float())
    assert all(a.equal(b) for a, b in zip(model.parameters(), toto.load_model(tmp_path).parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_factors_of_a_parametrisation_go_into_the_weights(tmp_path, tied, monkeypatch):
    class Scaled(Standard):
        def attention_scale(self, config):
            return 2 / config.head_size

        def output_multiplier(self, config):
            return 0.25

    monkeypatch.setitem(PARAMETRISATIONS, "standard", Scaled())
    model = random_model(replace(TINY, tie_embeddings=tied))
    llama = exported(model, tmp_path)
    require_equal(model, llama)
    monkeypatch.undo()
    require_equal(load_llama(tmp_path), llama)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_comes_back(tmp_path, tied):
    model = random_model(replace(TINY, tie_embeddings=tied, rope_base=500.0, norm_eps=1e-4))
    exported(model, tmp_path / "ours", most_bytes=10_000).save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = load_llama(tmp_path / "theirs")
    assert again.config == model.config
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_transformers_own_llama_is_taken(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path)
    require_equal(load_llama(tmp_path), llama)
    assert json.loads((tmp_path / "config.json").read_text())["rms_norm_eps"] == 1e-6
