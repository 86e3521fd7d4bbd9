"""Training steps against transformers' Llama: same weights, threads and inputs, outputs equal first."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from benchmarks.timing import HEADER, interleaved, row
from toto.model.config import ModelConfig
from toto.model.llama import llama_config, llama_weights
from toto.model.transformer import Transformer
from toto.training.objective import next_token_loss

SHAPES = {
    "demo (2 x 128), 1 x 1,026 tokens": (
        ModelConfig(vocab_size=4100, width=128, layers=2, heads=2, mlp_hidden=384),
        1026,
    ),
    "12 x 256, 1 x 1,026 tokens": (ModelConfig(vocab_size=8196, width=256, layers=12, heads=4, mlp_hidden=704), 1026),
}


def main() -> None:
    """Print tokens a second of a whole training step."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, (config, length) in SHAPES.items():
        model, llama = pair(config)
        tokens = torch.randint(4, config.vocabulary, (1, length))
        with torch.inference_mode():
            torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, atol=1e-4, rtol=1e-4)
        print(f"\nTraining step, {name}, bf16 autocast, fused AdamW, clipping; logits equal in fp32\n\n{HEADER}")
        for way, seconds in train_both(model, llama, tokens).items():
            print(row(way, seconds, units=length, unit="tokens"))


def pair(config: ModelConfig) -> tuple[Transformer, transformers.LlamaForCausalLM]:
    """Our decoder and a Llama with its weights."""
    torch.manual_seed(0)
    model = Transformer(config)
    theirs = transformers.LlamaConfig(**llama_config(config, context=8192) | {"eos_token_id": None})
    llama = transformers.LlamaForCausalLM(theirs)
    llama.load_state_dict(llama_weights(model))
    return model, llama


def train_both(model: Transformer, llama: transformers.LlamaForCausalLM, tokens: Tensor) -> dict[str, list[float]]:
    """Seconds of whole training steps."""

    def step_of(network: torch.nn.Module, loss_of):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    ours = step_of(model, lambda: next_token_loss(model, tokens).mean)
    theirs = step_of(llama, lambda: llama(tokens, labels=tokens, use_cache=False).loss)
    return interleaved({"toto": ours, "transformers Llama (sdpa)": theirs})


if __name__ == "__main__":
    main()
