"""Fine-tuning: where gradients go, rates by layer, runs that continue bit for bit, views, and what is counted."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_video
from PIL import Image
from safetensors.torch import load_file

from toto.evaluation import finetune as module
from toto.evaluation.classifier import Classifier, HeadConfig, load_classifier
from toto.evaluation.finetune import finetune
from toto.evaluation.finetune_config import Augmentation, FinetuneConfig
from toto.evaluation.finetune_data import Eyes, FreshViews, StoredViews, augmented, random_box
from toto.evaluation.finetune_objective import layer_factor, losses, make_groups
from toto.evaluation.labelled import catalog_clips
from toto.evaluation.recognition import Predictor
from toto.evaluation.result import load_result
from toto.evaluation.views import ViewConfig
from toto.model.architectures import build
from toto.model.baselines.config import GPT2Config
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import Card, load_model, save_model
from toto.runtime.errors import ConfigError, InterruptedRunError, PassportError
from toto.runtime.interrupt import StopRequest
from toto.runtime.metrics import read_metrics
from toto.tokens.tokenizer import load_tokenizer
from toto.training.objective import next_token_loss
from toto.training.optimizer import OptimizerConfig

SHAPE = ModelConfig(vocab_size=68, width=32, layers=2, heads=2, mlp_hidden=48)
HEAD = HeadConfig(heads=2)
QUICK = FinetuneConfig(
    head=HEAD,
    epochs=3,
    batch=4,
    micro_batch=2,
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
    augmentation=Augmentation(area=(0.6, 1.0)),
    validation=0.25,
    validate_every=2,
    log_every=1,
    save_every=2,
)
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def model_of(config: ModelConfig = SHAPE) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    side = 4 * tokenizer.downsampling
    card = Card(passport=tokenizer.at(side, side).to_dict(), sequence={"frames": 2, "stride": 2, "rows": 4, "cols": 4})
    save_model(folder, model_of(), card)
    return str(folder)


def paint(folder, per_class, *, seed=0):
    """Noisy pictures of three colours."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            noise = rng.normal(0, 25, (20, 28, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return catalog_clips(str(folder), frames=1, stride=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return paint(root / "train", 8), paint(root / "test", 4, seed=1)


def inputs(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(4, 68, (count, 18), generator=generator)
    sequences[:, 0], sequences[:, -1] = 3, 2
    return sequences, torch.arange(count) % 3


@pytest.mark.parametrize("targets", ["codes", "pixels"])
def test_the_backbone_s_gradient_is_that_of_the_next_token_loss_alone(targets):
    config = SHAPE if targets == "codes" else replace(SHAPE, inputs="patches", targets="pixels", patch_values=12)
    sequences, labels = inputs()
    patches = None if targets == "codes" else torch.randn(3, 16, 12)
    alone = model_of(config)
    next_token_loss(alone, sequences, patches).mean.backward()
    classifier = Classifier(model_of(config), (0, 1, 2), 3, HEAD)
    next_token, entropy = losses(classifier, FinetuneConfig(head=HEAD), sequences, patches, labels)
    (next_token + entropy).backward()
    wanted = dict(alone.named_parameters())
    for name, weight in classifier.backbone.named_parameters():
        if wanted[name].grad is None:
            assert weight.grad is None
        else:
            torch.testing.assert_close(weight.grad, wanted[name].grad, atol=1e-6, rtol=1e-5)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in classifier.heads.parameters())


def test_in_full_fine_tuning_the_heads_train_the_backbone_and_nothing_predicts():
    classifier = Classifier(model_of(replace(SHAPE, attention="full")), (2,), 3, HEAD, joined=True)
    sequences, labels = inputs()
    next_token, entropy = losses(classifier, FinetuneConfig(mode="full", head=HEAD), sequences, None, labels)
    entropy.backward()
    assert next_token == 0
    assert all(weight.grad.abs().sum() > 0 for weight in classifier.backbone.blocks.parameters())
    with pytest.raises(ConfigError, match="full attention, so it predicts nothing"):
        classifier.backbone(sequences)


