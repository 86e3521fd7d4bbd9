"""`toto plan`: the paper's runs come out right, what doesn't fit says so, and bad words are one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from toto.__main__ import main
from toto.model.config import SCALING, BackboneConfig, ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import Card, checkpoints
from toto.recipes import PRETRAINING
from toto.runtime.errors import ConfigError
from toto.runtime.machine import A100, H100
from toto.training.checkpoint import Saver
from toto.training.optimizer import OptimizerConfig, make_optimizer
from toto.training.plan import BYTES_OF_CHECKPOINT, Layout, Tokens, make_plan

EIGHT = Layout(devices=8)
SMALL = replace(H100, name="small", memory=12e9)


@pytest.mark.parametrize(("name", "billions"), [("base", 0.126), ("large", 0.285), ("1b", 1.164)])
def test_the_papers_runs(name, billions):
    plan = make_plan(PRETRAINING[name](), H100, EIGHT)
    assert plan.parameters["total"] / 1e9 == pytest.approx(billions, rel=0.01)
    assert plan.tokens == 1_000_000 * 256 * 4096
    assert plan.shard_bytes == 2 * plan.tokens
    assert plan.fits
    rough = 6 * plan.parameters["total"] * plan.tokens  # the usual rule, without attention; here with the embedding
    assert rough < plan.total_flops < 1.5 * rough
    assert plan.hours == pytest.approx(plan.total_flops / (8 * 989e12 * 0.4) / 3600)


def test_time_falls_with_devices_and_rises_with_what_is_done_again():
    recipe = PRETRAINING["large"]()
    hours = {n: make_plan(recipe, H100, Layout(devices=n)).hours for n in (8, 16)}
    assert hours[16] == pytest.approx(hours[8] / 2)
    again = make_plan(recipe, H100, replace(EIGHT, checkpointing="full"))
    assert 1.25 < again.hours / hours[8] < 1.34
    assert make_plan(recipe, A100, EIGHT).hours > 2 * hours[8]


DECODERS = [name for name, recipe in PRETRAINING.items() if isinstance(recipe().model, ModelConfig)]


def test_other_architectures_are_refused():
    class Other(BackboneConfig):
        kind = "other"

    recipe = replace(PRETRAINING["nano"](), model=Other(width=8, layers=1))
    with pytest.raises(ConfigError, match="plans are for toto's decoder and the baselines, this is other"):
        make_plan(recipe, H100, Layout(devices=1))


@pytest.mark.parametrize("name", DECODERS)
def test_every_recipe_can_be_planned(name):
    plan = make_plan(PRETRAINING[name](), H100, Layout(devices=1))
    assert plan.memory.total > 0
    assert any("reconstructed" in note or "guess" in note for note in plan.notes) is (name in SCALING)


def test_gradients_stay_where_passes_add_up_or_ddp_has_buckets():
    recipe = replace(PRETRAINING["base"](), batch=16)
    for devices, micro_batch, stays in ((1, 16, False), (1, 8, True), (2, 8, True)):
        plan = make_plan(replace(recipe, micro_batch=micro_batch), H100, Layout(devices=devices))
        assert (plan.memory.gradients == 4 * plan.parameters["total"]) is stays


def test_short_sequences_first_are_counted():
    demo = PRETRAINING["demo"]()
    tokens = Tokens(codes=4096, rows=8, cols=8)
    whole = make_plan(replace(demo, data=replace(demo.data, short_steps=0)), H100, Layout(devices=1), tokens)
    short = make_plan(demo, H100, Layout(devices=1), tokens)
    assert short.tokens == whole.tokens
    assert 0.9 * whole.total_flops < short.total_flops < whole.total_flops


def test_what_is_suggested_fits():
    recipe = PRETRAINING["base"]()
    plan = make_plan(recipe, SMALL, EIGHT)
    assert not plan.fits
    assert plan.changes
    for words in plan.changes:
        option, value = words.split()
        changed = replace(recipe, micro_batch=int(value)) if option == "--micro-batch" else recipe
        layout = replace(EIGHT, checkpointing=value) if option == "--parallel.checkpointing" else EIGHT
        layout = replace(layout, strategy=value) if option == "--parallel.strategy" else layout
        assert make_plan(changed, SMALL, layout).fits


def test_several_changes_or_none_are_suggested_where_one_is_not_enough():
    recipe = PRETRAINING["1b"]()
    (several,) = make_plan(recipe, SMALL, EIGHT).changes
    assert several == "--parallel.strategy fsdp --parallel.checkpointing full"
    assert make_plan(recipe, SMALL, replace(EIGHT, strategy="fsdp", checkpointing="full")).fits
    (nothing,) = make_plan(recipe, replace(SMALL, memory=1e9), EIGHT).changes
    assert "a smaller model" in nothing


def test_a_checkpoint_is_as_large_as_planned(tmp_path):
    model = Transformer(replace(PRETRAINING["nano"]().model, vocab_size=2052))
    optimizer = make_optimizer(model, OptimizerConfig(), rules=model.weight_rules())
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    saver = Saver(tmp_path)
    saver.save(model, optimizer, Card(passport={}, sequence={}), step=1)
    saver.wait()
    (folder,) = checkpoints(tmp_path)
    found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found == pytest.approx(BYTES_OF_CHECKPOINT * sum(p.numel() for p in model.parameters()), rel=0.02)


def test_the_command_prints_a_plan(capsys):
    assert main(["plan", "base", "--machine", "a100", "--gpus", "16", "--micro-batch", "4"]) == 0
    printed = capsys.readouterr().out
    for words in ("125.85M", "ranks 16 x passes 4 x micro-batch 4", "1.05 T", "assumption", "3,072 is what gives"):
        assert words in printed
    assert "3.12e+14 FLOP/s in bf16" in printed
    assert "price" not in printed
    assert main(["plan", "base", "--dollars-per-hour", "2"]) == 0
    assert "dollars at 2 a device hour" in capsys.readouterr().out


def test_devices_are_those_the_batch_can_be_divided_among(capsys):
    assert main(["plan", "nano"]) == 0
    assert "nano on 1 x H100" in capsys.readouterr().out
    assert main(["plan", "nano", "--micro-batch", "1", "--batch", "6"]) == 0
    assert "nano on 6 x H100" in capsys.readouterr().out


def test_json_says_the_same(capsys):
    words = ["plan", "1b", "--gpus", "64", "--parallel.strategy", "hsdp", "--dollars-per-hour", "2.5"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    plan = make_plan(PRETRAINING["1b"](), H100, Layout(devices=64, strategy="hsdp"))
    assert record["hours"] == plan.hours
    assert record["memory_total"] == plan.memory.total
    assert record["dollars"] == pytest.approx(plan.hours * 64 * 2.5)
    assert record["layout"] == {"devices": 64, "strategy": "hsdp", "checkpointing": "none"}
    assert record["fits"] is True


def test_what_does_not_fit_ends_with_1(tmp_path, capsys):
    (tmp_path / "small.json").write_text(
        json.dumps({"name": "S", "peak_bf16": 1e14, "peak_fp32": 1e13, "utilisation": 0.4, "memory": 12e9})
    )
    assert main(["plan", "base", "--machine", str(tmp_path / "small.json")]) == 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "  --micro-batch 2\n" in printed
    assert main(["plan", "base", "--machine", str(tmp_path / "small.json"), "--micro-batch", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["huge"], "unknown recipe 'huge'"),
        (["base", "--machine", "h1000"], "no such machine or file"),
        (["base", "--gpus", "0"], "--gpus: must be at least 1"),
        (["base", "--gpus", "64"], "no multiple of 64 ranks x 8; use --micro-batch 4"),
        (["base", "--gpus", "7"], "use fewer ranks or another batch"),
        (["1b", "--gpus", "12", "--parallel.strategy", "hsdp"], "not whole machines of 8"),
        (["base", "--parallel.strategy", "zero"], "--parallel.strategy"),
        (["base", "--grid", "0", "16"], "rows: must be at least 1"),
        (["base", "--dollars-per-hour", "-1"], "--dollars-per-hour: must be positive"),
        (["base", "--model.heads", "5"], "heads"),
        (["nano", "--precision", "bf16", "--machine", "FP32"], "no fast bf16"),
    ],
)
def test_bad_words_are_one_line(tmp_path, capsys, words, said):
    path = tmp_path / "fp32.json"
    path.write_text(json.dumps({"name": "F", "peak_bf16": 0, "peak_fp32": 1e13, "utilisation": 0.4, "memory": 12e9}))
    assert main(["plan", *(str(path) if word == "FP32" else word for word in words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_an_impossible_layout_is_refused():
    with pytest.raises(ConfigError, match="no multiple"):
        make_plan(PRETRAINING["base"](), H100, Layout(devices=3))
