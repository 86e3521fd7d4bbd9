"""Whole training steps of the 12 x 768 model against transformers' Llama: speed, memory, growth with the context.

Every way runs in a process of its own, with its own memory; they take turns, step by step. Weights, inputs and threads
are the same, and losses are compared first, in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.timing import HEADER, row
from toto.model.budget.flops import training_flops
from toto.model.config import size
from toto.runtime.allocator import keep_freed_memory

CONFIG = size("base", vocab_size=8196)
LENGTHS = (1024, 4096)
GROWTH = (1024, 2048, 4096, 8192, 16384)
PARTS = ("forward", "backward", "norm", "optimizer")
HELD = 12 * 125.9e6  # bytes of weights and moments
SIDE = 4096  # of the matrix product that rates are compared with
WAYS = {
    "toto": {"way": "toto", "keep": True},  # as `toto train` does
    "transformers, eager": {"way": "llama"},
    "transformers, eager, memory kept too": {"way": "llama", "keep": True},
    "transformers, compiled": {"way": "llama", "compiled": True},
}


def main() -> None:
    """Print all tables, or some of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training")
    parser.add_argument("--tables", nargs="*", default=["steps", "growth"], choices=["steps", "growth"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--lengths", nargs="*", type=int, help="positions of a sequence")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--plot", type=Path, help="where the picture of growth goes")
    parser.add_argument("--growth-file", type=Path, help="JSON that keeps what was measured, a length at a time")
    options, _ = parser.parse_known_args()
    if "steps" in options.tables:
        for length in options.lengths or LENGTHS:
            steps(length, {name: WAYS[name] for name in options.ways}, options.runs)
    if "growth" in options.tables:
        growth(options.lengths or list(GROWTH), options.growth_file, options.plot)


class Worker:
    """A process that makes a step when it is told to."""

    def __init__(self, length: int, settings: dict[str, object]):
        words = [sys.executable, "-m", "benchmarks.training", "--worker", json.dumps({"length": length, **settings})]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, what: str) -> dict[str, float]:
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def steps(length: int, ways: dict[str, dict[str, object]], runs: int) -> None:
    """Interleaved steps of all ways; the first one of each isn't counted."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    products = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(length, settings)) for name, settings in ways.items()}
        losses = {name: worker("check")["loss"] for name, worker in workers.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-5, losses
        for turn in range(1 + runs):
            for name, worker in workers.items():
                made = worker("step")
                if turn:
                    found[name].append(made)
            products.append(next(iter(workers.values()))("product")["seconds"])
        memory = {name: worker("memory") for name, worker in workers.items()}
    print(f"\nTraining step, 1 x {length:,} tokens, bf16 autocast, fused AdamW, clipping; fp32 losses {losses}")
    print(f"\n{HEADER}")
    for name in ways:
        print(row(name, [sum(made[part] for part in PARTS) for made in found[name]], units=length, unit="tokens"))
    rate = 2 * SIDE**3 / statistics.median(products) / 1e9
    work = training_flops(CONFIG, batch=1, positions=length).total / 1e9
    print(f"\nmatrix product {SIDE}^3 in bf16: {rate:.0f} GFLOP/s\n")
    print(
        "| ms | "
        + " | ".join(PARTS)
        + " | forward + backward, GFLOP/s | of the product's rate | peak GB | faults a step |"
    )
    print("|---|" + "---|" * (len(PARTS) + 4))
    for name in ways:
        middle = {part: statistics.median(made[part] for made in found[name]) for part in PARTS}
        both = work / statistics.median(made["forward"] + made["backward"] for made in found[name])
        faults = statistics.median(made["faults"] for made in found[name])
        spent = " | ".join(f"{1000 * middle[part]:,.0f}" for part in PARTS)
        peak = memory[name]["peak"] / 1e9
        print(f"| {name} | {spent} | {both:.0f} | {both / rate:.0%} | {peak:.2f} | {faults:,.0f} |", flush=True)


def growth(lengths: list[int], file: Path | None, plot: Path | None) -> None:
    """Tokens a second and memory by the length of the context."""
    known = json.loads(file.read_text()) if file and file.exists() else {}
    for length in lengths:
        with Worker(length, WAYS["toto"]) as worker:
            seconds = []
            worker("short step")  # makes the optimizer's moments
            for turn in range(4 if length <= 4096 else 1):
                made = worker("step")
                if turn or length > 4096:
                    seconds.append(sum(made[part] for part in PARTS))
            known[str(length)] = {"seconds": min(seconds), "peak": worker("memory")["peak"]}
        if file:
            file.write_text(json.dumps(known))
    lengths = sorted(map(int, known))
    print("\nGrowth with the context, one sequence, best of 3 steps (from 8,192 on: one)\n")
    print(
        "| tokens | tokens/s | seconds | exponent | peak GB | exponent above weights and moments |\n"
        "|---|---|---|---|---|---|"
    )
    for place, length in enumerate(lengths):
        now = known[str(length)]
        slopes = ["", ""]
        if place:
            before, factor = known[str(lengths[place - 1])], math.log(length / lengths[place - 1])
            slopes = [
                f"{math.log(now['seconds'] / before['seconds']) / factor:.2f}",
                f"{math.log((now['peak'] - HELD) / (before['peak'] - HELD)) / factor:.2f}",
            ]
        print(
            f"| {length:,} | {length / now['seconds']:,.0f} | {now['seconds']:.2f} | {slopes[0]} | "
            f"{now['peak'] / 1e9:.2f} | {slopes[1]} |"
        )
    if plot and len(lengths) > 1:
        draw(known, plot)


def draw(known: dict[str, dict[str, float]], plot: Path) -> None:
    """Two panels: seconds of a step, and its memory, over the context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lengths = sorted(map(int, known))
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    shown = {  # what it is, its size, and the part that doesn't grow
        "seconds": ("seconds of a step", 1, 0),
        "peak": ("GB beside weights and moments", 1e9, HELD),
    }
    for panel, (key, (title, unit, fixed)) in zip(panels, shown.items(), strict=True):
        values = np.array([(known[str(length)][key] - fixed) / unit for length in lengths])
        slope = np.polyfit(np.log(lengths), np.log(values), 1)[0]
        panel.loglog(lengths, values, "o-", base=2)
        panel.set(xlabel="tokens of context", ylabel=title, title=f"exponent {slope:.2f}")
        panel.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        panel.set_yticks(values, [f"{value:.3g}" for value in values], fontsize=8)
        panel.grid(alpha=0.3)
    figure.savefig(plot, dpi=110)