@pytest.mark.parametrize(("attention", "sees_later"), [("causal", False), ("full", True)])
def test_full_attention_sees_later_positions(attention, sees_later):
    model = model_of(replace(SHAPE, attention=attention))
    sequences, _ = inputs(1)
    changed = sequences.clone()
    changed[0, -2] = 4 + (changed[0, -2] - 3) % 64
    before, after = (model.trunk(each)[0][:, 0] for each in (sequences, changed))
    assert torch.equal(before, after) is not sees_later


def test_rates_fall_layer_by_layer():
    classifier = Classifier(model_of(), (0, 1, 2), 3, HEAD)
    groups = make_groups(classifier, replace(QUICK, layer_decay=0.5, head_rate=7.0))
    rate_of = {id(weight): group["rate"] for group in groups for weight in group["params"]}
    decay_of = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    expected = {"embedding": 0.25, "blocks.0": 0.5, "blocks.1": 1.0, "norm": 1.0, "head": 1.0}
    for name, weight in classifier.backbone.named_parameters():
        (rate,) = (value for prefix, value in expected.items() if name.startswith(f"{prefix}."))
        assert rate_of[id(weight)] == rate
        assert decay_of[id(weight)] == (QUICK.optimizer.weight_decay if weight.ndim >= 2 else 0)
    assert {rate_of[id(weight)] for weight in classifier.heads.parameters()} == {7.0}
    assert len(rate_of) == len(list(classifier.parameters()))
    assert [layer_factor(f"blocks.{n}.mlp.down.weight", 12, 0.9) for n in (0, 11)] == [pytest.approx(0.9**11), 1]
    assert layer_factor("embedding.weight", 12, 0.9) == pytest.approx(0.9**12)


def test_views_are_drawn_within_bounds_and_flip_all_frames_alike():
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = random_box(40, 60, rng, (0.2, 0.5), (0.75, 4 / 3))
        assert 0 <= box.top <= 40 - box.height
        assert 0 <= box.left <= 60 - box.width
        assert 0.17 < box.height * box.width / 2400 < 0.55
        assert 0.7 < box.width / box.height < 1.42
    narrow = random_box(10, 1000, rng, (0.9, 1.0), (0.75, 4 / 3))
    assert (narrow.height, narrow.width) == (10, 13)
    frames = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)
    mirrored = augmented(frames, 8, rng, Augmentation(area=None, flip=1.0))
    torch.testing.assert_close(mirrored, frames.flip(2))
    for area, match in (((0.5, 0.2), "rise"), ((0.0, 1.0), "rise")):
        with pytest.raises(ConfigError, match=match):
            Augmentation(area=area)


def run(config, out, checkpoint, tokenizer, pictures, **options):
    train, test = pictures
    return finetune(config, out, checkpoint=checkpoint, tokenizer=tokenizer, train=train, test=test, **options)


def tensors(out):
    newest = sorted((out / "checkpoints").iterdir())[-1]
    return {file.name: load_file(file) for file in newest.glob("*.safetensors")}


