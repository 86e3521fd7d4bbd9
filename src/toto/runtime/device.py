"""Which device computes, and in which precision."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch

from toto.runtime.errors import ConfigError

Precision = Literal["auto", "bf16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or for "auto" the first GPU where there is one and the CPU elsewhere."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"can't use this device ({reason})", where=f"--device {name}", fix="use auto or cpu"
        ) from None
    return device


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16; "auto" asks whether the device has fast ones."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    fast = torch.cpu.get_capabilities()
    return bool(fast.get("avx512_bf16") or fast.get("amx_bf16") or fast.get("bf16"))


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in bfloat16, or one that changes nothing."""
    if use_bf16(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The precision in which matrix products of a tensor run here: autocast's where it is on, or its own."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors had on a GPU, or this process had in memory, so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute as in a worker process, so that results don't depend on the number of workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
