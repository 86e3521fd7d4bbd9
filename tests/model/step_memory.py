"""What real training steps on this CPU allocate: `python step_memory.py '[CASE, ...]'` prints a JSON list.

torch's profiler reports every allocation and release of a CPU tensor: `peak` is the largest sum during the second step,
weights and moments included; `held` are the bytes of these. `resident` is what the process grew by, at its peak.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.training.objective import next_token_loss
from toto.training.optimizer import OptimizerConfig, make_optimizer
from toto.training.parallel import unchanged_weights

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.toto.blockwise_attention.default,
}


def measured(model: dict, batch: int, length: int, bf16: bool, passes: int, checkpointing: str) -> dict[str, float]:
    """Two steps of `passes` forward passes over `batch` sequences of `length` ids."""
    torch.manual_seed(0)
    before = _resident("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = Transformer(ModelConfig(**model))
        optimizer = make_optimizer(made, OptimizerConfig())
        if checkpointing != "none":
            _checkpoint_blocks(made, selective=checkpointing == "selective")
        for number in range(2):
            with record_function(f"step {number}"):
                _step(made, optimizer, batch, length, bf16, passes)
        held = sum(weight.nbytes for weight in made.parameters())
        held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        del made, optimizer  # under the profiler, whose sum would keep them otherwise
        gc.collect()
    return {**_peaks(profiler), "held": held, "resident": _resident("VmHWM") - before}


def _step(model, optimizer, batch, length, bf16, passes):
    config = model.config
    with unchanged_weights(model, passes):
        for _ in range(passes):
            tokens = torch.randint(4, config.vocabulary, (batch, length))
            tokens[:, 0], tokens[:, -1] = 1, 2
            patches = torch.rand(batch, length - 2, config.values_in_patch) if config.inputs == "patches" else None
            with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = next_token_loss(model, tokens, patches).mean
            with record_function("backward"):
                loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _checkpoint_blocks(model, *, selective):
    def policy(context, operation, *arguments, **named):
        return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)


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
    print(json.dumps([measured(**case) for case in json.loads(sys.argv[1])]))
