"""Drawing tokens against transformers' `generate`: same weights, prompt and threads, greedy tokens equal first.

python -m benchmarks generation
python -m benchmarks generation --part decode --batch 8
python -m benchmarks generation --part bits --checkpoint RUN --heldout SHARDS
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.decoder import pair
from benchmarks.timing import HEADER, interleaved, row
from toto.evaluation.likelihood import model_bits, spread_windows
from toto.model.cache import KeyValueCache
from toto.model.config import ModelConfig
from toto.model.decoding import Decoder, prepare, rounded_model
from toto.model.quantised import GROUP, Weights
from toto.model.transformer import Transformer
from toto.model.weights import load_card, load_model
from toto.training.source import SourceConfig

CONFIG = ModelConfig(vocab_size=8196, width=768, layers=12, heads=12, mlp_hidden=3072)
PROMPT, NEW = 1024, 256
BYTES: dict[Weights, float] = {"fp32": 4, "bf16": 2, "int8": 1 + 8 / GROUP}
Llama = transformers.LlamaForCausalLM


def main() -> None:
    """Print what is asked: equal tokens, steps, prompts, or the bits that rounded weights cost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks generation")
    parser.add_argument("--part", choices=("equal", "decode", "prompt", "bits"), action="append")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="drawn in a run, from the middle of the 256")
    parser.add_argument("--checkpoint", type=Path, help="a trained model, for the bits")
    parser.add_argument("--heldout", type=Path, help="its held-out shards")
    options = parser.parse_known_args()[0]
    parts = options.part or ["equal", "decode", "prompt", *(["bits"] if options.checkpoint else [])]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    if "bits" in parts:
        bits(options.checkpoint, options.heldout)
    if parts != ["bits"]:
        model, llama = pair(CONFIG)
        half = Llama(llama.config).bfloat16()
        half.load_state_dict(llama.state_dict())
        models = model.eval(), llama.eval(), half.eval()
        with torch.inference_mode():
            if "equal" in parts:
                equal(model, llama)
            for batch in options.batch if "decode" in parts else ():
                decode(*models, batch=batch, tokens=options.tokens, runs=options.runs)
            if "prompt" in parts:
                prompts(*models, runs=options.runs)


def equal(model: Transformer, llama: Llama) -> None:
    """Compare all greedy tokens: batch 1 after the whole prompt, batch 8 after a short one."""
    for batch, length, new in ((1, PROMPT, NEW), (8, 64, 24)):
        prompt = torch.randint(4, CONFIG.vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))
        began = time.perf_counter()
        theirs = llama.generate(prompt, max_new_tokens=new, do_sample=False)[:, length:]
        between = time.perf_counter()
        decoder = prepare(model, batch=batch, room=length + new)
        ours = greedy(decoder, model.new_cache(batch, length + new), prompt, new)
        ended = time.perf_counter()
        assert ours.equal(theirs), "greedy tokens differ"
        print(
            f"fp32, batch {batch}, {length} + {new} tokens: all {batch * new} greedy tokens equal; transformers "
            f"{between - began:.1f} s, toto {ended - between:.1f} s, preparing included"
        )


def greedy(decoder: Decoder, cache: KeyValueCache, tokens: Tensor, new: int) -> Tensor:
    """The likeliest tokens after some."""
    drawn = []
    for _ in range(new):
        logits, cache = decoder.next_logits(tokens, cache)
        tokens = logits.argmax(dim=-1, keepdim=True)
        drawn.append(tokens)
    return torch.cat(drawn, dim=1)