@pytest.mark.parametrize(
    "config",
    [
        QUICK,
        replace(QUICK, mode="full", stored_views=2),
        replace(QUICK, next_token_weight=0.0, head=HeadConfig(pool="average", classifier="mlp")),
    ],
    ids=["probes", "full", "frozen"],
)
def test_a_run_that_was_stopped_continues_bit_for_bit(config, checkpoint, tokenizer, pictures, tmp_path, monkeypatch):
    whole = run(config, tmp_path / "whole", checkpoint, tokenizer, pictures)

    @contextlib.contextmanager
    def soon(**_):
        class Soon(StopRequest):
            looks = 0

            def __bool__(self):
                self.looks += 1
                return self.looks > 8

        yield Soon()

    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_on_signal", soon)
        with pytest.raises(InterruptedRunError, match="--resume"):
            run(config, tmp_path / "cut", checkpoint, tokenizer, pictures)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config, tmp_path / "cut", checkpoint, tokenizer, pictures)
    with pytest.raises(ConfigError, match="other layer_decay"):
        run(replace(config, layer_decay=0.5), tmp_path / "cut", checkpoint, tokenizer, pictures, resume=True)
    again = run(config, tmp_path / "cut", checkpoint, tokenizer, pictures, resume=True)
    ours, theirs = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys() == {"model.safetensors", "heads.safetensors", "trainer.safetensors"}
    for file in ours:
        assert ours[file].keys() == theirs[file].keys()
        assert all(torch.equal(value, theirs[file][name]) for name, value in ours[file].items())
    assert again.metrics == whole.metrics
    assert again.model_sha256 == whole.model_sha256
    rows = [[(row["step"], row.get("train/entropy")) for row in read_metrics(tmp_path / n)] for n in ("cut", "whole")]
    assert rows[0] == rows[1]
    before, after = load_model(checkpoint).state_dict(), load_model(tmp_path / "whole").state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(moved) == (config.next_token_weight > 0)


def test_colours_are_learnt_and_the_classifier_names_them_in_any_batch(checkpoint, tokenizer, pictures, tmp_path):
    config = replace(QUICK, epochs=12, head_rate=3.0, save_every=100)
    result = run(config, tmp_path / "run", checkpoint, tokenizer, pictures)
    assert result.metrics["top1"].value > 0.9
    assert result.metrics["top5"].value == 1.0
    assert (result.offered, result.evaluated, result.failed) == (12, 12, 0)
    assert load_result(tmp_path / "run" / "result.json").metrics == result.metrics
    loaded = load_classifier(tmp_path / "run")
    assert loaded.card.layer == result.protocol["layer"]
    assert loaded.card.classes == ("blue", "green", "red")
    said = {}
    for batch in (1, 7, 64):
        see = Predictor(loaded, tokenizer, views=ViewConfig(clips=1, crops=3), batch=batch, precision="fp32")
        said[batch] = torch.stack([see(item) for item in pictures[1].items])
    torch.testing.assert_close(said[1], said[7], atol=1e-5, rtol=0)
    torch.testing.assert_close(said[1], said[64], atol=1e-5, rtol=0)
    torch.testing.assert_close(said[1].sum(dim=1), torch.ones(12))
    assert (said[1].argmax(dim=1) == torch.tensor(pictures[1].labels)).float().mean() > 0.9


def test_other_architectures_have_probes_and_nothing_else(tokenizer, pictures, tmp_path):
    pytest.importorskip("transformers")
    config = GPT2Config(vocab_size=68, width=32, layers=2, heads=2, mlp_hidden=48)
    side = 4 * tokenizer.downsampling
    card = Card(passport=tokenizer.at(side, side).to_dict(), sequence={"frames": 2, "stride": 2, "rows": 4, "cols": 4})
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, build(config), card)
    quick = replace(QUICK, epochs=1, layers=(1,))
    for odd, match in (({"mode": "full"}, "--mode full: a gpt2 model"), ({"rope_base": 5e4}, "--rope-base: a")):
        with pytest.raises(ConfigError, match=match):
            run(replace(quick, **odd), tmp_path / "run", str(folder), tokenizer, pictures)
    result = run(quick, tmp_path / "run", str(folder), tokenizer, pictures)
    assert result.evaluated == 12
    assert read_metrics(tmp_path / "run")[0]["train/next_token"] > 0


