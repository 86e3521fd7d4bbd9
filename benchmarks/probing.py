"""Probes of all layers in one stream, against the frozen forward alone and against one run of the trunk a layer.

`--small`, `--base` and `--cache` give one table each; without them, all.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import HEADER, interleaved, row
from toto.evaluation.feature_cache import CacheConfig
from toto.evaluation.features import TotoBackbone
from toto.evaluation.labelled import procedural_clips
from toto.evaluation.probe import Batch, ProbeConfig, Probes
from toto.evaluation.read_out import ProbeData, probe
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.runtime.device import autocast, use_bf16
from toto.tokens.sequence import pack
from toto.tokens.tokenizer import load_tokenizer

CLASSES = 1000
GRID = 16
VOCABULARY = 8192
BATCH, STEPS = 32, 4


@dataclass(frozen=True, kw_only=True)
class CodeFeatures:
    """Features of random codes of images, streamed; no image is read and no tokenizer runs, so nothing hides heads."""

    model: Transformer
    codes: Tensor
    labels: Tensor
    layers: tuple[int, ...]
    batch: int = 16

    def batches(self, groups: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        """The trunk's hidden states, in bf16."""
        for numbers in groups:
            parts = [self._states(part) for part in torch.split(numbers, self.batch)]
            yield Batch(
                by_layer={layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}, numbers=numbers
            )

    @torch.no_grad()
    def _states(self, numbers: Tensor) -> dict[int, Tensor]:
        with autocast("auto", self.model.device):
            _, states, _ = self.model.trunk(pack(self.codes[numbers], "image"), layers=self.layers)
        return {layer: state[:, 1:-1].to(torch.bfloat16) for layer, state in states.items()}


SHAPES = {
    "small": (
        "12 x 256, 4 heads",
        ModelConfig(vocab_size=VOCABULARY + 4, width=256, layers=12, heads=4, mlp_hidden=704),
    ),
    "base": (
        "12 x 768 (base-like), 12 heads",
        ModelConfig(vocab_size=VOCABULARY + 4, width=768, layers=12, heads=12, mlp_hidden=2048),
    ),
}


def main() -> None:
    """Print the tables asked for."""
    asked = [word[2:] for word in sys.argv[1:] if word.startswith("--")] or [*SHAPES, "cache"]
    precision = "bf16" if use_bf16("auto", torch.device("cpu")) else "fp32"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, trunk in {precision}, heads in fp32")
    for part in asked:
        if part == "cache":
            cached()
        else:
            name, shape = SHAPES[part]
            one_pass(name, shape, in_sequence=part == "small")


def one_pass(name: str, shape: ModelConfig, *, in_sequence: bool) -> None:
    """An epoch over images of 16 x 16 codes: the trunk alone, with all heads, and with those of one layer a run."""
    torch.manual_seed(0)
    items = BATCH * STEPS
    model = Transformer(shape).eval()
    codes = torch.randint(0, VOCABULARY, (items, 1, GRID, GRID))
    layers = tuple(range(shape.layers + 1))
    source = CodeFeatures(model=model, codes=codes, labels=torch.arange(items), layers=layers)
    config = ProbeConfig(epochs=1, batch=BATCH, heads=shape.heads, standardise="running")
    known: list[Probes] = []

    def forward() -> None:
        for _ in source.batches(torch.split(torch.arange(items), config.batch), 0):
            pass

    def all_heads() -> None:
        known[:] = [Probes(classes=CLASSES, config=config)]
        known[0].train(source, torch.arange(items))

    def a_layer_a_run() -> None:
        for layer in layers:
            one = replace(source, layers=(layer,))
            Probes(classes=CLASSES, config=config).train(one, torch.arange(items))

    ways = {"frozen forward": forward, "all layers x 2 heads x 3 rates, one stream": all_heads}
    if in_sequence:
        ways["a run of the trunk for each layer"] = a_layer_a_run
    found = interleaved(ways, runs=5 if in_sequence else 3, warmup=1)
    middle = {way: statistics.median(seconds) for way, seconds in found.items()}
    first, second, *third = middle.values()
    print(f"\nAn epoch, {name}, {items} images of {GRID} x {GRID} codes, {CLASSES} classes, {STEPS} steps\n\n{HEADER}")
    for way, seconds in found.items():
        print(row(way, seconds, units=items, unit="images"))
    parameters = sum(each.numel() for heads_ in known[0].heads.values() for each in heads_.stacked.values())
    batch_mb = len(layers) * BATCH * GRID * GRID * shape.width * 2 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"\n{second / first:.2f} x the frozen forward"
        + (f"; a run for each layer {third[0] / second:.1f} x the one stream" if third else "")
        + f". Heads: {parameters / 1e6:.1f} M parameters, {parameters * 16 / 1e6:,.0f} MB with gradients and AdamW's "
        f"state; features of a batch {batch_mb:,.0f} MB; peak of the process {peak:.1f} GB"
    )


def cached() -> None:
    """`probe` of clips twice with a cache: the whole evaluation, and the part that makes features."""
    shape = ModelConfig(vocab_size=VOCABULARY + 4, width=256, layers=12, heads=4, mlp_hidden=704)
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    backbone = TotoBackbone(
        Transformer(replace(shape, vocab_size=tokenizer.vocab_size + 4)),
        tokenizer,
        name="random",
        weights_sha256="random",
        passport={},
        frames=4,
        stride=4,
        frame_size=64,
        grid=(8, 8),
    )
    sides = [procedural_clips(seed, count, frames=4, size=64) for seed, count in ((1, 96), (2, 36))]
    config = ProbeConfig(epochs=1, layers=(3, 6, 9))
    print("\nProbes of 96 + 36 clips of 4 frames, 12 x 256, 3 layers, 1 epoch, features kept on disk\n")
    print("| | seconds |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = ProbeData(cache=CacheConfig(folder=Path(folder) / "cache"))
        seconds = []
        for name in ("first run", "second run"):
            began = time.perf_counter()
            probe(backbone, *sides, config=config, data=data)
            seconds.append(time.perf_counter() - began)
            print(f"| {name} | {seconds[-1]:.2f} |", flush=True)
    print(f"\nThe second run is {seconds[0] / seconds[1]:.1f} x as fast")


if __name__ == "__main__":
    main()
