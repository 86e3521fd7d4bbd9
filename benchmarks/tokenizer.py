"""What the embedded tokenizer does to held-out frames, and how fast: the figures and the picture of docs/tokenizer.md.

python benchmarks/tokenizer.py --picture docs/pictures/tokenizer.png
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from toto.media import sample
from toto.media.decode import read_media
from toto.media.transforms import square
from toto.tokens.quality import psnr, reconstruction_report
from toto.tokens.tokenizer import Tokenizer, load_tokenizer
from toto.tokens.vqvae import VQVAETokenizer

SCENE_STRIDE = 6
AVIF_CONTAINER = 280  # bytes of an AVIF file that are not its picture
TILE, GAP, LABEL = 192, 6, 104
SHOWN = 6


def squares(paths: list[Path], size: int, stride: int) -> list[Tensor]:
    """The central squares of some files' frames."""
    return [square(read_media(path, stride=stride).frames, size) for path in paths]


def measure(tokenizer: Tokenizer, size: int) -> None:
    """Print a row of the table for each kind of held-out frames."""
    for name, paths in (("scenes", sample.scenes("heldout")), ("photographs", sample.photographs("heldout"))):
        report = reconstruction_report(tokenizer, squares(paths, size, SCENE_STRIDE))
        print(
            f"| {name}, {size} px | {report.frames} | {report.psnr_db:.2f} dB | {report.psnr_of_mean_error_db:.2f} dB "
            f"| {report.codes_used:,} ({report.share_used:.0%}) | {report.perplexity:,.0f} |",
            flush=True,
        )


def speed(tokenizer: Tokenizer, size: int) -> None:
    """Print how many frames a second are encoded and decoded: the best of some tries."""
    path = sample.scenes("heldout")[0]
    frames = square(read_media(path, limit=64).frames, size)
    best = {"encode": 0.0, "decode": 0.0}
    codes = tokenizer.encode(frames)
    for _ in range(8):
        for name, call in (("encode", lambda: tokenizer.encode(frames)), ("decode", lambda: tokenizer.decode(codes))):
            began = time.perf_counter()
            call()
            best[name] = max(best[name], len(frames) / (time.perf_counter() - began))
    print(f"{size} px: encode {best['encode']:,.0f} frames/s, decode {best['decode']:,.0f} frames/s")


def yardstick(frames: Tensor, payload: int) -> tuple[float, float]:
    """Mean size and PSNR of AVIF at the best quality of each frame whose payload stays within so many bytes."""
    sizes, ratios = [], []
    for frame in frames:
        low, high, best = 0, 100, (0, 0.0)
        while low <= high:
            quality, buffer = (low + high) // 2, io.BytesIO()
            Image.fromarray(frame.numpy()).save(buffer, "AVIF", quality=quality, speed=6, max_threads=1)
            size = buffer.tell() - AVIF_CONTAINER
            if size <= payload:
                again = torch.from_numpy(np.array(Image.open(buffer).convert("RGB")))
                best, low = (size, float(psnr(frame[None], again[None]))), quality + 1
            else:
                high = quality - 1
        sizes.append(best[0])
        ratios.append(best[1])
    return sum(sizes) / len(sizes), sum(ratios) / len(ratios)


def print_yardstick() -> None:
    """Print what AVIF makes of the held-out frames in the bytes of their codes, and in more."""
    scenes = torch.cat(squares(sample.scenes("heldout"), 128, 4 * SCENE_STRIDE))
    photographs = torch.cat(squares(sample.photographs("heldout"), 128, 1))
    for name, frames, payload in (("scenes", scenes, 384), ("photographs", photographs, 384), ("scenes", scenes, 768)):
        size, ratio = yardstick(frames, payload)
        print(f"AVIF, {name}, at most {payload} bytes: {size:.0f} bytes, {ratio:.2f} dB", flush=True)


def draw(tokenizer: Tokenizer, out: Path) -> None:
    """Held-out frames above what their codes give."""
    scenes = [clip[len(clip) // 2] for clip in squares(sample.scenes("heldout"), 128, 1)]
    step = max(1, len(scenes) // SHOWN)
    photographs = [clip[0] for clip in squares(sample.photographs("heldout"), 128, 1)]
    rows = []
    for name, frames in (("film", scenes[::step][:SHOWN]), ("photographs", photographs[:SHOWN])):
        stack = torch.stack(frames)
        rebuilt = tokenizer.decode(tokenizer.encode(stack))
        rows += [(name, stack, None), ("256 codes", rebuilt, psnr(stack, rebuilt))]
    width = LABEL + SHOWN * (TILE + GAP)
    height = len(rows) * (TILE + GAP) + 2 * GAP + GAP
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    top = GAP
    for number, (label, frames, ratios) in enumerate(rows):
        pen.text((GAP, top + TILE // 2 - 8), label, "black", font=font)
        for column, frame in enumerate(frames):
            left = LABEL + column * (TILE + GAP)
            picture.paste(Image.fromarray(frame.numpy()).resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
            if ratios is not None:
                pen.text(
                    (left + 5, top + TILE - 21),
                    f"{ratios[column]:.1f} dB",
                    "white",
                    font=font,
                    stroke_width=2,
                    stroke_fill="black",
                )
        top += TILE + GAP + (2 * GAP if number == 1 else 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, optimize=True)


def main() -> None:
    """Print the figures; draw the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="draw originals above reconstructions into this file")
    parser.add_argument("--avif", action="store_true", help="print what AVIF makes of the same frames")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer()
    assert isinstance(tokenizer, VQVAETokenizer)
    print(f"{tokenizer.parameters:,} numbers, {torch.get_num_threads()} threads")
    for size in (128, 64):
        measure(tokenizer, size)
    for size in (64, 128):
        speed(tokenizer, size)
    if args.avif:
        print_yardstick()
    if args.picture:
        draw(tokenizer, args.picture)


if __name__ == "__main__":
    main()