def work(settings: dict[str, object]) -> None:
    """Answer every line of the standard input by a line of JSON."""
    if settings.get("keep"):
        keep_freed_memory()
    import torch

    length = int(settings["length"])
    torch.manual_seed(0)
    network, loss_of = _network(str(settings["way"]), compiled=bool(settings.get("compiled")))
    tokens = torch.randint(4, CONFIG.vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(1))
    step = _step_of(network, loss_of, ours=settings["way"] == "toto")
    for line in sys.stdin:
        match line.strip():
            case "check":
                with torch.no_grad():
                    answer = {"loss": float(loss_of(tokens[:, :257]))}
            case "step":
                answer = step(tokens)
            case "short step":
                answer = step(tokens[:, :257])
            case "product":
                a = torch.randn(SIDE, SIDE).bfloat16()
                a @ a
                began = time.perf_counter()
                a @ a
                answer = {"seconds": time.perf_counter() - began}
            case _:
                answer = {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        print(json.dumps(answer), flush=True)


def _network(way: str, *, compiled: bool):
    """A model, and its loss of tokens; all have the same weights."""
    from toto.model.transformer import Transformer
    from toto.training.objective import next_token_loss

    model = Transformer(CONFIG)
    if way == "toto":
        return model, lambda tokens: next_token_loss(model, tokens).mean
    import torch
    import transformers

    from toto.model.llama import llama_config, llama_weights

    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(CONFIG, context=1 << 15)))
    llama.load_state_dict(llama_weights(model))

    def loss_of(tokens):  # transformers' own loss, of all the predictions that ours has
        shifted = tokens[:, 1:].contiguous()
        return llama(tokens[:, :-1], labels=shifted, shift_labels=shifted, use_cache=False).loss

    return llama, torch.compile(loss_of, dynamic=False) if compiled else loss_of


def _step_of(network, loss_of, *, ours: bool):
    """A function that makes a step of `[1, S]` ids and says how long its parts took."""
    import torch

    from toto.training.optimizer import OptimizerConfig, clipped_step, gradient_norm, make_optimizer

    optimizer = (
        make_optimizer(network, OptimizerConfig())
        if ours
        else torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    )

    def step(tokens) -> dict[str, float]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        moments = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(tokens)
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        if ours:
            norm = gradient_norm(network.parameters())
            assert torch.isfinite(norm)
            moments.append(time.perf_counter())
            clipped_step(optimizer, norm, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            moments.append(time.perf_counter())
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments.append(time.perf_counter())
        spent = {part: after - before for part, before, after in zip(PARTS, moments, moments[1:], strict=False)}
        return {**spent, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults}

    return step


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        work(json.loads(sys.argv[2]))
    else:
        main()
