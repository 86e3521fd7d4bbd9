"""Videos at stride 4 to 128 px: toto's way against plain loops of PyAV, torchcodec and decord, by thread setting.

    python -m benchmarks decoding
    python -m benchmarks decoding --files FILE_OR_FOLDER ...

Every way decodes the same files and gives the same frames: every 4th, shortest side to 128, centre crop. toto's way is
that of `toto tokenize` (`stream_item`, then `View.crop`); a plain loop decodes to RGB, stacks, and resizes by the same
function. Frames are compared first. torchcodec and decord are optional.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import torch
from torch import Tensor

from benchmarks.timing import interleaved
from toto.media import sample
from toto.media.catalog import Item
from toto.media.decode import media_kind, read_media
from toto.media.reading import stream_item
from toto.media.transforms import crop_box, resize, shortest_side_to, square
from toto.tokens.views import View

try:
    import decord
except (ImportError, OSError) as error:
    decord, no_decord = None, error
try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError) as error:
    VideoDecoder, no_torchcodec = None, error

SIZE, STRIDE = 128, 4
MADE = {"made, 320 x 240": (240, 320, 240), "made, 1280 x 720": (720, 1280, 96)}
PYAV_THREADS = {"1 thread": ("NONE", 1), "slice": ("SLICE", 0), "frame": ("FRAME", 0), "auto": ("AUTO", 0)}


def toto(path: Path) -> Tensor:
    item = Item(id=path.name, path=path, kind="video", label=None)
    view = View(size=SIZE, stride=STRIDE)
    return torch.cat([view.crop(clip) for clip in stream_item(item, stride=STRIDE)])


def pyav(path: Path, kind: str, count: int) -> Tensor:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = kind, count
        kept = [
            torch.from_numpy(frame.to_ndarray(format="rgb24"))
            for number, frame in enumerate(container.decode(stream))
            if number % STRIDE == 0
        ]
    return square(torch.stack(kept), SIZE)


def pyav_resizing(path: Path) -> Tensor:
    """PyAV that lets FFmpeg resize (bilinear) while it converts."""
    kept = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        height, width = shortest_side_to(stream.height, stream.width, SIZE)
        box = crop_box(height, width, SIZE, "centre")
        for number, frame in enumerate(container.decode(stream)):
            if number % STRIDE == 0:
                pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
                kept.append(torch.from_numpy(pixels[box.top : box.top + SIZE, box.left : box.left + SIZE].copy()))
    return torch.stack(kept)


def with_torchcodec(path: Path, threads: int) -> Tensor:
    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="approximate")
    return square(decoder[0 : len(decoder) : STRIDE], SIZE)


def with_decord(path: Path, threads: int) -> Tensor:
    reader = decord.VideoReader(str(path), num_threads=threads)
    return square(torch.from_numpy(reader.get_batch(range(0, len(reader), STRIDE)).asnumpy()), SIZE)


def ways_to_decode() -> dict[str, Callable[[Path], Tensor]]:
    ways: dict[str, Callable[[Path], Tensor]] = {"toto": toto}
    ways |= {f"PyAV, {name}": partial(pyav, kind=kind, count=count) for name, (kind, count) in PYAV_THREADS.items()}
    if VideoDecoder is not None:
        ways |= {"torchcodec, 1 thread": partial(with_torchcodec, threads=1)}
        ways |= {"torchcodec, auto": partial(with_torchcodec, threads=0)}
    if decord is not None:
        ways |= {"decord, 1 thread": partial(with_decord, threads=1)}
        ways |= {"decord, auto": partial(with_decord, threads=0)}
    return ways


def make_video(path: Path, height: int, width: int, frames: int) -> Path:
    """H.264 with B-frames: scenes of the embedded film, enlarged, with grain."""
    film = torch.cat([read_media(scene).frames[:48] for scene in sample.scenes("train")[: -(-frames // 48)]])[:frames]
    grain = torch.Generator().manual_seed(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(24))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "23", "preset": "medium", "bf": "3"}
        for picture in film:
            large = resize(picture[None], height, width)[0].float()
            noisy = large + 4 * torch.randn(large.shape, generator=grain)
            frame = av.VideoFrame.from_ndarray(noisy.clamp(0, 255).byte().numpy(), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def compare(files: list[Path], ways: dict[str, Callable[[Path], Tensor]]) -> dict[str, Callable[[Path], Tensor]]:
    """The ways that choose the same frames; says how far pixels are from those of PyAV with one thread."""
    agreeing = {}
    for name, way in ways.items():
        worst, total, pixels = 0, 0, 0
        try:
            for path in files:
                difference = (way(path).short() - pyav(path, "NONE", 1).short()).abs()
                worst, total = max(worst, int(difference.max())), total + int(difference.sum())
                pixels += difference.numel()
        except Exception as error:
            print(f"{name} is left out: on {path.name} {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        if worst:
            print(f"{name}: levels differ by {total / pixels:.2f} on average, at most by {worst}")
        if name == "toto":
            assert worst == 0
        agreeing[name] = way
    same = [name for name in agreeing if name != "PyAV, auto, FFmpeg resizes"]
    print(f"compared on {len(files)} files: {', '.join(same)}")
    return agreeing


def time_alone(files: list[Path], ways: dict[str, Callable[[Path], Tensor]], runs: int) -> None:
    """One process that has the machine to itself."""
    kept = sum(len(toto(path)) for path in files)
    cpu: dict[str, list[float]] = {name: [] for name in ways}

    def run(name: str) -> None:
        began = time.process_time()
        for path in files:
            ways[name](path)
        cpu[name].append(time.process_time() - began)

    taken = interleaved({name: partial(run, name) for name in ways}, runs=runs, warmup=1)
    plain = {name: statistics.median(seconds) for name, seconds in taken.items() if "toto" not in name}
    fastest = min((name for name in plain if "FFmpeg resizes" not in name), key=plain.__getitem__)
    print("\n| one process | frames kept/s | range | CPU a kept frame | time, of toto's |\n|---|---|---|---|---|")
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        print(
            f"| {name} | {kept / middle:,.0f} | {kept / max(seconds):,.0f} to {kept / min(seconds):,.0f} "
            f"| {1000 * statistics.median(cpu[name]) / kept:.2f} ms | {middle / statistics.median(taken['toto']):.2f} |"
        )
    ratios = sorted(theirs / mine for theirs, mine in zip(taken[fastest], taken["toto"], strict=True))
    print(
        f"\ntoto has {statistics.median(ratios):.2f} x the speed of the fastest plain loop ({fastest}; "
        f"turns: {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    least = min((name for name in plain if "FFmpeg resizes" not in name), key=lambda name: statistics.median(cpu[name]))
    mine, theirs = (1000 * statistics.median(cpu[name]) / kept for name in ("toto", least))
    print(f"CPU a kept frame: toto {mine:.2f} ms, the most thrifty plain loop {theirs:.2f} ms ({least})", flush=True)


def quietly(way: Callable[[Path], Tensor], path: Path) -> int:
    torch.set_num_threads(1)
    return len(way(path))


def time_together(files: list[Path], ways: dict[str, Callable[[Path], Tensor]], runs: int) -> None:
    """As many processes as cores, as `toto tokenize` has them."""
    cores = len(os.sched_getaffinity(0))
    many = files * -(-4 * cores // len(files))
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        kept = sum(pool.map(partial(quietly, toto), many))
        calls = {name: lambda way=way: list(pool.map(partial(quietly, way), many)) for name, way in ways.items()}
        taken = interleaved(calls, runs=runs, warmup=1)
    print(f"\n| {cores} processes | frames kept/s | range |\n|---|---|---|")
    for name, seconds in taken.items():
        middle = kept / statistics.median(seconds)
        print(f"| {name} | {middle:,.0f} | {kept / max(seconds):,.0f} to {kept / min(seconds):,.0f} |", flush=True)


def videos_in(places: list[Path]) -> list[Path]:
    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return [file for file in files if file.is_file() and media_kind(file) == "video"]


def main() -> None:
    """Print, for every group of files, agreement, times alone, and times with all cores busy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks decoding")
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="videos or folders, beside those made here")
    parser.add_argument("--runs", type=int, default=7)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    if decord is None:
        print(f"without decord: {str(no_decord).splitlines()[0]}")
    if VideoDecoder is None:
        print(f"without torchcodec: {str(no_torchcodec).splitlines()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        groups = {"embedded film, 228 x 128": sample.scenes("train")[:8]}
        for number, (name, (height, width, frames)) in enumerate(MADE.items()):
            groups[name] = [make_video(Path(folder) / f"{number}.mp4", height, width, frames)]
        if options.files:
            groups["given files"] = videos_in(options.files)
        for name, files in groups.items():
            print(f"\n### {name}: {len(files)} files\n")
            ways = compare(files, ways_to_decode() | {"PyAV, auto, FFmpeg resizes": pyav_resizing})
            time_alone(files, ways, options.runs)
            busy = [name for name in ways if name == "toto" or "1 thread" in name or name.endswith("frame")]
            time_together(files, {name: ways[name] for name in busy}, options.runs)


if __name__ == "__main__":
    main()
