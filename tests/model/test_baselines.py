"""GPT-2 and Mamba behind the contract of all backbones: the same training, checkpoints, read-outs and generation."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from toto.evaluation.features import open_backbone
from toto.evaluation.likelihood import heldout_evaluation, model_bits, spread_windows
from toto.generation.rollout import continue_codes
from toto.generation.sampler import SamplerConfig
from toto.model.architectures import build, config_of, described
from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.budget import parameter_table
from toto.model.causal import CausalModel
from toto.model.config import ModelConfig, with_vocabulary
from toto.model.weights import Card, load_model, save_llama, save_model
from toto.recipes import PRETRAINING
from toto.runtime.errors import CheckpointError, ConfigError
from toto.runtime.machine import H100
from toto.runtime.metrics import read_metrics
from toto.training import parallel
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.optimizer import OptimizerConfig, make_optimizer
from toto.training.plan import Layout, make_plan
from toto.training.source import SourceConfig

pytest.importorskip("transformers")
TOTO = ModelConfig(width=32, layers=2, heads=2, mlp_hidden=64)
GPT = GPT2Config(width=32, layers=2, heads=2, mlp_hidden=96)
MAMBA = MambaConfig(width=32, layers=2, state_size=4)
ALL = pytest.mark.parametrize("config", [TOTO, GPT, MAMBA], ids=lambda config: config.kind)
NEW = pytest.mark.parametrize("config", [GPT, MAMBA], ids=lambda config: config.kind)
CARD = Card(passport={"kind": "none"}, sequence={"frames": 2, "rows": 3, "cols": 3, "stride": 1})


def made(config, *, seed: int = 0, vocab_size: int = 36) -> CausalModel:
    torch.manual_seed(seed)
    return build(replace(config, vocab_size=vocab_size)).eval()


@ALL
@pytest.mark.parametrize("pieces", [(21,), (1,) * 21, (7, 1, 1, 12), (1, 20)])
def test_a_cache_changes_nothing(config, pieces):
    model = made(config)
    tokens = torch.randint(0, 36, (2, 21))
    with torch.inference_mode():
        whole = model(tokens, layers=range(3))
        cache, seen = model.new_cache(2, 21), []
        for part in tokens.split(list(pieces), dim=1):
            seen.append(model(part, layers=range(3), cache=cache))
            cache = seen[-1].cache
    assert cache.length == 21
    torch.testing.assert_close(torch.cat([each.logits for each in seen], dim=1), whole.logits, atol=1e-5, rtol=1e-5)
    for layer, state in whole.hidden_states.items():
        parts = torch.cat([each.hidden_states[layer] for each in seen], dim=1)
        torch.testing.assert_close(parts, state, atol=1e-5, rtol=1e-5)


@ALL
def test_no_position_sees_what_follows_and_layers_are_what_lies_between_blocks(config):
    model = made(config)
    tokens = torch.randint(0, 36, (1, 30))
    other = tokens.clone()
    other[:, 17:] = (other[:, 17:] + 5) % 36
    with torch.inference_mode():
        one, two = model(tokens, layers=range(3)), model(other, layers=range(3))
        last = model.head(model.norm(one.hidden_states[2]))
    assert one.hidden_states.keys() == {0, 1, 2}
    for layer in range(3):
        torch.testing.assert_close(one.hidden_states[layer][:, :17], two.hidden_states[layer][:, :17])
        assert not one.hidden_states[layer][:, 17:].allclose(two.hidden_states[layer][:, 17:])
    torch.testing.assert_close(last, one.logits)
    with pytest.raises(ConfigError, match="the model has 0 to 2"):
        model(tokens, layers=[3])


@ALL
def test_generation_is_the_same_with_and_without_a_cache(config):
    model = made(config)
    prompt = torch.randint(0, 32, (2, 3, 3, 3))
    sampler = SamplerConfig(temperature=1.0, seed=3)
    with_cache, without = (
        continue_codes(model, prompt, new_frames=4, context_frames=5, sampler=sampler, use_cache=use)
        for use in (True, False)
    )
    assert with_cache.equal(without)


@NEW
def test_a_cache_of_another_architecture_is_refused(config):
    model = made(config)
    foreign = made(MAMBA if config is GPT else TOTO).new_cache(1, 8)
    with pytest.raises(ConfigError, match="cache: is of another architecture"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=foreign)
    with pytest.raises(ConfigError, match="inputs are tokens"):
        model(torch.zeros(1, 4, dtype=torch.int64), patches=torch.zeros(1, 3, 12))


@NEW
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_comes_back_as_it_was(config, tied, tmp_path):
    model = made(replace(config, tie_embeddings=tied))
    save_model(tmp_path, model, CARD)
    stored = json.loads((tmp_path / "config.json").read_text())["architecture"]
    assert stored["kind"] == config.kind
    again = load_model(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    assert (again.head.weight is again.embedding.weight) == tied
    tokens = torch.randint(0, 36, (1, 12))
    assert again(tokens).logits.equal(model(tokens).logits)
    with pytest.raises(ConfigError, match=f"a {config.kind} model is no Llama"):
        save_llama(tmp_path, model, CARD)
    plain = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain | {"architecture": stored | {"kind": "rwkv"}}))
    with pytest.raises(CheckpointError, match="unknown architecture 'rwkv'"):
        load_model(tmp_path)


@ALL
def test_an_architecture_is_told_and_read_again(config):
    assert config_of(json.loads(json.dumps(described(config)))) == config


@NEW
def test_every_weight_is_drawn_and_again_the_same(config):
    model = made(config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data.fill_(math.nan)
    torch.manual_seed(0)
    model.reset_parameters(torch.Generator().manual_seed(5))
    first = {name: weight.clone() for name, weight in model.named_parameters()}
    assert all(weight.isfinite().all() for weight in first.values())
    model.reset_parameters(torch.Generator().manual_seed(5))
    assert all(weight.equal(first[name]) for name, weight in model.named_parameters())
    assert before.keys() == first.keys()


def test_mamba_begins_with_the_published_steps_and_decays():
    model = made(MambaConfig(width=64, layers=3))
    for block in model.blocks:
        steps = torch.nn.functional.softplus(block.mixer.dt_proj.bias)
        assert 1e-3 * 0.999 <= steps.min() < 3e-3
        assert 3e-2 < steps.max() <= 0.1001
        torch.testing.assert_close(block.mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
        assert block.mixer.out_proj.weight.abs().max() <= (128 * 3) ** -0.5
        assert block.mixer.D.eq(1).all()


def test_neither_the_states_decay_nor_the_skip_is_decayed():
    model = made(MAMBA)
    groups = make_optimizer(model, OptimizerConfig(), rules=model.weight_rules()).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    free = {names[id(weight)] for group in groups if not group["weight_decay"] for weight in group["params"]}
    assert {"blocks.0.mixer.A_log", "blocks.0.mixer.D", "blocks.0.mixer.dt_proj.bias", "norm.weight"} <= free
    assert "blocks.0.mixer.in_proj.weight" not in free


@NEW
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_from_the_structure(config, tied):
    config = replace(config, tie_embeddings=tied, vocab_size=101, width=48)
    with torch.device("meta"):
        counted = sum(weight.numel() for weight in build(config).parameters())
    assert parameter_table(config)["total"] == counted


@pytest.mark.parametrize(("prefix", "ids"), [("table6", 8196), ("table6-nano", 4100), ("table6-images", 4100)])
def test_the_models_of_table_6_have_the_same_parameters_within_two_percent(prefix, ids):
    recipes = [PRETRAINING[f"{prefix}-{name}"]() for name in ("toto", "gpt2", "mamba")]
    totals = [parameter_table(with_vocabulary(recipe.model, ids))["total"] for recipe in recipes]
    assert max(totals) / min(totals) < 1.02
    assert [recipe.model.kind for recipe in recipes] == ["toto", "gpt2", "mamba"]
    if prefix == "table6-images":  # a rate for each
        recipes = [replace(recipe, optimizer=replace(recipe.optimizer, peak_lr=1e-3)) for recipe in recipes]
    assert len({replace(recipe, model=TOTO) for recipe in recipes}) == 1


@pytest.fixture
def run(video_store):
    source = SourceConfig(path=video_store, weight=1)
    return TrainConfig(
        data=DataConfig(sources=(source,), heldout=(source,), frames=4),
        model=TOTO,
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=5),
        steps=30,
        batch=2,
        micro_batch=1,
        precision="fp32",
        device="cpu",
        log_every=1,
        eval_every=30,
        eval_sequences=4,
        save_every=10,
    )


def losses(out) -> list[float]:
    return [row["train/loss"] for row in read_metrics(out) if "train/loss" in row]


@NEW
def test_it_learns_is_measured_and_goes_on_bit_for_bit(config, run, tmp_path, monkeypatch):
    config = replace(run, model=config)
    train(config, tmp_path / "whole", evaluate=heldout_evaluation(config))
    found = losses(tmp_path / "whole")
    assert found[-1] < found[0] - 0.7
    windows = spread_windows(config.data.heldout[0], frames=4, most=4)
    bits = float(model_bits(load_model(tmp_path / "whole"), windows, precision="fp32").mean())
    (logged,) = [row["heldout/video_bits"] for row in read_metrics(tmp_path / "whole") if "heldout/video_bits" in row]
    assert bits == pytest.approx(logged, abs=1e-5)
    assert bits < math.log2(32)
    stops, loss_of = [], parallel.next_token_loss

    def stopped(*inputs):
        stops.append(None)
        if len(stops) == 27:
            raise KeyboardInterrupt
        return loss_of(*inputs)

    monkeypatch.setattr(parallel, "next_token_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", evaluate=heldout_evaluation(config))
    train(config, tmp_path / "cut", evaluate=heldout_evaluation(config), resume=True)
    assert losses(tmp_path / "cut") == found
    ours, theirs = (load_model(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_another_architecture_neither_continues_a_run_nor_starts_from_it(run, tmp_path):
    run = replace(run, steps=2)
    train(run, tmp_path / "toto")
    with pytest.raises(ConfigError, match="holds a run of a toto model, the recipe's is gpt2; use a recipe"):
        train(replace(run, model=GPT), tmp_path / "toto", resume=True)
    with pytest.raises(ConfigError, match=r"another architecture \(kind was toto, is mamba\)"):
        train(replace(run, model=MAMBA, init=str(tmp_path / "toto")), tmp_path / "mamba")
    train(replace(run, model=GPT), tmp_path / "gpt2")
    wider = replace(run, model=replace(GPT, mlp_hidden=80))
    with pytest.raises(ConfigError, match=r"model\.mlp_hidden was 96, is 80"):
        train(wider, tmp_path / "gpt2", resume=True)


@NEW
def test_it_has_features_at_every_layer(config, tokenizer, tmp_path):
    passport = tokenizer.at(32, 32)
    rows, cols = passport.grid
    card = Card(passport=passport.to_dict(), sequence={"frames": 2, "rows": rows, "cols": cols, "stride": 1})
    save_model(tmp_path, made(config, vocab_size=68), card)
    backbone = open_backbone(tmp_path, tokenizer, device="cpu", precision="fp32")
    features = backbone.features(torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8))
    assert [features[layer].shape for layer in backbone.layers] == [(3, 2 * rows * cols, 32)] * 3


@NEW
def test_bf16_stays_near_fp32(config):
    model = made(config)
    tokens = torch.randint(0, 36, (2, 100))
    with torch.inference_mode():
        exact = model(tokens).logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(tokens).logits
            cache = model.new_cache(2, 100)
            cached = model(tokens, cache=cache).logits
    assert (rough - exact).abs().max() < 0.05 * exact.std() + 0.02
    assert (cached - exact).abs().max() < 0.05 * exact.std() + 0.02


@NEW
def test_without_the_extra_it_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, f"transformers.models.{config.kind}.modeling_{config.kind}", None)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"isn't installed; pip install 'toto-video\[baselines\]'"):
        made(config)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: replace(GPT, heads=5),
        lambda: replace(GPT, layers=0),
        lambda: replace(MAMBA, state_size=0),
        lambda: replace(MAMBA, expand=0),
    ],
)
def test_impossible_architectures_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


@pytest.mark.parametrize("config", [GPT, MAMBA, replace(MAMBA, scan="transformers")])
def test_a_plan_says_what_is_not_known(run, config):
    plan = make_plan(replace(run, model=replace(config, vocab_size=None)), H100, Layout(devices=1))
    known = config == GPT or config.scan == "chunked"
    assert plan.whole_memory is known
    if not known:
        assert plan.memory.total == 16 * plan.parameters["total"]
    assert any("what transformers' scan keeps isn't known" in note for note in plan.notes) is not known
    assert any(f"memory of {config.kind}'s blocks on a GPU: worked out" in note for note in plan.notes) is known
    assert plan.hours > 0


def test_a_plan_suggests_nothing_that_training_refuses(run):
    for config, offered in ((GPT, True), (MAMBA, False)):
        wide = replace(run, model=replace(config, width=256, vocab_size=None), batch=4, micro_batch=2)
        most = make_plan(wide, H100, Layout(devices=1)).memory.total
        small = replace(H100, memory=(most - 1) / H100.usable)
        changes = make_plan(wide, small, Layout(devices=1)).changes
        assert changes
        assert any("checkpointing" in words for words in changes) is offered
    again = Layout(devices=1, checkpointing="full")
    with pytest.raises(ConfigError, match="blocks of a mamba model with its own scan can't be wrapped"):
        make_plan(replace(run, model=MAMBA), H100, again)
    assert make_plan(replace(run, model=replace(MAMBA, scan="transformers")), H100, again).recomputed
