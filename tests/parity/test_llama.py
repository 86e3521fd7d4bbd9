"""The decoder against transformers' LlamaForCausalLM with the same weights."""

from __future__ import annotations

import pytest
import torch

from toto.model.config import ModelConfig, size
from toto.model.llama import llama_config, llama_weights
from toto.model.transformer import Transformer

transformers = pytest.importorskip("transformers")


def llama_of(model: Transformer):
    """The same weights in transformers' Llama."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(model.config, context=8192))).eval()
    missing, surplus = llama.load_state_dict(llama_weights(model), strict=False)
    assert not surplus
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    return llama


@pytest.mark.parametrize("rope_base", [10_000.0, 50_000.0])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_hidden_states_equal_llamas(rope_base, tied):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300, width=96, layers=3, heads=4, mlp_hidden=160, rope_base=rope_base, tie_embeddings=tied
    )
    model = Transformer(config).eval()
    for weight in model.parameters():  # norms of one would hide a swapped norm
        weight.data = weight.data * 3 + 0.05 * torch.randn_like(weight)
    tokens = torch.randint(0, 300, (2, 130))
    with torch.inference_mode():
        ours = model(tokens, layers=range(4))
        theirs = llama_of(model)(tokens, output_hidden_states=True)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    for layer in range(3):  # transformers norms its last one
        torch.testing.assert_close(ours.hidden_states[layer], theirs.hidden_states[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["base", "large", "1b"])
def test_named_sizes_have_the_parameters_of_llama(name):
    ours = size(name, vocab_size=8196)
    with torch.device("meta"):
        model = Transformer(ours)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(ours, context=4098)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_training_step_has_llamas_gradients():
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=50, width=32, layers=2, heads=2, mlp_hidden=64))
    llama = llama_of(model)
    tokens = torch.randint(0, 50, (2, 40))
    from toto.training.objective import next_token_loss

    ours = next_token_loss(model, tokens).mean
    theirs = llama(tokens, labels=tokens).loss
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(
        model.blocks[0].mlp.down.weight.grad,
        llama.model.layers[0].mlp.down_proj.weight.grad,
        atol=1e-6,
        rtol=1e-4,
    )
