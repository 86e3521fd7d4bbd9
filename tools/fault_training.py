"""Kills training runs with SIGKILL; what `--resume` makes of them must be, bit for bit, that of an undisturbed run.

Everything goes through `toto train` in processes of its own, over several ranks through `torchrun`. Moments are drawn
from the whole run, from the saving of a checkpoint, and from the steps just after one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_campaign import children_of

from toto.media.ledger import LedgerRow
from toto.model.weights import checkpoints, load_model, newest_checkpoint
from toto.runtime.metrics import FILE, POSITIONS
from toto.runtime.seed import stream
from toto.tokens.passport import Passport
from toto.tokens.shards import StoredItem, finish_store, write_ledger, write_shard
from toto.training.checkpoint import restore_checkpoint
from toto.training.optimizer import OptimizerConfig, make_optimizer

GRID, CODES = (3, 3), 32
SAVE_EVERY, EVAL_EVERY = 10, 50
MODEL = "--model.width 32 --model.layers 2 --model.heads 2 --model.mlp-hidden 64 --data.frames 4 --batch 4"
TOO_LONG = 600.0  # seconds for a run
HEARD = 20  # seconds after which a rank gives up one that is dead
POLL = 0.001
MOMENTS = {"any": 0.4, "saving": 0.4, "saved": 0.2}  # what kills are counted from, and how often
MEASURED = ("speed/", "memory/")  # rows that differ from run to run


@dataclass(kw_only=True)
class Result:
    """How often a run was killed, where it stood then, and what is wrong."""

    kills: int = 0
    starts: int = 0
    runs: int = 0
    while_saving: int = 0
    at_step: list[int] = field(default_factory=list)
    moments: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """For people."""
        drawn = ", ".join(f"{name} {count}" for name, count in sorted(self.moments.items()))
        yield f"{self.kills} kills ({drawn}) in {self.starts} starts; {self.while_saving} left half a checkpoint"
        yield f"newest checkpoint when it was killed: {', '.join(map(str, self.at_step))}"
        yield f"{self.runs} finished runs compared: weights, moments, metrics and positions, bit for bit"
        yield f"wrong: {len(self.wrong)} ({self.seconds:.0f} s)"
        yield from (f"  {line}" for line in self.wrong[:20])


def kill_training(out: Path, *, times: int, seed: int, ranks: int, steps: int = 400) -> Result:
    """Kill a run `times` times, and resume it each time; whenever it gets finished, compare it and begin another."""
    job = _Job(out, ranks=ranks, steps=steps)
    result, rng, began = Result(), stream(seed, "kill-training"), time.perf_counter()
    while result.kills < times:
        if job.finished():
            job.compare(result)
        before, process = job.leftovers(), job.start(resume=True)
        result.starts += 1
        moment = _wait_for_a_moment(process, job, rng)
        if process.poll() is None:
            result.at_step.append(job.step())
            _kill(process, whole=ranks == 1 or rng.random() < 0.5, rng=rng)
            result.moments[moment] += 1
            result.kills += 1
        _, said = process.communicate(timeout=TOO_LONG)
        result.while_saving += bool(job.leftovers() - before)
        if process.returncode == 0 and not job.finished():
            result.wrong.append(f"a run ended well without its last checkpoint: {said[-300:]}")
        if process.returncode > 0 and ranks == 1:
            result.wrong.append(f"a resumed run failed: {said[-300:]}")
    process = job.start(resume=True)
    result.starts += 1
    _, said = process.communicate(timeout=TOO_LONG)
    if process.returncode:
        result.wrong.append(f"nobody disturbed it, and it ended with {process.returncode}: {said[-300:]}")
    else:
        job.compare(result)
    result.seconds = time.perf_counter() - began
    return result


def make_codes(folder: Path, *, seed: int, kind: str, items: int, frames: int) -> Path:
    """A store of random codes, with some order from frame to frame."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    codes = [_clip(rng, frames) for _ in range(items)]
    found = [
        StoredItem(
            id=f"{kind}{number}",
            kind=kind,
            label=None,
            first_frame=number * frames,
            frame_count=frames,
            fps=10,
            stride=4,
        )
        for number in range(items)
    ]
    shard = write_shard(folder, 0, codes, GRID)
    write_ledger(folder, [LedgerRow(id=item.id, kind=kind, status="ok", frames=frames) for item in found])
    passport = Passport(
        kind="vqvae",
        weights_sha256="a" * 64,
        preprocessing="none",
        vocab_size=CODES,
        frame_size=(8 * GRID[0], 8 * GRID[1]),
        grid=GRID,
    )
    finish_store(folder, passport=passport, stride=4, shards=[shard], items=found, counts={"ok": items}, job={})
    return folder


def _clip(rng: np.random.Generator, frames: int) -> Any:
    drift = rng.integers(CODES) + np.arange(frames)[:, None, None] + np.arange(GRID[0])[None, :, None]
    noise = rng.integers(0, CODES, (frames, *GRID))
    return np.where(rng.random((frames, *GRID)) < 0.1, noise, drift % CODES).astype(np.uint16)