def decode(model: Transformer, llama: Llama, half: Llama, *, batch: int, tokens: int, runs: int) -> None:
    """Time steps in the middle of the 256, from caches of random keys and values."""
    seen = PROMPT + (NEW - tokens) // 2
    ids = torch.randint(4, CONFIG.vocabulary, (batch, seen + 1))
    keys, values = torch.randn(2, CONFIG.layers, batch, CONFIG.heads, seen, CONFIG.head_size).unbind()
    ways: dict[str, Callable[[], object]] = {}
    for name, network in (("fp32", llama), ("bf16", half)):
        ways[f"transformers generate, {name}"] = their_steps(network, ids, keys, values, tokens)
    for weights in BYTES:
        began = time.perf_counter()
        decoder = prepare(model, batch=batch, room=seen + tokens, weights=weights)
        print(f"preparing {weights} for batch {batch}: {time.perf_counter() - began:.2f} s")
        cache = model.new_cache(batch, seen + tokens)
        cache.keys[..., :seen, :], cache.values[..., :seen, :] = keys, values
        cache = replace(cache, length=seen)
        ways[f"toto, {weights}"] = lambda decoder=decoder, cache=cache: greedy(decoder, cache, ids[:, -1:], tokens)
    matrices = sum(block.numel() for name, block in model.named_parameters() if block.ndim == 2)
    matrices -= model.embedding.weight.numel()
    buffer = torch.ones(matrices)
    ways["reading"] = lambda: [buffer.sum() for _ in range(4)]
    seconds = interleaved(ways, runs=runs, warmup=1)
    bandwidth = 16 * matrices / statistics.median(seconds.pop("reading"))
    print(f"\nBatch {batch}, {tokens} tokens after {seen:,}; two threads read {bandwidth / 1e9:.1f} GB/s\n\n{HEADER}")
    for name, times in seconds.items():
        print(row(name, times, units=batch * tokens, unit="tokens"))
    past = 2 * 4 * CONFIG.layers * CONFIG.width * batch * (seen + tokens / 2)
    first = statistics.median(seconds["transformers generate, fp32"])
    second = statistics.median(seconds["transformers generate, bf16"])
    print("\n| | x transformers fp32 | x its bf16 | bytes a step | share of the bandwidth |\n|---|---|---|---|---|")
    for weights, size in BYTES.items():
        taken, read = statistics.median(seconds[f"toto, {weights}"]), matrices * size + past
        share = read * tokens / taken / bandwidth
        print(f"| {weights} | {first / taken:.2f} | {second / taken:.2f} | {read / 1e6:,.0f} MB | {share:.0%} |")


def their_steps(llama: Llama, ids: Tensor, keys: Tensor, values: Tensor, tokens: int) -> Callable[[], object]:
    """`generate` from a cache that holds all positions but the last, which is cut again afterwards."""
    cache = transformers.DynamicCache(config=llama.config)
    for layer in range(CONFIG.layers):
        cache.update(keys[layer].to(llama.dtype), values[layer].to(llama.dtype), layer)

    def run() -> None:
        llama.generate(ids, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        cache.crop(ids.shape[1] - 1 - cache.get_seq_length())

    return run


def prompts(model: Transformer, llama: Llama, half: Llama, *, runs: int) -> None:
    """Time reading a prompt, with the logits of its last position."""
    prompt = torch.randint(4, CONFIG.vocabulary, (1, PROMPT))
    ways: dict[str, Callable[[], object]] = {
        f"transformers, {name}": lambda network=network: network(prompt, use_cache=True, logits_to_keep=1)
        for name, network in (("fp32", llama), ("bf16", half))
    }
    for weights in BYTES:
        decoder, cache = prepare(model, batch=1, room=PROMPT, weights=weights), model.new_cache(1, PROMPT)
        ways[f"toto, {weights}"] = lambda decoder=decoder, cache=cache: decoder.next_logits(prompt, cache)
    print(f"\nReading a prompt of {PROMPT:,} tokens, batch 1\n\n{HEADER}")
    for name, seconds in interleaved(ways, runs=runs, warmup=1).items():
        print(row(name, seconds, units=PROMPT, unit="tokens"))


def bits(checkpoint: Path, heldout: Path) -> None:
    """What rounding costs: bits per token of held-out windows; prompts are read under bf16 autocast."""
    model, card = load_model(checkpoint), load_card(checkpoint)
    source = SourceConfig(path=heldout, weight=1)
    windows = spread_windows(source, frames=card.sequence["frames"], most=64)
    found = model_bits(model, windows, precision="fp32").mean(dim=1)
    count = sum(window.codes.numel() for window in windows)
    print(f"{checkpoint}: {found.mean():.4f} bits per token in fp32, {len(windows)} windows, {count:,} tokens\n")
    print("| weights | activations | more bits per token, with standard error over windows |\n|---|---|---|")
    for weights in ("bf16", "int8"):
        other = rounded_model(model, weights)
        for precision in ("fp32", "bf16"):
            more = model_bits(other, windows, precision=precision).mean(dim=1) - found
            print(f"| {weights} | {precision} | {more.mean():+.5f} ({more.std() / len(more) ** 0.5:.5f}) |")


if __name__ == "__main__":
    main()
