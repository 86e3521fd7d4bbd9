"""Folders of a LlamaForCausalLM as checkpoints: bit-equal both ways, and what is no plain Llama is refused by name."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import toto
from toto.model.config import ModelConfig
from toto.model.llama import END, IMAGE_START, PAD, VIDEO_START
from toto.model.tensors import tensors_sha256
from toto.model.transformer import Transformer
from toto.model.weights import (
    Card,
    load_card,
    load_config,
    load_llama,
    load_model,
    save_llama,
    save_model,
    weights_sha256,
)
from toto.runtime.errors import CheckpointError, ConfigError, TotoError
from toto.runtime.files import sha256_of
from toto.tokens import sequence

CONFIG = ModelConfig(vocab_size=60, width=32, layers=2, heads=2, mlp_hidden=48, rope_base=500.0, init_std=0.03)
CARD = Card(
    passport={"kind": "x", "vocab_size": 56},
    sequence={"frames": 4, "rows": 3, "cols": 3, "stride": 4},
    training={"step": 3, "data": ["a" * 64]},
)
ONE_FILE, MANY_FILES = 5_000_000_000, 10_000


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.fixture
def folder(model, tmp_path):
    save_llama(tmp_path, model, CARD)
    return tmp_path


def changed(folder, **values):
    """Change the configuration; None drops a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def refusal(folder, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize("most_bytes", [ONE_FILE, MANY_FILES])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bit_equal(tmp_path, tied, most_bytes):
    model = Transformer(replace(CONFIG, tie_embeddings=tied)).eval()
    first, there, back = (tmp_path / name for name in ("first", "there", "back"))
    for path in (first, there, back):
        path.mkdir()
    save_model(first, model, CARD)
    save_llama(there, load_model(first), load_card(first), most_bytes=most_bytes)
    save_model(back, load_model(there), load_card(there))
    assert (back / "config.json").read_text() == (first / "config.json").read_text()
    assert weights_sha256(back) == weights_sha256(first)
    tokens = torch.randint(0, 60, (1, 9))
    assert toto.load_model(there)(tokens).logits.equal(model(tokens).logits)


def test_files_hold_no_more_than_asked_and_every_tensor_once(model, tmp_path):
    save_llama(tmp_path, model, CARD, most_bytes=MANY_FILES)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert sorted(held) == sorted(set(index["weight_map"].values()))
    assert len(held) > 1
    assert sorted(name for tensors in held.values() for name in tensors) == sorted(index["weight_map"])
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held.values()]
    assert all(size <= MANY_FILES or len(held[file]) == 1 for file, size in zip(held, sizes, strict=True))
    assert sum(sizes) == index["metadata"]["total_size"] == 4 * sum(weight.numel() for weight in model.parameters())


def test_the_checksum_of_several_files_changes_with_each(model, tmp_path):
    save_llama(tmp_path, model, CARD, most_bytes=MANY_FILES)
    before = weights_sha256(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path)
    assert weights_sha256(tmp_path) != before
    (tmp_path / "whole").mkdir()
    save_llama(tmp_path / "whole", model, CARD)
    assert tensors_sha256(tmp_path / "whole") == sha256_of(tmp_path / "whole" / "model.safetensors")


def test_others_may_read_what_the_umask_lets_them(folder):
    modes = [stat.S_IMODE((folder / name).stat().st_mode) for name in ("model.safetensors", "config.json")]
    assert modes[0] == modes[1]


def test_special_ids_are_those_of_the_sequences(folder):
    ours = (PAD, VIDEO_START, END, IMAGE_START)
    assert ours == (sequence.PAD, sequence.VIDEO_START, sequence.END, sequence.IMAGE_START)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    ids = json.loads((folder / "toto.json").read_text())["ids"]
    assert (ids["image_start"], ids["first_code"]) == (3, sequence.CODE_OFFSET)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 38


@pytest.mark.parametrize("targets", ["codes", "pixels"])
def test_models_of_patches_are_no_llamas(tmp_path, targets):
    config = replace(CONFIG, inputs="patches", targets=targets, patch_values=12)
    with pytest.raises(ConfigError, match=r"takes patches and predicts .* is no Llama; export it with --to toto"):
        save_llama(tmp_path, Transformer(config), CARD)
    assert not list(tmp_path.iterdir())


