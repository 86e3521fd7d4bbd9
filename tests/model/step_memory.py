"""What real training steps on this CPU allocate: `python step_memory.py '{NAME: CASE, ...}'` prints a JSON object.

torch's profiler reports every allocation and release of a CPU tensor: `peak` is the largest sum during the second step,
weights and moments included; `held` are the bytes of these. `resident` is what the process grew by, at its peak.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from toto.model.architectures import build, config_of
from toto.runtime.ranks import Ranks
from toto.training.optimizer import OptimizerConfig, make_optimizer
from toto.training.parallel import ParallelConfig, laid_out, unchanged_weights


def measured_apart(cases: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What each case's step really allocated, in a process of its own."""
    heap = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process
    words = [sys.executable, __file__, json.dumps(cases)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **heap})
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(model: dict, batch: int, length: int, bf16: bool, passes: int, checkpointing: str) -> dict[str, float]:
    """Two steps of `passes` forward passes over `batch` sequences of `length` ids."""
    torch.manual_seed(0)
    before = _resident("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = build(config_of(model))
        optimizer = make_optimizer(made, OptimizerConfig())
        parallel = ParallelConfig(checkpointing=checkpointing)
        learner = laid_out(made, parallel, Ranks(), device=torch.device("cpu"), bf16=bf16)
        for number in range(2):
            with record_function(f"step {number}"):
                _step(learner, optimizer, batch, length, bf16, passes)
        held = sum(weight.nbytes for weight in made.parameters())
        held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        del made, learner, optimizer  # under the profiler, whose sum would keep them otherwise
        gc.collect()
    return {**_peaks(profiler), "held": held, "resident": _resident("VmHWM") - before}


def _step(learner, optimizer, batch, length, bf16, passes):
    config = learner.model.config
    with unchanged_weights(learner, passes):
        for _ in range(passes):
            tokens = torch.randint(4, config.vocabulary, (batch, length))
            tokens[:, 0], tokens[:, -1] = 1, 2
            patches = torch.rand(batch, length - 2, config.values_in_patch) if config.inputs == "patches" else None
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss, _ = learner(tokens, patches)
            with record_function("backward"):
                loss.backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _peaks(profiler):
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    (step,) = [event for event in events if event.get("name") == "step 1" and event.get("cat") == "user_annotation"]
    allocated = sorted(
        (event["ts"], event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]"
    )
    during = [total for time, total in allocated if step["ts"] <= time <= step["ts"] + step["dur"]]
    return {"peak": max(during), "left": during[-1]}


def _resident(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(name)


if __name__ == "__main__":
    print(json.dumps({name: measured(**case) for name, case in json.loads(sys.argv[1]).items()}))
