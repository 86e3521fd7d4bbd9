"""Backbones: Hugging Face's against transformers' own hidden states and processors, floors, names, batch sizes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from toto.evaluation.backbones import load_backbone
from toto.evaluation.backbones.huggingface import open_huggingface
from toto.evaluation.backbones.preprocessor import read_preprocessor
from toto.evaluation.features import Backbone
from toto.evaluation.labelled import extract, procedural_clips, stream_features
from toto.evaluation.probe import ProbeConfig, train_probes
from toto.media.procedural import make_clip
from toto.model.config import ModelConfig
from toto.model.transformer import Transformer
from toto.model.weights import Card, save_model
from toto.runtime.errors import CheckpointError, ConfigError, PassportError

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}
PIXELS = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
}
CONFIGS = {
    "vit": lambda: transformers.ViTConfig(**SMALL, image_size=32),
    "mae": lambda: transformers.ViTMAEConfig(**SMALL, image_size=32, mask_ratio=0.75),
    "dinov2": lambda: transformers.Dinov2Config(**SMALL, image_size=56),
    "registers": lambda: transformers.Dinov2WithRegistersConfig(**SMALL, image_size=56, num_register_tokens=3),
    "siglip": lambda: transformers.SiglipVisionConfig(**SMALL, image_size=32),
    "videomae": lambda: transformers.VideoMAEConfig(**SMALL, image_size=32, num_frames=4, tubelet_size=2),
}
BESIDE = {"vit": 1, "mae": 1, "dinov2": 1, "registers": 4, "siglip": 0, "videomae": 0}


def save(folder, config, **pixels):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))  # class tokens and the like begin at zero
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS | pixels))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, save(folder, CONFIGS[request.param]())


def frames_of(clips, count=4, size=32):
    return torch.stack([make_clip(3, number, frames=count, size=size).clip.frames for number in range(clips)])


def blocks_of(model):
    stacks = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 3]
    return list(stacks[0])


def test_features_are_the_hidden_states_of_transformers_for_visual_tokens(saved):
    kind, folder, model = saved
    backbone = open_huggingface(str(folder), frames=4, precision="fp32", device="cpu")
    frames = frames_of(2)
    found = backbone.features(frames)
    pixels = (frames.float() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.25])
    pixels = pixels.permute(0, 1, 4, 2, 3)
    given = pixels if kind == "videomae" else pixels.flatten(0, 1)
    captured = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: captured.append(out)) for block in blocks_of(model)]
    options = {"noise": torch.rand(len(given), 16)} if kind == "mae" else {}
    if kind == "mae":
        model.config.mask_ratio = 0.0
    with torch.no_grad():
        output = model(given, output_hidden_states=True, **options)
    [hook.remove() for hook in hooks]
    assert sorted(found) == [0, 1, 2, 3]
    for layer, states in enumerate(output.hidden_states):
        if layer:
            block = captured[layer - 1]
            torch.testing.assert_close(states, block[0] if isinstance(block, tuple) else block)  # before any norm
        visual = states[:, BESIDE[kind] :]
        if kind == "mae":  # here in the order that its own noise made
            order = output.ids_restore[..., None].expand_as(visual)
            visual = visual.gather(1, order)
        expected = visual if kind == "videomae" else visual.reshape(2, 4 * 16, 16)
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-5)
    assert isinstance(backbone, Backbone)
    assert backbone.width(2) == 16
    assert backbone.frames == 4


def test_features_do_not_depend_on_the_batch(saved):
    _, folder, _ = saved
    backbone = open_huggingface(str(folder), frames=4, precision="fp32", device="cpu")
    clips = frames_of(9)
    whole = backbone.features(clips)
    for size in (1, 7):
        parts = [backbone.features(part) for part in torch.split(clips, size)]
        for layer, states in whole.items():
            torch.testing.assert_close(torch.cat([part[layer] for part in parts]), states, atol=1e-5, rtol=0)


def test_class_tokens_are_kept_and_frames_averaged_where_asked(tmp_path):
    save(tmp_path, CONFIGS["registers"]())
    clips = frames_of(2)
    options = {"frames": 4, "precision": "fp32", "device": "cpu"}
    plain = load_backbone(f"hf:{tmp_path}", **options).features(clips)[3]
    mean = load_backbone(f"hf:{tmp_path}", over_frames="average", **options)
    torch.testing.assert_close(mean.features(clips)[3], plain.view(2, 4, 16, 16).mean(1))
    kept = load_backbone(f"hf:{tmp_path}", keep_class=True, layers=[3], **options)
    assert kept.features(clips)[3].shape == (2, 4 * 20, 16)
    assert list(kept.features(clips)) == [3]
    identities = {json.dumps(each.identity()) for each in (mean, kept, load_backbone(f"hf:{tmp_path}", **options))}
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("processor", "options", "shape"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 24, "width": 24}}, (50, 70)),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}}, (61, 90)),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}, (90, 61)),
    ],
)
def test_pixels_are_those_of_the_processor(tmp_path, processor, options, shape):
    theirs = getattr(transformers, processor)(**options)
    theirs.save_pretrained(tmp_path)
    ours = read_preprocessor(tmp_path)
    frames = make_clip(1, 0, frames=2, size=96).clip.frames[:, : shape[0], : shape[1]].contiguous()
    expected = theirs([frame.numpy() for frame in frames], return_tensors="pt", input_data_format="channels_last")
    found = ours.normalise(ours.prepare(frames))
    levels = (found - expected["pixel_values"]).abs() * torch.tensor(ours.deviation)[:, None, None] * 255
    assert levels.max() < 1.01  # one level of rounding in resizing
    assert levels.mean() < 0.2


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"size": {"height": 32, "width": 48}}, "no square"),
        ({"resample": 1}, "resampling number 1"),
        ({"do_resize": False}, "no resizing"),
        ({"size": {"longest_edge": 32}}, "isn't understood"),
        ({"do_center_crop": True, "size": {"shortest_edge": 16}, "crop_size": 32}, "a crop of 32 out of 16"),
        ({"image_mean": [0.5]}, "isn't understood"),
    ],
)
def test_preprocessors_that_ask_for_something_else_are_refused(tmp_path, pixels, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS | pixels))
    with pytest.raises(ConfigError, match=message):
        read_preprocessor(tmp_path)


def test_models_that_are_none_are_refused_in_one_line(tmp_path):
    for name in ("hf:", "random:", "random:hf:", ""):
        with pytest.raises(ConfigError, match="names no model"):
            load_backbone(name)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_backbone("hf:/nowhere/at/all")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_backbone(f"hf:{tmp_path}")
    save(tmp_path, CONFIGS["vit"]())
    with pytest.raises(ConfigError, match=r"layers \[9\] asked, it has 0 to 3; name others with --layers"):
        load_backbone(f"hf:{tmp_path}", layers=[9])
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="nobody knows the size and scale"):
        load_backbone(f"hf:{tmp_path}")
    (tmp_path / "other.json").rename(tmp_path / "preprocessor_config.json")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:900])
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_backbone(f"hf:{tmp_path}")
    weights.unlink()
    with pytest.raises(CheckpointError, match="convert its weights to safetensors"):
        load_backbone(f"hf:{tmp_path}")


def test_missing_weights_and_language_models_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, CONFIGS["vit"]())
    held = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in held if "layers.1" in name or "layer.1" in name)
    save_file({name: each for name, each in held.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        load_backbone(f"hf:{tmp_path}")
    gpt = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    transformers.GPT2Model(gpt).save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    with pytest.raises(ConfigError, match="a gpt2 model is no vision transformer"):
        load_backbone(f"hf:{tmp_path / 'text'}")


def test_a_model_of_videos_takes_its_own_length_alone(tmp_path):
    save(tmp_path, CONFIGS["videomae"]())
    with pytest.raises(ConfigError, match="takes clips of 4 frames, not 8"):
        load_backbone(f"hf:{tmp_path}", frames=8)
    with pytest.raises(ConfigError, match="takes clips of 4 frames, not 1; give videos"):
        load_backbone(f"hf:{tmp_path}").features(frames_of(2, 1))


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'toto-video\[hf\]'"):
        load_backbone(f"hf:{tmp_path}")


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(vocab_size=68, width=16, layers=2, heads=2, mlp_hidden=24))
    folder = tmp_path / "model"
    folder.mkdir()
    sequence = {"frames": 4, "stride": 2, "rows": 8, "cols": 8}
    save_model(folder, model, Card(passport=tokenizer.at(32, 32).to_dict(), sequence=sequence))
    return folder


def test_a_checkpoint_by_name_and_its_random_twin(checkpoint, tokenizer_folder, tokenizer):
    options = {"precision": "fp32", "device": "cpu"}
    backbone = load_backbone(checkpoint, tokenizer=tokenizer_folder, **options)
    grid = tokenizer.grid(32, 32)
    clips = frames_of(3)
    found = backbone.features(clips)
    assert found[2].shape == (3, 4 * grid[0] * grid[1], 16)
    assert (backbone.stride, backbone.frames) == (2, 4)
    twins = [load_backbone(f"random:{checkpoint}", tokenizer=tokenizer, seed=seed, **options) for seed in (0, 0, 1)]
    states = [twin.features(clips)[2] for twin in twins]
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2])
    assert not torch.allclose(states[0], found[2])
    assert states[0].shape == found[2].shape
    assert twins[0].identity() == twins[1].identity()
    assert len({json.dumps(each.identity()) for each in (backbone, twins[0], twins[2])}) == 3
    images = load_backbone(checkpoint, tokenizer=tokenizer_folder, **options)
    images.modality = "image"
    assert images.identity() != backbone.identity()
    assert not torch.allclose(images.features(clips)[2], found[2])  # another start token
    with pytest.raises(ConfigError, match="trained on clips of 4 frames, not 8"):
        load_backbone(checkpoint, tokenizer=tokenizer, frames=8)


def test_a_batch_goes_through_the_tokenizer_at_once(checkpoint, tokenizer, monkeypatch):
    """On processors a tokenizer fills every call up to a whole number of chunks."""
    backbone = load_backbone(checkpoint, tokenizer=tokenizer, precision="fp32", device="cpu")
    calls, encode = [], backbone.tokenizer.encode
    monkeypatch.setattr(backbone.tokenizer, "encode", lambda frames: calls.append(len(frames)) or encode(frames))
    clips = frames_of(3)
    together = backbone.features(clips)[2]
    assert calls == [3 * 4]
    torch.testing.assert_close(together, torch.cat([backbone.features(clip[None])[2] for clip in clips]))


def test_an_absent_and_a_strange_tokenizer_are_told_apart(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"its tokenizer is absent: no tokenizer here .*--tokenizer FOLDER"):
        load_backbone(checkpoint, tokenizer=tmp_path / "nowhere")
    with pytest.raises(PassportError, match="give the one the model was trained with"):
        load_backbone(checkpoint)


def test_a_random_vision_model_has_the_shape_alone(tmp_path):
    save(tmp_path, CONFIGS["vit"]())
    trained, drawn = (load_backbone(f"{each}hf:{tmp_path}", precision="fp32") for each in ("", "random:"))
    clips = frames_of(2, 1)
    assert drawn.features(clips)[3].shape == trained.features(clips)[3].shape
    assert not torch.allclose(drawn.features(clips)[3], trained.features(clips)[3])
    assert drawn.identity()["weights"] != trained.identity()["weights"]


def test_raw_pixels_are_patches():
    backbone = load_backbone("pixels:16/2", frames=3)
    clips = frames_of(2, 3, 16)
    (found,) = backbone.features(clips).values()
    assert found.shape == (2, 12, 192)
    assert backbone.width(0) == 192
    torch.testing.assert_close(found[1, 5], clips[1, 1, :8, 8:].flatten().float() / 127.5 - 1)
    assert load_backbone("pixels:32/1").width(0) == 3072
    for name in ("pixels:16/3", "pixels:x", "pixels:16/0"):
        with pytest.raises(ConfigError, match="pixels"):
            load_backbone(name)


def test_the_metric_does_not_depend_on_the_batch(checkpoint, tokenizer):
    """Of extraction at 1, 7 and 64 clips at once: fewer than a batch, a last one that is short, and one by one."""
    config = ProbeConfig(epochs=10, batch=16, heads=2, rates=(1e-2,))
    features, scores = [], []
    for batch in (1, 7, 64):
        backbone = load_backbone(checkpoint, tokenizer=tokenizer, precision="fp32", device="cpu")
        train, test = (procedural_clips(seed, count, frames=4, size=32) for seed, count in ((1, 40), (2, 18)))
        fit, seen = (extract(backbone, clips, batch=batch).features for clips in (train, test))
        features.append(torch.cat([block.features[2] for block in stream_features(backbone, test, batch=batch)]))
        scores.append(train_probes(fit, seen, classes=6, config=config))
    for other, found in zip(features[1:], scores[1:], strict=True):
        torch.testing.assert_close(other, features[0], atol=1e-5, rtol=0)
        for ours, first in zip(found, scores[0], strict=True):
            assert abs(ours.validation - first.validation) < 1e-5
            assert abs(float(ours.correct.double().mean() - first.correct.double().mean())) < 1e-5