def test_stored_views_are_those_of_the_first_epochs(checkpoint, tokenizer, pictures, tmp_path):
    train, _ = pictures
    side = 4 * tokenizer.downsampling
    eyes = Eyes(tokenizer, (4, 4), "image")
    options = {"frames": 1, "stride": 1, "size": side, "augmentation": Augmentation(), "seed": 3}
    fresh = FreshViews(train, eyes, **options)
    stored = StoredViews(FreshViews(train, eyes, **options), 2, tmp_path / "views")
    stored.make()
    for epoch in (0, 1, 2):
        numbers, codes = stored.batch([5, 0, 23], epoch)
        assert numbers == [5, 0, 23]
        np.testing.assert_array_equal(codes, fresh.batch([5, 0, 23], epoch % 2)[1])
    assert not np.array_equal(stored.batch([5], 0)[1], stored.batch([5], 1)[1])
    made = (tmp_path / "views" / "block-00000.npy").stat().st_mtime_ns
    StoredViews(FreshViews(train, eyes, **options), 2, tmp_path / "views").make()
    assert (tmp_path / "views" / "block-00000.npy").stat().st_mtime_ns == made


@pytest.mark.parametrize("stored", [0, 2])
def test_unreadable_clips_are_counted_in_training_and_testing(stored, checkpoint, tokenizer, tmp_path):
    for label in ("a", "b"):
        for number in range(6):
            make_video(
                tmp_path / "clips" / label / f"{number}.mp4", frames=12, size=32, number=number + 10 * (label == "b")
            )
    for name in ("a/1", "b/4"):
        (tmp_path / "clips" / f"{name}.mp4").write_text("broken")
    make_video(tmp_path / "clips" / "b" / "2.mp4", frames=3, size=32)
    clips = catalog_clips(str(tmp_path / "clips"), frames=2, stride=2)
    config = replace(QUICK, stored_views=stored, epochs=2, views=ViewConfig(clips=2, crops=3), frames=4)
    result = run(config, tmp_path / "run", checkpoint, tokenizer, (clips, clips))
    assert (result.offered, result.evaluated, result.failed) == (12, 10, 2)
    assert result.ledger == {"test": {"ok": 10, "corrupt": 2}, "train": {"ok": 10, "corrupt": 2}}
    assert result.details["shorter_than_a_clip"] == 1
    assert result.metrics["top1"].bound == pytest.approx(result.metrics["top1"].value * 10 / 12)


def test_what_does_not_fit_is_refused(checkpoint, tokenizer, pictures, tmp_path):
    train, test = pictures
    few = train.subset([0, 8, 16])
    for config, data, match in (
        (QUICK, (few, test), "no training item is left of class blue, green, red"),
        (replace(QUICK, batch=64), pictures, "18 training items, fewer than a batch of 64"),
        (replace(QUICK, layers=(3,)), pictures, r"layers \[3\] asked, the model has 0 to 2"),
        (replace(QUICK, head=HeadConfig(heads=5)), pictures, "5 heads don't divide a feature width of 32"),
        (replace(QUICK, frame_size=17), pictures, "grid"),
    ):
        with pytest.raises(Exception, match=match):
            run(config, tmp_path / "run", checkpoint, tokenizer, data)
    with pytest.raises(PassportError, match="its tokens have"):
        run(QUICK, tmp_path / "run", checkpoint, load_tokenizer(), pictures)
    with pytest.raises(PassportError, match="reads codes, and no tokenizer is given"):
        run(QUICK, tmp_path / "run", checkpoint, None, pictures)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        run(QUICK, tmp_path / "other", checkpoint, tokenizer, pictures)
    for options, match in (
        ({"mode": "full", "layers": (0, 1)}, "one head"),
        ({"micro_batch": 3}, "no multiple"),
        ({"layer_decay": 0.0}, "0 .. 1"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"head_rate": float("nan")}, "--head-rate: must be positive, is nan"),
        ({"next_token_weight": -1.0}, "--next-token-weight: must not be negative"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"rope_base": 1.0}, "--rope-base: must be above 1"),
        ({"timeout": float("nan")}, "--timeout: must be positive"),
    ):
        with pytest.raises(ConfigError, match=match):
            replace(QUICK, **options)