def test_a_card_without_the_form_of_sequences_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="doesn't tell cols, rows"):
        save_llama(tmp_path, model, replace(CARD, sequence={"frames": 4}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mistral"}, "a model of type 'mistral', not 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"num_key_value_heads": 1}, "1 heads of keys for 2 of queries"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "scaled \\(llama3\\)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled \\(linear\\)"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turns 0.5 of each head"),
        ({"rope_theta": 10_000.0}, "rope_theta is 500.0 and 10000.0"),
        ({"rope_theta": "many"}, "rope_theta is 500.0 and 'many'"),
        ({"rope_parameters": [1]}, "rope_parameters is \\[1\\]"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"num_hidden_layers": 0}, "impossible architecture"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "impossible architecture|head_dim is 16"),
        ({"vocab_size": 61}, "model.embed_tokens.weight is \\(60, 32\\), not \\(61, 32\\)"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"tie_word_embeddings": True}, "lm_head.weight is surplus"),
    ],
    ids=str,
)
def test_what_is_no_plain_llama_is_refused_by_name(folder, values, said):
    changed(folder, **values)
    line = refusal(folder)
    assert re.search(said, line), line


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": None, "torch_dtype": None},
        {"rope_parameters": None, "dtype": None},
        {"rope_parameters": None, "rope_scaling": {"type": "default"}},
        {"head_dim": None, "num_key_value_heads": None, "attention_bias": None, "mlp_bias": None, "hidden_act": None},
    ],
    ids=str,
)
def test_the_configurations_of_transformers_4_and_5_are_read(folder, model, values):
    changed(folder, **values)
    assert load_model(folder).config == load_config(folder) == model.config


def test_stored_buffers_and_a_stored_tied_output_are_no_misfits(tmp_path):
    model = Transformer(replace(CONFIG, tie_embeddings=True)).eval()
    save_llama(tmp_path, model, CARD)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert load_model(tmp_path).embedding.weight.equal(model.embedding.weight)


def test_weights_that_are_missing_misshaped_or_no_numbers_are_listed(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
    weights["model.norm.weight"][3] = float("inf")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, path)
    line = refusal(folder)
    for part in ("k_proj.weight is missing", "up_proj.weight is (47, 32), not (48, 32)", "norm.weight holds NaN"):
        assert part in line
    assert "lm_head.weight holds torch.int8" in line
    save_file({"x": torch.zeros(1)}, path)
    assert "and 10 more" in refusal(folder)


def test_folders_that_are_not_whole_are_refused(model, tmp_path):
    save_llama(tmp_path, model, CARD, most_bytes=MANY_FILES)
    index, path = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "can't be read" in refusal(tmp_path)
    path.unlink()
    assert path.name in refusal(tmp_path)
    save_file({"other": torch.zeros(1)}, path)
    assert "should lie here" in refusal(tmp_path)
    for places in (
        {},
        {"x": "../model.safetensors"},
        {"x": "/etc/model.safetensors"},
        {"x": 3},
        {"x": "model.bin"},
        [],
    ):
        index.write_text(json.dumps({"weight_map": places}))
        assert "names no weight files" in refusal(tmp_path)
    index.unlink()
    assert "model.safetensors" in refusal(tmp_path)


def test_a_llama_without_a_card_is_nobodys_until_it_is_named(folder, model):
    (folder / "toto.json").write_text(json.dumps({"format": "toto-card", "version": 1, "passport": {}}))
    assert "sequence, training missing" in refusal(folder)
    (folder / "toto.json").write_text("{}")
    assert "not a toto-card of version 1" in refusal(folder)
    (folder / "toto.json").write_text("{")
    assert "damaged card" in refusal(folder, TotoError)
    (folder / "toto.json").unlink()
    assert "which tokenizer its tokens are of; name it by `toto export" in refusal(folder)
    with pytest.raises(CheckpointError, match=r"without toto\.json"):
        load_card(folder)
    assert load_llama(folder).embedding.weight.equal(model.embedding.weight)
