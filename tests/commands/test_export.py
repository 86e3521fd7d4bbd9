"""`toto export`: there and back, onto the hub, what the model card tells, and refusals in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import toto
from toto.__main__ import main
from toto.evaluation.result import Metric, Result
from toto.model import hub
from toto.model.architectures import build
from toto.model.baselines.config import GPT2Config
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import Card, checkpoint_folder, load_card, save_llama, save_model, weights_sha256
from toto.report import model_card
from toto.runtime.files import sha256_of
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.source import SourceConfig

CONFIG = ModelConfig(vocab_size=68, width=32, layers=1, heads=2, mlp_hidden=48)
CARD = Card(passport={"kind": "x"}, sequence={"frames": 4, "rows": 3, "cols": 3, "stride": 4})
NAMED = ("--frame-size", 32, "--frames", 4, "--stride", 2)


def run(*words):
    return main([str(word) for word in words])


def refused(capsys, *words):
    """The one line that a bad call prints."""
    capsys.readouterr()
    assert run(*words) in (1, 2)
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("toto: ")
    assert "\n" not in printed
    return printed


def same(a, b):
    """Whether two models are equal to the bit."""
    pairs = zip(toto.load_model(a).parameters(), toto.load_model(b).parameters(), strict=True)
    return all(ours.equal(theirs) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def trained(video_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    config = TrainConfig(
        data=DataConfig(sources=(SourceConfig(path=video_store, weight=1),), frames=4),
        model=replace(CONFIG, vocab_size=None),
        steps=2,
        batch=2,
        micro_batch=2,
        precision="fp32",
        device="cpu",
    )
    train(config, out)
    return out


@pytest.fixture
def result(trained):
    return Result(
        task="bits",
        protocol={},
        metrics={"model_bits": Metric(value=4.25, low=4.0, high=4.5)},
        offered=9,
        evaluated=8,
        failed=1,
        model_sha256=weights_sha256(trained),
        passport=load_card(trained).passport,
    )


@pytest.fixture
def stranger(tmp_path):
    """A Llama that names no tokenizer."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    save_llama(folder, Transformer(CONFIG), CARD)
    (folder / "toto.json").unlink()
    return folder


def test_there_and_back_by_the_command(trained, tmp_path, capsys):
    assert run("export", trained, "--out", tmp_path / "hf", "--file-gb", 1e-5) == 0
    said = capsys.readouterr().out
    assert re.search(r"hf: a LlamaForCausalLM, 0\.01 M parameters in fp32, 0\.\d MB; toto\.load_model takes it", said)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert run("export", tmp_path / "hf", "--to", "toto", "--out", tmp_path / "back") == 0
    assert same(trained, tmp_path / "hf")
    assert weights_sha256(tmp_path / "back") == weights_sha256(trained)
    original = (checkpoint_folder(trained) / "config.json").read_text()
    assert (tmp_path / "back" / "config.json").read_text() == original
    assert not list(tmp_path.glob(".*"))


def test_bf16_is_half_as_large(trained, tmp_path):
    for dtype in ("fp32", "bf16"):
        assert run("export", trained, "--dtype", dtype, "--out", tmp_path / dtype) == 0
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("bf16", "fp32")]
    assert 0.45 < sizes[0] / sizes[1] < 0.6


def test_exporting_needs_no_transformers(trained, tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None; from toto.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "export", str(trained), "--out", str(tmp_path / "hf")]
    assert subprocess.run(words, check=False, timeout=120).returncode == 0
    assert same(trained, tmp_path / "hf")


