"""Encoding with the dVAE of the published size against the `DALL-E` package: same weights, frames and threads.

Tokens are compared first: all equal in fp32, at least 98 % in bf16. Then interleaved times, and what share they are of
the rate of a matrix product here, and memory with 8 and with 64 frames.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import HEADER, interleaved, row
from toto.media import sample
from toto.media.decode import read_media
from toto.media.transforms import square
from toto.tokens.dvae import DVAE, DVAEConfig, DVAETokenizer, from_published
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import Arithmetic

try:
    import dall_e
except ImportError:
    dall_e = None

GFLOP_OF_128_PX = 68.07  # of a plain computation, per frame
PRODUCT = (4096, 2304, 768)  # rows, inner and columns: a 3 x 3 convolution of 256 channels
FRAMES = 8


def frames_of(size: int, count: int) -> Tensor:
    """Half of them from the embedded film, half noise."""
    film = torch.cat([square(read_media(path, stride=40).frames, size)[:2] for path in sample.scenes("heldout")])
    noise = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    return torch.cat([film[: count // 2], noise])[:count]


def tokenizer_of(precision: Arithmetic, encoder: dict[str, Tensor] | None = None) -> DVAETokenizer:
    """A dVAE of the published size with this encoder (as the package names it), or with random weights."""
    torch.manual_seed(0)
    model = DVAE(DVAEConfig())
    model.load_state_dict(model.state_dict() | from_published(encoder or {}, {}))
    passport = Passport(
        kind="dvae", weights_sha256="0" * 64, preprocessing=DVAETokenizer.preprocessing, vocab_size=8192
    )
    return DVAETokenizer(model, passport, {}, torch.device("cpu"), precision)


def products() -> dict[torch.dtype, float]:
    """GFLOP/s of a matrix product in both dtypes."""
    rows, inner, columns = PRODUCT
    ways, rates = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        ways[str(dtype)] = lambda left=left, right=right: left @ right
    for dtype, seconds in zip((torch.float32, torch.bfloat16), interleaved(ways, runs=15).values(), strict=True):
        rates[dtype] = 2 * rows * inner * columns / statistics.median(seconds) / 1e9
    return rates


def own_peak() -> float:
    """Peak resident megabytes of this process, without what its parent had when it was forked (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak(precision: Arithmetic, count: int) -> float:
    """Peak resident megabytes of a fresh process that encodes so many frames."""
    call = [sys.executable, "-m", "benchmarks.encoding", precision, str(count)]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print agreement, times and memory; one line where there is nothing to compare with."""
    if dall_e is None:
        print("skipped: the DALL-E package is not here (pip install --no-deps -r references.txt)")
        return
    torch.manual_seed(0)
    published = dall_e.Encoder().eval()
    ours = {name: tokenizer_of(name, published.state_dict()) for name in ("fp32", "bf16")}

    @torch.no_grad()
    def peer(frames: Tensor) -> Tensor:
        return published(dall_e.map_pixels(frames.permute(0, 3, 1, 2).float() / 255)).argmax(1)

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {FRAMES} frames, 53.8 M parameters")
    for size in (128, 256):
        frames = frames_of(size, FRAMES)
        theirs = torch.cat([peer(some) for some in frames.split(2)])
        share = {name: float((tokenizer.encode(frames) == theirs).double().mean()) for name, tokenizer in ours.items()}
        print(f"{size} px: equal tokens in fp32 {share['fp32']:.2%}, in bf16 {share['bf16']:.2%}", flush=True)
        assert share["fp32"] == 1
        assert share["bf16"] >= 0.98

    frames = frames_of(128, FRAMES)
    ways = {"DALL-E package, fp32": lambda: peer(frames)}
    ways |= {f"toto, {name}": lambda tokenizer=tokenizer: tokenizer.encode(frames) for name, tokenizer in ours.items()}
    taken = interleaved(ways, runs=9)
    print(f"\n{FRAMES} frames of 128 px; GFLOP are those of a plain computation, {GFLOP_OF_128_PX} a frame\n\n{HEADER}")
    for way, seconds in taken.items():
        print(row(way, seconds, units=GFLOP_OF_128_PX * FRAMES, unit="GFLOP"))
    rates = products()
    middle = {way: statistics.median(seconds) for way, seconds in taken.items()}
    base = middle["DALL-E package, fp32"]
    print()
    for way, second in middle.items():
        rate = GFLOP_OF_128_PX * FRAMES / second
        product = rates[torch.bfloat16 if "bf16" in way else torch.float32]
        times = sorted(theirs / mine for theirs, mine in zip(taken["DALL-E package, fp32"], taken[way], strict=True))
        print(
            f"{way}: {base / second:.2f} x the package's speed (turns: {times[0]:.2f} to {times[-1]:.2f}), "
            f"{FRAMES / second:.1f} frames/s, {rate / product:.0%} of a matrix product's {product:.0f} GFLOP/s"
        )
    for name in ours:
        print(f"{name}: peak memory {peak(name, 8):,.0f} MB with 8 frames, {peak(name, 64):,.0f} MB with 64")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        made = tokenizer_of(sys.argv[1])  # type: ignore[arg-type]
        made.encode(torch.zeros(int(sys.argv[2]), 128, 128, 3, dtype=torch.uint8))
        print(own_peak())
    else:
        main()
