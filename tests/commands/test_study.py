"""`toto study`: arms of equal compute as `toto plan` counts it, and a table that a second call prints again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_photo

from toto.__main__ import main
from toto.model.config import with_vocabulary
from toto.recipes import STUDIES
from toto.recipes.studies import arms
from toto.runtime.machine import machine
from toto.training.plan import Layout, Tokens, make_plan


def planned(arm, grid, codes):
    """FLOPs of an arm's own steps by the planner."""
    config = replace(arm.config, model=with_vocabulary(arm.config.model, codes + 4))
    tokens = Tokens(codes=codes, rows=grid[0], cols=grid[1])
    return make_plan(config, machine("h100"), Layout(devices=1), tokens).total_flops


@pytest.mark.parametrize("name", list(STUDIES))
def test_continuing_and_starting_afresh_cost_the_same(name):
    study, coarse, fine, codes = STUDIES[name](), (16, 16), (32, 32), 8192
    found = {arm.name: arm for arm in arms(study, vocabulary=codes + 4, coarse=coarse, fine=fine)}
    assert list(found) == ["coarse", "continued-rope-10000", "continued-rope-50000", "scratch"]
    before = planned(found["coarse"], coarse, codes)
    assert found["coarse"].flops == pytest.approx(before)
    for base in (10_000, 50_000):
        arm = found[f"continued-rope-{base}"]
        assert arm.config.model.rope_base == base
        assert arm.flops == pytest.approx(before + planned(arm, fine, codes))
    scratch = found["scratch"]
    assert scratch.flops == pytest.approx(planned(scratch, fine, codes))
    assert scratch.flops == pytest.approx(found["continued-rope-50000"].flops, rel=0.6 / scratch.config.steps)


def test_one_command_trains_reads_out_and_compares(tmp_path, tokenizer_folder, capsys):
    for number in range(16):
        make_photo(tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg", number=number)
    words = []
    for name, size in (("coarse", 16), ("fine", 32)):
        store = tmp_path / name
        common = ("--out", store, "--size", size, "--tokenizer", tokenizer_folder, "--workers", 0)
        assert main([str(word) for word in ("tokenize", tmp_path / "photos", *common)]) == 0
        words += [f"--{name}", f"image:{store}"]
    words += ["--data", tmp_path / "photos", "--tokenizer", tokenizer_folder, "--out", tmp_path / "study"]
    words += ["--coarse.steps", 2, "--coarse.batch", 2, "--coarse.micro-batch", 2, "--steps", 2, "--rope-bases", 500]
    words += ["--coarse.model.width", 32, "--coarse.model.layers", 1, "--coarse.model.heads", 2]
    words += ["--coarse.model.mlp-hidden", 48, "--read-out.epochs", 1, "--read-out.batch", 4]
    words += ["--read-out.micro-batch", 4, "--read-out.head.heads", 2, "--read-out.stored-views", 1]
    same = [str(word).replace(f"image:{tmp_path}/fine", f"image:{tmp_path}/coarse") for word in words]
    assert main(["study", "table4-small", *same]) == 2
    assert "no more than the 2 x 2 of --coarse; tokenize at a larger --size" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    assert main(["study", "table4-small", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["arms"]
    assert [(row["arm"], row["rope_base"]) for row in rows] == [
        ("coarse", 10_000), ("continued-rope-500", 500), ("scratch", 10_000),
    ]  # fmt: skip
    side = 16 // rows[0]["grid"][0]
    assert [row["grid"][0] * side for row in rows] == [16, 32, 32]
    assert all(row["evaluated"] == 4 for row in rows)
    assert main(["study", "table4-small", *map(str, words)]) == 0
    assert capsys.readouterr().out == printed
