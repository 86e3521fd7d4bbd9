"""GPT-2 with sin-cos positions against transformers' GPT2LMHeadModel with the same weights and those positions."""

from __future__ import annotations

import pytest
import torch

from toto.generation.rollout import continue_codes
from toto.generation.sampler import SamplerConfig
from toto.model.baselines.config import GPT2Config
from toto.model.baselines.gpt2 import GPT2, sin_cos
from toto.training.objective import next_token_loss

transformers = pytest.importorskip("transformers")
TINY = GPT2Config(vocab_size=60, width=48, layers=3, heads=4, mlp_hidden=80)


def ours_and_theirs(config: GPT2Config, seed: int = 0):
    """Our model with weights far from their beginning, and transformers' with the same under its own names."""
    torch.manual_seed(seed)
    model = GPT2(config).eval()
    for weight in model.parameters():
        weight.data = weight.data * 3 + 0.05 * torch.randn_like(weight)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocabulary,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.mlp_hidden,
            n_positions=256,
            attn_pdrop=0,
            resid_pdrop=0,
            embd_pdrop=0,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    state = {"transformer.wpe.weight": config.position_scale * sin_cos(0, 256, config.width, torch.device("cpu"))}
    state |= {their_name(name): weight for name, weight in model.state_dict().items()}
    theirs.load_state_dict(state)
    return model, theirs.eval()


def their_name(name: str) -> str:
    for mine, their in (("embedding.", "wte."), ("blocks.", "h."), ("norm.", "ln_f.")):
        if name.startswith(mine):
            return f"transformer.{their}{name.removeprefix(mine)}"
    return name.replace("head.", "lm_head.")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_logits_and_hidden_states_are_theirs(tied, scale):
    config = GPT2Config(
        vocab_size=60, width=48, layers=3, heads=4, mlp_hidden=80, tie_embeddings=tied, position_scale=scale
    )
    model, theirs = ours_and_theirs(config)
    tokens = torch.randint(0, 60, (2, 130))
    streams: list[torch.Tensor] = []
    for block in theirs.transformer.h:
        block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    theirs.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    with torch.inference_mode():
        ours, expected = model(tokens, layers=range(4)), theirs(tokens)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert len(streams) == 4
    for layer, stream in enumerate(streams):
        torch.testing.assert_close(ours.hidden_states[layer], stream, atol=1e-5, rtol=1e-5)


def test_positions_are_those_of_the_formula():
    table = sin_cos(5, 40, 48, torch.device("cpu"))
    for position, channel in ((0, 0), (7, 1), (39, 10), (12, 47)):
        angle = torch.tensor((5 + position) / 10_000 ** (channel // 2 * 2 / 48), dtype=torch.float64)
        expected = angle.cos() if channel % 2 else angle.sin()
        assert float(table[position, channel]) == pytest.approx(float(expected), abs=1e-5)


def test_a_training_step_has_their_loss_and_gradients():
    model, theirs = ours_and_theirs(TINY, seed=1)
    tokens = torch.randint(0, 60, (2, 70))
    ours, expected = next_token_loss(model.train(), tokens).mean, theirs.train()(tokens, labels=tokens).loss
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    ours.backward()
    expected.backward()
    for name, weight in model.named_parameters():
        their = theirs.get_parameter(their_name(name))
        torch.testing.assert_close(
            weight.grad, their.grad, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_greedy_generation_is_theirs():
    model, theirs = ours_and_theirs(TINY, seed=2)
    prompt = torch.randint(0, 56, (2, 2, 3, 3))
    sampler = SamplerConfig(temperature=0)
    ours = continue_codes(model, prompt, new_frames=3, context_frames=5, sampler=sampler)
    start = torch.cat([torch.ones(2, 1, dtype=torch.int64), prompt.flatten(1) + 4], dim=1)
    expected = theirs.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=27,
        do_sample=False,
        suppress_tokens=[0, 1, 2, 3],
        pad_token_id=0,
        eos_token_id=None,
    )
    assert ours.flatten(1).equal(expected[:, 1:] - 4)
