"""Metrics go on after a kill in each of their places: lines, positions, and W&B (a stand-in of its package)."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from toto.runtime.errors import ConfigError
from toto.runtime.machine import gpu_peak, peak_of
from toto.runtime.metrics import Metrics, read_metrics, read_positions
from toto.runtime.wandb_sink import ID_FILE, WandbConfig, parse_project


class WandbError(Exception):
    pass


@pytest.fixture
def service(monkeypatch):
    """What W&B would know: the rows of each run by its id, and how `init` was called."""
    known = SimpleNamespace(rows={}, started=[], refuses=None, finished=0)

    class Run:
        def __init__(self, name):
            self.rows = known.rows.setdefault(name, [])

        def define_metric(self, name, step_metric=None):
            pass

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            known.finished += 1

    def init(**options):
        if known.refuses:
            raise WandbError(known.refuses)
        known.started.append(options)
        return Run(options["id"])

    package = ModuleType("wandb")
    package.init, package.errors = init, SimpleNamespace(Error=WandbError)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return known


def test_a_continued_run_goes_on_in_the_same_run_and_sends_no_row_twice(service, tmp_path):
    asked = WandbConfig(project="films", entity="team")
    metrics = Metrics(tmp_path, wandb=asked, config={"steps": 9})
    for step in range(1, 6):
        metrics.write(step, {"loss": float(step)})
    metrics.write(4, {"heldout": 1.0})
    del metrics  # killed
    metrics = Metrics(tmp_path, continue_from=3, wandb=asked)
    for step in range(4, 8):
        metrics.write(step, {"loss": float(step)})
        metrics.write(step, {"heldout": 1.0})
    metrics.close()
    ((name, rows),) = service.rows.items()
    assert json.loads((tmp_path / ID_FILE).read_text()) == {"id": name}
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows if "heldout" in row] == [4, 5, 6, 7]
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    first, second = service.started
    assert (first["project"], first["entity"], first["name"]) == ("films", "team", tmp_path.name)
    assert first["config"] == {"steps": 9}
    assert second["id"] == first["id"]
    assert second["resume"] == "allow"
    assert service.finished == 1


def test_a_run_that_is_sent_only_since_it_goes_on_sends_what_it_writes(service, tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    metrics = Metrics(tmp_path, continue_from=3, wandb=WandbConfig(project="films"))
    metrics.write(4, {"loss": 4.0})
    metrics.close()
    assert [row["step"] for rows in service.rows.values() for row in rows] == [4]


def test_refusals_and_a_missing_package_are_one_line(service, tmp_path, monkeypatch):
    service.refuses = "api_key not configured\n(no-tty)"
    with pytest.raises(
        ConfigError, match=r"refuses the run \(api_key not configured \(no-tty\)\); wandb login, or set"
    ):
        Metrics(tmp_path, wandb=WandbConfig(project="films"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the package wandb.*; pip install 'toto-video\[wandb\]'"):
        Metrics(tmp_path, wandb=WandbConfig(project="films"))


def test_projects_by_name():
    assert parse_project("films") == WandbConfig(project="films")
    assert parse_project("team/films") == WandbConfig(project="films", entity="team")
    for text in ("", "a/b/c", "/films", "team/"):
        with pytest.raises(ConfigError, match="no \\[ENTITY/\\]PROJECT"):
            parse_project(text)


def test_positions_go_on_as_rows_do(tmp_path):
    metrics = Metrics(tmp_path)
    assert read_positions(tmp_path) == []
    for step in (2, 4, 6):
        metrics.write_positions(step, {"video": [float(step), None]})
    del metrics  # killed
    metrics = Metrics(tmp_path, continue_from=4)
    assert [row["step"] for row in read_positions(tmp_path)] == [2, 4]
    metrics.write_positions(6, {"video": [60.0, None]})
    metrics.close()
    assert read_positions(tmp_path)[-1] == {"step": 6, "video": [60.0, None]}
    Metrics(tmp_path).close()
    assert read_positions(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Some other GPU", None, None),
    ],
)
def test_peaks_of_gpus_by_name(name, bf16, fp32):
    assert gpu_peak(name, bf16=True) == bf16
    assert gpu_peak(name, bf16=False) == fp32


def test_the_peak_of_this_cpu_is_measured_once():
    peak = peak_of(torch.device("cpu"), bf16=False)
    assert 1e9 < peak < 1e15
    assert peak_of(torch.device("cpu"), bf16=False) == peak
    assert peak_of(torch.device("meta"), bf16=False) is None
