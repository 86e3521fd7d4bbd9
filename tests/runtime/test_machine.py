"""Machines by name and from files; a bad description is one line that says everything wrong with it."""

from __future__ import annotations

import json

import pytest

from toto.runtime.errors import ConfigError
from toto.runtime.machine import A100, H100, machine

GOOD = {"name": "X", "peak_bf16": 4e14, "peak_fp32": 5e13, "utilisation": 0.4, "memory": 48e9}


def test_known_machines():
    assert machine("h100") == H100
    assert machine("a100") == A100
    assert H100.peak(bf16=True) > 3 * A100.peak(bf16=True)
    assert H100.peak(bf16=False) < H100.peak(bf16=True) / 10


def test_this_machine_is_measured():
    here = machine("this")
    assert 1e9 < here.peak_fp32 < 1e16
    assert 1e8 < here.memory < 1e14
    assert "measured" in here.source


def test_a_file_describes_a_machine(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(GOOD | {"devices": 4}))
    found = machine(str(path))
    assert (found.name, found.devices, found.peak(bf16=True)) == ("X", 4, 4e14)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"name": "X", "speed": 3}), "speed is unknown, peak_bf16 is missing"),
        (json.dumps(GOOD | {"memory": "48 GB"}), "memory is no float"),
        (json.dumps(GOOD | {"devices": True}), "devices is no int"),
        (json.dumps(GOOD | {"utilisation": 40}), "must be at most 1, is 40"),
        (json.dumps(GOOD | {"memory": -1}), "must be positive, is -1"),
        (json.dumps(GOOD | {"memory": float("nan")}), "must be positive, is nan"),
        (json.dumps(GOOD | {"memory": float("inf")}), "must be finite, is inf"),
    ],
)
def test_bad_descriptions_are_one_line(tmp_path, content, said):
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said) as error:
        machine(str(path))
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="use h100, a100, this, or a JSON file"):
        machine("h200")