def test_the_card_tells_tokens_data_recipe_and_results(trained, video_store, result, tmp_path):
    result.save(tmp_path / "bits.json")
    words = ("--results", tmp_path / "bits.json", "--licence", "apache-2.0", "--out", tmp_path / "hf")
    assert run("export", trained, *words) == 0
    text = (tmp_path / "hf" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\n")
    for part in (
        "a" * 64,
        sha256_of(video_store / "manifest.json"),
        sha256_of(video_store / "ledger.parquet"),
        "6 ok",
        "| bits | model_bits | 4.25 [4, 4.5] | 8 of 9 |",
        f"`{weights_sha256(trained)}`",
        f"(toto {toto.__version__}",
        "| sequence: stride | 4 |",
    ):
        assert part in text, part
    recipe = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["config"]["steps"] == 2
    assert recipe["config"]["data"]["sources"][0]["path"] == video_store.name
    assert str(video_store.parent) not in text
    assert str(trained.parent) not in text


def test_the_code_in_the_card_runs(trained, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    assert run("export", trained, "--out", tmp_path / "hf") == 0
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["sequence"].shape == (1, 10)
    assert int(names["sequence"][0, 1:].min()) >= 4


def test_a_ledger_that_changed_or_went_is_not_told(trained, tmp_path):
    run_folder, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(trained, run_folder)
    card = load_card(trained)
    record = json.loads((run_folder / "made.json").read_text())
    record["config"]["data"]["sources"][0]["path"] = str(store)
    (run_folder / "made.json").write_text(json.dumps(record))
    checkpoint = checkpoint_folder(run_folder)
    (gone,) = model_card.data_of(checkpoint, card)
    assert (gone.name, gone.manifest, gone.ledger) == ("store", card.training["data"][0], None)
    store.mkdir()
    (store / "manifest.json").write_text('{"tables": {"ledger.parquet": "of another"}}')
    assert model_card.data_of(checkpoint, card) == (gone,)
    shutil.copytree(checkpoint, tmp_path / "alone")
    assert model_card.data_of(tmp_path / "alone", card) == (replace(gone, name=None),)
    assert model_card.recipe_of(tmp_path / "alone") is None


def test_results_of_other_weights_are_refused(trained, result, tmp_path, capsys):
    replace(result, model_sha256="b" * 64).save(tmp_path / "bits.json")
    line = refused(capsys, "export", trained, "--results", tmp_path / "bits.json", "--out", tmp_path / "hf")
    assert f"bits.json: is of other weights ({'b' * 12}, not" in line
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("targets", ["codes", "pixels"])
def test_models_of_patches_go_out_in_totos_form_alone(tmp_path, capsys, targets):
    source = tmp_path / "patches"
    source.mkdir()
    save_model(source, Transformer(replace(CONFIG, inputs="patches", targets=targets, patch_values=12)), CARD)
    line = refused(capsys, "export", source, "--out", tmp_path / "out")
    assert f"a model that takes patches and predicts {targets} is no Llama; export it with --to toto" in line
    assert {path.name for path in tmp_path.iterdir()} == {"patches"}
    assert run("export", source, "--to", "toto", "--out", tmp_path / "out") == 0
    assert same(source, tmp_path / "out")
    assert "LlamaForCausalLM" not in (tmp_path / "out" / "README.md").read_text()


def test_baselines_go_out_in_totos_form_alone(tmp_path, capsys):
    pytest.importorskip("transformers")
    source = tmp_path / "gpt2"
    source.mkdir()
    save_model(source, build(GPT2Config(vocab_size=68, width=32, layers=1, heads=2, mlp_hidden=64)), CARD)
    line = refused(capsys, "export", source, "--out", tmp_path / "out")
    assert "a gpt2 model is no Llama; export it with --to toto" in line
    assert run("export", source, "--to", "toto", "--out", tmp_path / "out") == 0
    assert same(source, tmp_path / "out")
    assert "| kind | gpt2 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_stranger_is_taken_with_its_tokenizer_named(stranger, tokenizer, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "taken"
    words = ("export", stranger, "--to", "toto", "--out", out)
    assert "name it by `toto export" in refused(capsys, *words)
    assert "add --frames, --stride" in refused(capsys, *words, "--tokenizer", tokenizer_folder, "--frame-size", 32)
    assert "has 68 ids, sequences of this tokenizer have" in refused(capsys, *words, "--tokenizer", "embedded", *NAMED)
    assert "don't fit a grid" in refused(
        capsys, *words, "--tokenizer", tokenizer_folder, "--frame-size", 31, *NAMED[2:]
    )
    assert run(*words, "--tokenizer", tokenizer_folder, *NAMED) == 0
    card = load_card(out)
    assert card.passport == tokenizer.at(32, 32).to_dict()
    assert card.sequence == {"frames": 4, "rows": 4, "cols": 4, "stride": 2}
    assert run("export", out, "--out", tmp_path / "hf") == 0
    line = refused(
        capsys,
        "export",
        tmp_path / "hf",
        "--to",
        "toto",
        "--out",
        tmp_path / "x",
        "--tokenizer",
        tokenizer_folder,
        *NAMED,
    )
    assert "the folder names its own" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --out FOLDER or --push user/name"),
        (("--out", "x", "--private"), "--private: says nothing without --push"),
        (("--push", "no-name"), "is no name on the hub"),
        (("--out", "x", "--file-gb", 0), "--file-gb: must be positive"),
        (("--out", "x", "--to", "toto", "--dtype", "bf16"), "a checkpoint of toto's own is in fp32"),
        (("--out", "x", "--to", "onnx"), "toto export"),
        (("--out", "x", "--tokenizer", "embedded", "--frame-size", 0, "--frames", 1, "--stride", 1), "at least 1"),
        (("--out", "x", "--results", "nowhere.json"), "nowhere.json"),
    ],
    ids=str,
)
def test_options_that_say_nothing_are_refused(trained, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, "export", trained, *words)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_written_over(trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        assert "is there already; choose another --out" in refused(capsys, "export", trained, "--out", tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert run("export", trained, "--out", tmp_path / "empty") == 0


def test_a_failure_midway_leaves_nothing(trained, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toto.commands.export.model_card", fail)
    assert run("export", trained, "--out", tmp_path / "hf") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [False, True])
def test_pushing_uploads_the_folder(trained, tmp_path, monkeypatch, capsys, kept):
    uploaded = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, name, *, private, exist_ok):
            uploaded["private"] = private

        def model_info(self, name):
            return types.SimpleNamespace(private=True)

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / "there")
            return types.SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(hub, "HfApi", Api)
    words = ("--out", tmp_path / "kept") if kept else ()
    assert run("export", trained, "--push", "some/model", "--private", *words) == 0
    assert "https://hub/some/model" in capsys.readouterr().out
    assert uploaded == {"private": True}
    assert same(trained, tmp_path / "there")
    assert '"some/model"' in (tmp_path / "there" / "README.md").read_text()
    assert (tmp_path / "kept").exists() == kept


def test_an_exported_folder_generates_as_the_checkpoint_does(tokenizer_folder, tokenizer, tmp_path):
    torch.manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    card = Card(passport=tokenizer.at(32, 32).to_dict(), sequence={"frames": 2, "rows": 4, "cols": 4, "stride": 4})
    save_model(source, Transformer(CONFIG), card)
    assert run("export", source, "--out", tmp_path / "hf") == 0
    for name in ("source", "hf"):
        words = ("--checkpoint", tmp_path / name, "--tokenizer", tokenizer_folder, "--frames", 2, "--samples", 1)
        assert run("generate", *words, "--out", tmp_path / f"made-{name}") == 0
    films = [(tmp_path / f"made-{name}" / "sample-0.png").read_bytes() for name in ("source", "hf")]
    assert films[0] == films[1]
