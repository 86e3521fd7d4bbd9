"""Mamba against transformers' MambaForCausalLM with the same weights, and our scan against its plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from toto.generation.rollout import continue_codes
from toto.generation.sampler import SamplerConfig
from toto.model.baselines import scan
from toto.model.baselines.config import MambaConfig
from toto.model.baselines.mamba import Mamba
from toto.training.objective import next_token_loss

transformers = pytest.importorskip("transformers")
TINY = MambaConfig(vocab_size=60, width=40, layers=3, state_size=8)


def ours_and_theirs(config: MambaConfig, seed: int = 0):
    """Our model with weights off their beginning, and transformers' with the same under its own names."""
    torch.manual_seed(seed)
    model = Mamba(config).eval()
    for weight in model.parameters():
        weight.data = weight.data * 1.5 + 0.05 * torch.randn_like(weight)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    theirs.load_state_dict({their_name(name): weight for name, weight in model.state_dict().items()})
    return model, theirs.eval()


def their_name(name: str) -> str:
    for mine, their in (("embedding.", "embeddings."), ("blocks.", "layers."), ("norm.", "norm_f.")):
        if name.startswith(mine):
            return f"backbone.{their}{name.removeprefix(mine)}"
    return name.replace("head.", "lm_head.")


@pytest.mark.parametrize("how", ["chunked", "transformers"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_hidden_states_are_theirs(tied, how):
    model, theirs = ours_and_theirs(replace(TINY, tie_embeddings=tied, scan=how))
    tokens = torch.randint(0, 60, (2, 130))
    streams: list[torch.Tensor] = []
    for block in theirs.backbone.layers:
        block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    theirs.backbone.norm_f.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    with torch.inference_mode():
        ours, expected = model(tokens, layers=range(4)), theirs(tokens)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert len(streams) == 4
    for layer, stream in enumerate(streams):
        torch.testing.assert_close(ours.hidden_states[layer], stream, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["chunked", "transformers"])
def test_a_training_step_has_their_loss_and_gradients(how):
    model, theirs = ours_and_theirs(replace(TINY, scan=how), seed=1)
    tokens = torch.randint(0, 60, (2, 90))
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
    ours = continue_codes(model, prompt, new_frames=3, context_frames=5, sampler=SamplerConfig(temperature=0))
    start = torch.cat([torch.ones(2, 1, dtype=torch.int64), prompt.flatten(1) + 4], dim=1)
    expected = theirs.generate(
        start,
        max_new_tokens=27,
        do_sample=False,
        suppress_tokens=[0, 1, 2, 3],
        pad_token_id=0,
        eos_token_id=None,
    )
    assert ours.flatten(1).equal(expected[:, 1:] - 4)


def plain_scan(u, dt, a, b, c, state):
    outs = []
    for position in range(u.shape[1]):
        step = dt[:, position, :, None]
        state = torch.exp(step * a) * state + step * b[:, position, None] * u[:, position, :, None]
        outs.append((state * c[:, position, None]).sum(-1))
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("again", [False, True])
def test_the_scan_is_the_plain_loop_with_its_gradients_from_any_state(length, again, monkeypatch):
    monkeypatch.setattr(scan, "KEPT_BYTES", 0 if again else 1 << 40)
    draw = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float32)

    values = [
        normal(2, length, 6),
        F.softplus(normal(2, length, 6) - 2),
        -normal(6, 5).exp(),
        normal(2, length, 5),
        normal(2, length, 5),
        normal(2, 6, 5),
    ]
    weights = normal(2, length, 6), normal(2, 6, 5)
    found = []
    for way in (scan.selective_scan, plain_scan):
        inputs = [value.clone().requires_grad_() for value in values]
        out, state = way(*inputs)
        total = (out * weights[0]).sum() + (state * weights[1]).sum()
        found.append((out, state, *torch.autograd.grad(total, inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_who_holds_the_last_state_does_not_hold_all():
    u, b = torch.ones(2, 130, 3), torch.ones(2, 130, 5)
    out, state = scan.selective_scan(u, u, -torch.ones(3, 5), b, b, torch.zeros(2, 3, 5))
    assert out.is_contiguous()
    assert state.untyped_storage().nbytes() == state.nbytes


def test_a_decaying_state_neither_overflows_nor_loses_its_gradient():
    """Products of many factors near zero are never formed: a scan that divides by them would give NaN here."""
    u = torch.ones(1, 300, 2, requires_grad=True)
    out, state = scan.selective_scan(
        u, torch.full((1, 300, 2), 20.0), -torch.full((2, 3), 16.0), *torch.ones(2, 1, 300, 3), torch.zeros(1, 2, 3)
    )
    out.sum().backward()
    assert out.isfinite().all()
    assert state.isfinite().all()
    torch.testing.assert_close(u.grad, torch.full_like(u, 60.0))
