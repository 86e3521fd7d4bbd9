"""Kills tokenizing runs, or their workers, at random moments; the store must be that of an undisturbed run.

Everything goes through `toto tokenize` in a process of its own. Shards are cut by the size of files, so the videos
get a hole at their end that takes no space on disk: a run then writes many shards, and can be killed between them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fault_campaign import children_of, tiny_tokenizer

from toto.media.encode import write_image, write_video
from toto.media.procedural import make_clip
from toto.runtime.provenance import RECORD
from toto.runtime.seed import stream
from toto.tokens.output import PARTS, PLAN
from toto.tokens.shards import MANIFEST, TokenStore

HOLE = 25_000_000  # bytes of each video that are not on disk
TOO_LONG = 600.0  # seconds for a run
GONE_WITHIN = 60.0  # seconds until the workers of a killed run have left
MOMENTS = {"start": 0.2, "plan": 0.2, "shard": 0.6}  # what kills are counted from, and how often
POLL = 0.002


@dataclass(kw_only=True)
class Result:
    """How often something was killed, where the runs stood then, and what is wrong."""

    kills: int = 0
    runs: int = 0
    stores: int = 0
    shards: int = 0
    at_shard: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        stood = ", ".join(f"{shard}: {self.at_shard.count(shard)}" for shard in sorted(set(self.at_shard)))
        yield f"{self.kills} kills in {self.runs} runs, {self.stores} stores of {self.shards} shards finished"
        yield f"finished shards when it was killed: {stood}"
        yield from (f"a run ended by itself: {line}" for line in self.failures[:10])
        yield f"wrong: {len(self.wrong)} ({self.seconds:.0f} s)"
        yield from (f"  {line}" for line in self.wrong[:20])


def make_source(folder: Path, *, videos: int, frames: int = 96, size: int = 96) -> Path:
    """A folder of videos that end in a hole, of images, and of damaged ones, in two classes."""
    for number in range(videos):
        clip = make_clip(3, number, frames=frames, size=size).clip
        path = folder / f"class{number % 2}" / f"{number:03d}.mp4"
        write_video(path, clip.frames, rate=12)
        hole = HOLE + 8 * number  # of unequal sizes, so that nobody has to compare them
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(hole.to_bytes(4, "big") + b"free")
            file.truncate(file.tell() + hole - 8)
        write_image(path.with_suffix(".png"), clip.frames[0])
        path.with_suffix(".jpg").write_bytes(b"no image, number %d" % number)
    return folder


def kill_runs(out: Path, *, times: int, seed: int, workers: int, videos: int = 24) -> Result:
    """Kill the run itself `times` times with SIGKILL, each time at a random moment, and run the same command again.

    A store that gets finished in between is compared with an undisturbed one, and another one is begun.
    """
    job = _Job(out, workers=workers, videos=videos)
    result, rng, began = Result(shards=job.shards), stream(seed, "kill"), time.perf_counter()
    while result.kills < times:
        if (job.out / MANIFEST).exists():
            job.finish(result)
        process = job.start()
        result.runs += 1
        _wait_for_a_moment(process, job, rng)
        children = children_of(process.pid)
        if process.poll() is None:
            result.at_shard.append(job.finished_shards())
            process.send_signal(signal.SIGKILL)
            result.kills += 1
        _leave(process)
        result.wrong += _left_behind(children)
        if process.returncode == 0:
            job.compare(result)
    job.finish(result)
    result.seconds = time.perf_counter() - began
    return result


def kill_workers(out: Path, *, times: int, seed: int, workers: int, videos: int = 24) -> Result:
    """Kill single workers of runs `times` times with SIGKILL; a run goes on, or says why not and is run again."""
    job = _Job(out, workers=workers, videos=videos)
    result, rng, began = Result(shards=job.shards), stream(seed, "kill-worker"), time.perf_counter()
    while result.kills < times:
        process = job.start()
        result.runs += 1
        while process.poll() is None:
            time.sleep(float(rng.uniform(0, job.lasting["plan"])))
            found = [child for child in children_of(process.pid) if _is_worker(child)]
            if found and process.poll() is None and result.kills < times:
                result.at_shard.append(job.finished_shards())
                _kill(int(rng.choice(found)))
                result.kills += 1
        _, said = process.communicate()
        if process.returncode == 0:
            job.compare(result)
        else:
            last = said.strip().splitlines()[-1] if said.strip() else ""
            result.failures.append(f"exit {process.returncode}: {last}")
            if process.returncode != 1 or "SIGKILL" not in last:
                result.wrong.append(f"a run with a killed worker ended with {process.returncode}: {last}")
    job.finish(result)
    result.seconds = time.perf_counter() - began
    return result


class _Job:
    """A tokenizing command, and what its store should be."""

    def __init__(self, out: Path, *, workers: int, videos: int):
        shutil.rmtree(out, ignore_errors=True)
        self._source = make_source(out / "source", videos=videos)
        self._tokenizer = tiny_tokenizer(out / "tokenizer")
        self._whole, self.out, self._workers = out / "whole", out / "killed", workers
        process = self.start(self._whole)
        self.lasting = {"start": time.perf_counter()}  # seconds from each moment to the end
        for moment, path in (("plan", PLAN), ("shard", f"{PARTS}/00000.json")):
            while not (self._whole / path).exists() and process.poll() is None:
                time.sleep(POLL)
            self.lasting[moment] = time.perf_counter()
        _, said = process.communicate()
        self.lasting = {moment: time.perf_counter() - began for moment, began in self.lasting.items()}
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed: {said}")
        self._expected = _bytes_of(self._whole)
        self.shards = len(TokenStore(self._whole).manifest["shards"])

    def start(self, out: Path | None = None) -> subprocess.Popen[str]:
        words = ["tokenize", self._source, "--out", out or self.out, "--tokenizer", self._tokenizer]
        words += ["--size", 32, "--min-frames", 4, "--workers", self._workers]
        command = [sys.executable, "-m", "toto", *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finished_shards(self) -> int:
        return self.shards if (self.out / MANIFEST).exists() else len(list(self.out.glob("parts/*.json")))

    def compare(self, result: Result) -> None:
        """Compare a finished store with the undisturbed one, and remove it."""
        result.stores += 1
        found = _bytes_of(self.out)
        different = [name for name in {**found, **self._expected} if found.get(name) != self._expected.get(name)]
        if different:
            result.wrong.append(f"store {result.stores} differs in {', '.join(sorted(different))}")
        shutil.rmtree(self.out)

    def finish(self, result: Result) -> None:
        """Run the command until it ends well, twice at most since nobody disturbs it, and compare."""
        for _ in range(2):
            process = self.start()
            result.runs += 1
            _, said = process.communicate(timeout=TOO_LONG)
            if process.returncode == 0:
                self.compare(result)
                return
        result.wrong.append(f"an undisturbed run could not finish what killed ones began: {said}")


def _bytes_of(store: Path) -> dict[str, bytes]:
    """Every file of a store but the record of when it was made."""
    files = (path for path in store.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


def _wait_for_a_moment(process: subprocess.Popen[str], job: _Job, rng: np.random.Generator) -> None:
    """Wait for a random time, counted from the run's start, from its plan, or from the first shard that it adds."""
    moment = str(rng.choice(list(MOMENTS), p=list(MOMENTS.values())))
    before = job.finished_shards()
    began = {
        "start": lambda: True,
        "plan": lambda: (job.out / PLAN).exists() or (job.out / MANIFEST).exists(),
        "shard": lambda: job.finished_shards() > before,
    }[moment]
    while process.poll() is None and not began():
        time.sleep(POLL)
    until = time.perf_counter() + float(rng.uniform(0, job.lasting[moment]))
    while process.poll() is None and time.perf_counter() < until:
        time.sleep(POLL)


def _leave(process: subprocess.Popen[str]) -> None:
    """Wait for a process whose pipe its orphans may hold open for a moment."""
    process.wait(timeout=TOO_LONG)
    if process.stderr:
        process.stderr.close()


def _left_behind(processes: list[int]) -> list[str]:
    until = time.perf_counter() + GONE_WITHIN
    while (alive := [one for one in processes if _runs(one)]) and time.perf_counter() < until:
        time.sleep(0.05)
    return [f"process {one} outlived its killed run" for one in alive]


def _runs(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def _is_worker(process: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
