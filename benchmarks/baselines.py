"""Mamba against transformers' own, and the three small models of Table 6 beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import transformers
from torch import Tensor

from benchmarks.timing import HEADER, interleaved, row
from toto.model.architectures import build
from toto.model.baselines.config import MambaConfig
from toto.model.causal import CausalModel
from toto.recipes import PRETRAINING
from toto.training.objective import next_token_loss

IDS = 4100
NANO = MambaConfig(vocab_size=IDS, width=128, layers=4)
NAMES = {"embedding": "backbone.embeddings", "blocks": "backbone.layers", "norm": "backbone.norm_f", "head": "lm_head"}


def main() -> None:
    """Print tokens a second of training steps, forward passes and greedy generation."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    model, theirs = pair(NANO)
    tokens = torch.randint(4, IDS, (1, 1026))
    short, middle = tokens[:, :258], tokens[:, :514]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    for what, ways, units in (
        ("Training step, 258 tokens", {"toto": step(model, short), "transformers": step(theirs, short)}, 258),
        ("Training step, 514 tokens", {"toto": step(model, middle), "transformers": step(theirs, middle)}, 514),
        ("Forward, 1,026 tokens", {"toto": forward(model, tokens), "transformers": forward(theirs, tokens)}, 1026),
        ("Greedy generation, 258 + 64", {"toto": greedy(model, short), "transformers": generate(theirs, short)}, 64),
    ):
        print(f"\nMamba 4 x 128. {what}, fp32; logits equal\n\n{HEADER}")
        for name, seconds in interleaved(ways, warmup=1).items():
            print(row(name, seconds, units=units, unit="tokens"))
    three = {name: small(name) for name in ("toto", "gpt2", "mamba")}
    print(f"\nTraining step of the small models of Table 6, 1,026 tokens, fp32\n\n{HEADER}")
    for name, seconds in interleaved({name: step(each, tokens) for name, each in three.items()}).items():
        print(row(name, seconds, units=1026, unit="tokens"))


def small(name: str) -> CausalModel:
    """The model of a small recipe."""
    return build(replace(PRETRAINING[f"table6-nano-{name}"]().model, vocab_size=IDS))


def pair(config: MambaConfig) -> tuple[CausalModel, transformers.MambaForCausalLM]:
    """Our Mamba, and transformers' with its weights."""
    torch.manual_seed(0)
    model = build(config)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=IDS, hidden_size=config.width, num_hidden_layers=config.layers)
    )
    state = {}
    for name, weight in model.state_dict().items():
        part, _, rest = name.partition(".")
        state[f"{NAMES[part]}.{rest}"] = weight
    theirs.load_state_dict(state)
    return model, theirs


def step(network: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    """A whole training step with AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        ours = isinstance(network, CausalModel)
        loss = next_token_loss(network, tokens).mean if ours else network(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def forward(network: torch.nn.Module, tokens: Tensor) -> Callable[[], object]:
    """A pass without gradients."""
    return torch.inference_mode()(lambda: network(tokens))


def greedy(model: CausalModel, prompt: Tensor) -> Callable[[], object]:
    """64 tokens after a prompt."""

    @torch.inference_mode()
    def run() -> None:
        cache, new = model.new_cache(1, prompt.shape[1] + 64), prompt
        for _ in range(64):
            hidden, _, cache = model.trunk(new, cache=cache)
            new = model.head(model.norm(hidden[:, -1])).argmax(dim=-1, keepdim=True)

    return run


def generate(theirs: transformers.MambaForCausalLM, prompt: Tensor) -> Callable[[], object]:
    """The same by transformers."""
    return lambda: theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
