"""Sampling against transformers' own warpers, and rollouts with and without the cache."""

from __future__ import annotations

import pytest
import torch

from toto.generation.rollout import continue_codes
from toto.generation.sampler import SamplerConfig, filtered_probabilities, sample
from toto.model.config import ModelConfig
from toto.model.decoding import rounded_model
from toto.model.transformer import Transformer
from toto.runtime.errors import ConfigError
from toto.tokens.sequence import CODE_OFFSET, pack

VOCABULARY = 20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=2, mlp_hidden=48)).eval()
    model.head.weight.data *= 30  # opinions strong enough that a small error would change a draw
    return model


def roll(model, prompt, **options):
    sampler = options.pop("sampler", SamplerConfig(seed=1))
    options = {"new_frames": 3, "context_frames": 4} | options
    return continue_codes(model, prompt, sampler=sampler, **options)


@pytest.mark.parametrize("prompt_frames", [0, 1, 2, 6])
@pytest.mark.parametrize("sampler", [SamplerConfig(temperature=0), SamplerConfig(top_k=5, top_p=0.9, seed=3)])
def test_the_cache_does_not_change_a_draw(model, prompt_frames, sampler):
    prompt = torch.randint(0, VOCABULARY - CODE_OFFSET, (2, prompt_frames, 2, 3))
    cached = roll(model, prompt, sampler=sampler, new_frames=5)
    plain = roll(model, prompt, sampler=sampler, new_frames=5, use_cache=False)
    assert cached.equal(plain)
    assert cached.shape == (2, prompt_frames + 5, 2, 3)
    assert cached[:, :prompt_frames].equal(prompt)
    assert 0 <= int(cached.min()) <= int(cached.max()) < VOCABULARY - CODE_OFFSET


def test_greedy_takes_the_likeliest_code_of_the_whole_forward_pass(model):
    prompt = torch.randint(0, 16, (1, 1, 2, 2))
    made = roll(model, prompt, sampler=SamplerConfig(temperature=0), new_frames=2)
    logits = model(pack(made, "video")[:, :-1]).logits
    logits[:, :, :CODE_OFFSET] = -torch.inf
    assert (logits.argmax(-1)[0, 4:12] - CODE_OFFSET).equal(made[0, 1:].flatten()[:8])


def test_the_same_seed_gives_the_same_continuation(model):
    prompt = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    again = [roll(model, prompt, sampler=SamplerConfig(seed=seed, temperature=5.0)) for seed in (1, 1, 2)]
    assert again[0].equal(again[1])
    assert not again[0].equal(again[2])


def test_weights_that_changed_are_seen(model):
    prompt, greedy = torch.randint(0, 16, (1, 1, 2, 3)), SamplerConfig(temperature=0)
    before = roll(model, prompt, sampler=greedy)
    weight = model.blocks[0].mlp.down.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(5))
    after, plain = (roll(model, prompt, sampler=greedy, use_cache=use) for use in (True, False))
    with torch.no_grad():
        weight.copy_(kept)
    assert after.equal(plain)
    assert not after.equal(before)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_continue_as_a_model_of_these_weights_does(model, weights, monkeypatch):
    monkeypatch.setattr("toto.model.decoding.use_bf16", lambda *_: False)
    other, prompt = rounded_model(model, weights), torch.randint(0, 16, (2, 2, 2, 3))
    drawn = [roll(model, prompt, new_frames=6, weights=weights), roll(other, prompt, new_frames=6, use_cache=False)]
    assert drawn[0].equal(drawn[1])


def test_rounded_weights_need_the_cache(model):
    with pytest.raises(ConfigError, match="int8 is for Toto models with a cache"):
        roll(model, torch.zeros(1, 1, 2, 2, dtype=torch.int64), weights="int8", use_cache=False)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(3, 1.0, 1.0), (0, 0.7, 1.0), (8, 0.9, 0.6), (0, 1.0, 2.0)]
)
def test_filters_equal_those_of_transformers(top_k, top_p, temperature):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(5, 50) * 3
    ours = filtered_probabilities(logits, SamplerConfig(top_k=top_k, top_p=top_p, temperature=temperature))
    theirs = logits / temperature
    if top_k:
        theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
    torch.testing.assert_close(ours, theirs.softmax(-1), atol=1e-6, rtol=1e-5)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().repeat(20_000, 1)
    drawn = sample(logits, SamplerConfig(), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.015, rtol=0)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"temperature": float("nan")}])
def test_impossible_samplers_are_refused(wrong):
    with pytest.raises(ConfigError):
        SamplerConfig(**wrong)