class _Job:
    """A training command, and what its run should hold at the end."""

    def __init__(self, out: Path, *, ranks: int, steps: int):
        shutil.rmtree(out, ignore_errors=True)
        self._data = out / "data"
        for kind, items, frames in (("video", 12, 24), ("image", 30, 1), ("heldout", 4, 8)):
            make_codes(self._data / kind, seed=items, kind="image" if kind == "image" else "video", items=items,
                       frames=frames)  # fmt: skip
        self._ranks, self._steps = ranks, steps
        self._whole, self.out = out / "whole", out / "killed"
        began = time.perf_counter()
        _, said = (process := self.start(self._whole)).communicate(timeout=TOO_LONG)
        self.lasting = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed: {said}")
        self._expected = self._contents(self._whole)

    def start(self, out: Path | None = None, *, resume: bool = False) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._ranks)]
        words = [sys.executable, *(launcher if self._ranks > 1 else []), "-m", "toto", "train", "nano"]
        words += ["--out", out or self.out, "--data", f"{self._data}/video=3", f"image:{self._data}/image=1"]
        words += ["--heldout", self._data / "heldout", *MODEL.split(), "--micro-batch", 4 // self._ranks]
        words += ["--steps", self._steps, "--save-every", SAVE_EVERY, "--eval-every", EVAL_EVERY, "--log-every", 1]
        words += ["--device", "cpu", "--precision", "fp32", "--parallel.timeout", HEARD, *["--resume"] * resume]
        return subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def step(self) -> int:
        """Of the newest checkpoint."""
        newest = newest_checkpoint(self.out)
        return int(newest.name.removeprefix("step-")) if newest else 0

    def leftovers(self) -> set[Path]:
        """Checkpoints that are being written, or that a killed run has left so."""
        return {path for path in (self.out / "checkpoints").glob(".step-*") if re.search(r"\.\d+$", path.name)}

    def finished(self) -> bool:
        return self.step() == self._steps

    def compare(self, result: Result) -> None:
        """Compare a finished run with the undisturbed one, and remove it."""
        process = self.start(resume=True)  # it may have been killed after its last checkpoint; now it ends well
        _, said = process.communicate(timeout=TOO_LONG)
        if process.returncode:
            result.wrong.append(f"a finished run could not be ended: {said[-300:]}")
        result.runs += 1
        found = self._contents(self.out)
        odd = [name for name in {**found, **self._expected} if not _same(found.get(name), self._expected.get(name))]
        if odd:
            kept = self.out.with_name(f"different-{result.runs}")
            self.out.rename(kept)
            result.wrong.append(f"run {result.runs} differs in {', '.join(odd)}; it is {kept}")
        else:
            shutil.rmtree(self.out)

    def _contents(self, run: Path) -> dict[str, Any]:
        """What has to be the same: the last checkpoint's tensors and its card, and the rows of all metrics."""
        last = checkpoints(run)[-1]
        model = load_model(last)
        optimizer = make_optimizer(model, OptimizerConfig())
        card = restore_checkpoint(last, model, optimizer)
        moments = {
            f"moment {number} {name}": value
            for number, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return {
            "step": card.training["step"],
            "watch": card.training["watch"],
            "model.safetensors": (last / "model.safetensors").read_bytes(),
            **{f"weight {name}": value for name, value in model.state_dict().items()},
            **moments,
            **{name: _rows(run / name) for name in (FILE, POSITIONS)},
        }


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows in their order, without what is measured of the machine."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def _wait_for_a_moment(process: subprocess.Popen[str], job: _Job, rng: np.random.Generator) -> str:
    """Wait for a random time in the run, for a checkpoint that is being written, or for one that just was."""
    moment = str(rng.choice(list(MOMENTS), p=list(MOMENTS.values())))
    if moment == "any":
        _wait(process, float(rng.uniform(0, job.lasting)))
        return moment
    for number in range(int(rng.integers(1, 6))):
        while moment == "saving" and number and process.poll() is None and job.leftovers():
            time.sleep(POLL)
        before = job.step()
        while process.poll() is None and not (job.leftovers() if moment == "saving" else job.step() > before):
            time.sleep(POLL)
    _wait(process, float(rng.uniform(0, 0.01 if moment == "saving" else 0.1)))
    return moment


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    until = time.perf_counter() + seconds
    while process.poll() is None and time.perf_counter() < until:
        time.sleep(POLL)


def _kill(process: subprocess.Popen[str], *, whole: bool, rng: np.random.Generator) -> None:
    """Kill a job at once, or a single rank of it, after which the others have to end by themselves."""
    ranks = children_of(process.pid)
    doomed = [process.pid, *ranks] if whole or not ranks else [int(rng.choice(ranks))]
    for one in doomed:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue
