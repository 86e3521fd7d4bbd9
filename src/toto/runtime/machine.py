"""What a machine can do: described for planning, read from a file, or measured here."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toto.runtime.device import use_bf16
from toto.runtime.errors import ConfigError

MEASURED_SIZE, MEASURED_SECONDS = 2048, 0.5  # of a square matrix product, and how long it is repeated
GPUS = (  # by words of the name: dense FLOP/s in bf16 (0 where there are no products in bf16) and fp32, by data sheets
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("B200", 2250e12, 75e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 31.2e12),
    ("A40", 149.7e12, 37.4e12),
    ("RTX A6000", 154.8e12, 38.7e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
    ("V100", 0.0, 15.7e12),
    ("T4", 0.0, 8.1e12),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of machine, as planning sees it.

    Attributes:
        name: for people.
        peak_bf16: FLOP/s of a device's dense matrix products in bf16; 0 where it has none worth using.
        peak_fp32: likewise in fp32.
        utilisation: share of the peak that a training step is assumed to reach, communication included.
        memory: bytes of a device.
        usable: share of the memory that tensors may take; the rest goes to the runtime and to fragments.
        devices: devices in one machine.
        fused_norm: RMSNorm is one kernel there, which keeps less for the backward pass.
        source: where the figures come from.
    """

    name: str
    peak_bf16: float
    peak_fp32: float
    utilisation: float
    memory: float
    usable: float = 0.9
    devices: int = 8
    fused_norm: bool = True
    source: str = "given"

    def __post_init__(self) -> None:
        for field in ("peak_fp32", "memory", "devices", "utilisation", "usable"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"must be positive, is {getattr(self, field)}", where=f"machine.{field}")
        if not self.peak_bf16 >= 0:
            raise ConfigError(f"must not be negative, is {self.peak_bf16}", where="machine.peak_bf16")
        for field in ("peak_bf16", "peak_fp32", "memory"):
            if getattr(self, field) == math.inf:
                raise ConfigError("must be finite, is inf", where=f"machine.{field}")
        for field in ("utilisation", "usable"):
            if getattr(self, field) > 1:
                raise ConfigError(f"must be at most 1, is {getattr(self, field)}", where=f"machine.{field}")

    def peak(self, *, bf16: bool) -> float:
        """FLOP/s of a device in the precision that is used."""
        return self.peak_bf16 if bf16 else self.peak_fp32


H100 = Machine(
    name="H100 SXM",
    peak_bf16=989e12,
    peak_fp32=67e12,
    utilisation=0.4,
    memory=80e9,
    source="NVIDIA's data sheet, dense; utilisation is an assumption",
)
A100 = Machine(
    name="A100 SXM 80 GB",
    peak_bf16=312e12,
    peak_fp32=19.5e12,
    utilisation=0.45,
    memory=80e9,
    source="NVIDIA's data sheet, dense; utilisation is an assumption",
)
KNOWN: dict[str, Callable[[], Machine]] = {"h100": lambda: H100, "a100": lambda: A100, "this": lambda: measured()}


def machine(name: str) -> Machine:
    """A machine by name (h100, a100, this), or from a JSON file with the attributes of `Machine`.

    Raises:
        ConfigError: no such name or file, or a file that doesn't describe a machine.
    """
    if name in KNOWN:
        return KNOWN[name]()
    path, where = Path(name), f"--machine {name}"
    if not path.is_file():
        raise ConfigError("no such machine or file", where=where, fix=f"use {', '.join(KNOWN)}, or a JSON file")
    try:
        described = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"not JSON ({error})", where=where, fix=f"write {_example()}") from None
    return _from_file(described, where)


def _from_file(described: Any, where: str) -> Machine:
    """Check names and types; the values check themselves."""
    fields = {field.name: field for field in dataclasses.fields(Machine)}
    if not isinstance(described, dict):
        raise ConfigError("not a JSON object", where=where, fix=f"write {_example()}")
    wrong = [f"{name} is unknown" for name in described if name not in fields]
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    wrong += [f"{name} is missing" for name in needed if name not in described]
    for name in fields.keys() & described.keys():
        kinds: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
        kind = str(fields[name].type)
        value = described[name]
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
            wrong.append(f"{name} is no {kind}")
    if wrong:
        raise ConfigError(", ".join(wrong), where=where, fix=f"write {_example()}")
    return Machine(**described)


def _example() -> str:
    return json.dumps(
        {"name": "X", "peak_bf16": 4e14, "peak_fp32": 5e13, "utilisation": 0.4, "memory": 48e9, "devices": 8}
    )


def measured() -> Machine:
    """This machine: its first GPU or its CPU, with the rate of a large matrix product as peak; takes a second."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        name, memory, devices = properties.name, properties.total_memory, torch.cuda.device_count()
    else:
        name, memory, devices = f"this CPU, {torch.get_num_threads()} threads", cpu_memory(), 1
    return Machine(
        name=name,
        peak_bf16=_product_rate(torch.bfloat16, device) if use_bf16("auto", device) else 0.0,
        peak_fp32=_product_rate(torch.float32, device),
        utilisation=0.4,
        memory=memory,
        usable=0.9 if gpu else 0.7,  # a C heap holds on to freed pieces: up to 1.4 x the tensors were seen
        devices=devices,
        fused_norm=gpu,
        source=f"measured now: a product of {MEASURED_SIZE} x {MEASURED_SIZE}; utilisation is an assumption",
    )


def peak_of(device: torch.device, *, bf16: bool) -> float | None:
    """FLOP/s of a device's dense matrix products, against which a step's utilisation is counted.

    Of a GPU by its name, None where the name is unknown or there are no such products. Of the CPU as measured once in
    this process, with its number of threads, in half a second: its own large product, not a figure of its maker.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), bf16=bf16)
    if device.type == "cpu":
        return _cpu_peak(torch.bfloat16 if bf16 else torch.float32, torch.get_num_threads())
    return None


def gpu_peak(name: str, *, bf16: bool) -> float | None:
    """FLOP/s of a GPU by the name that its driver gives it; the first entry of `GPUS` whose words it has counts."""
    words = name.replace("-", " ").split()
    for known, in_bf16, in_fp32 in GPUS:
        if set(known.split()) <= set(words):
            return (in_bf16 if bf16 else in_fp32) or None
    return None


@functools.cache
def _cpu_peak(dtype: torch.dtype, threads: int) -> float:
    return _product_rate(dtype, torch.device("cpu"))


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of several matrix products."""
    size = MEASURED_SIZE * (4 if device.type == "cuda" else 1)
    left = torch.randn(size, size, device=device).to(dtype)
    best, until = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < until or best == float("inf"):
        began = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def cpu_memory() -> int:
    """Bytes of memory of this machine, or of the group of processes it is limited to."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(given)) if given.isdecimal() else total
