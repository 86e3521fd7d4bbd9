"""A tokenizer on a CPU encodes by prepared convolutions: the same codes as the plain modules give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from toto.runtime.errors import ConfigError
from toto.tokens import convolution
from toto.tokens.convolution import LargestLogit, Packed, Winograd, available
from toto.tokens.dvae import DVAE, DVAEConfig, DVAETokenizer, squeezed

pytestmark = pytest.mark.skipif(not available(torch.float32), reason="this CPU or torch encodes by the plain modules")
needs_bf16 = pytest.mark.skipif(not available(torch.bfloat16), reason="this CPU has no bfloat16 products")


def model_of(**config) -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**{"vocab_size": 512, "n_hid": 64, "n_init": 16, **config}))


def tokenizer_of(model: DVAE, precision="fp32") -> DVAETokenizer:
    made = DVAETokenizer.from_model(model, trained={})
    if precision == "fp32":
        return made
    copy = DVAE(model.config)
    copy.load_state_dict(model.state_dict())
    return DVAETokenizer(copy, made.passport, {}, torch.device("cpu"), precision)


def frames_of(count: int, height: int, width: int):
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=torch.manual_seed(1))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear").permute(0, 2, 3, 1) * 200
    return (smooth + 55 * torch.rand(smooth.shape)).to(torch.uint8)


@torch.no_grad()
def plain(model: DVAE, frames):
    return model.logits(squeezed(frames.permute(0, 3, 1, 2).float() / 255)).argmax(1)


@pytest.mark.parametrize(("count", "height", "width"), [(3, 64, 64), (1, 128, 128), (2, 72, 40), (1, 8, 8)])
def test_codes_are_those_of_the_plain_modules(count, height, width):
    model, frames = model_of(), frames_of(count, height, width)
    codes = tokenizer_of(model).encode(frames)
    assert codes.equal(plain(model, frames))
    assert codes.unique().numel() > 1 or codes.numel() == 1


def test_a_gain_that_is_no_power_of_two_and_odd_vocabularies_are_fine():
    model, frames = model_of(blocks=3, vocab_size=515), frames_of(1, 64, 64)
    assert tokenizer_of(model).encode(frames).equal(plain(model, frames))


def test_branches_as_strong_as_the_stream_are_fine():
    model, frames = model_of(), frames_of(2, 64, 64)
    for name, weight in model.named_parameters():
        if name.endswith("conv_4.weight"):
            weight.data *= 64
    assert tokenizer_of(model).encode(frames).equal(plain(model, frames))


@needs_bf16
def test_bf16_agrees_almost_everywhere():
    model = model_of(n_hid=128, vocab_size=1024)
    frames = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    codes = tokenizer_of(model, "bf16").encode(frames)
    assert (codes == plain(model, frames)).double().mean() >= 0.98


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_frame_has_the_same_codes_alone_with_others_and_again(precision):
    tokenizer, frames = tokenizer_of(model_of(), precision), frames_of(9, 64, 64)
    codes = tokenizer.encode(frames)
    assert codes.equal(tokenizer.encode(frames))
    assert codes[4:5].equal(tokenizer.encode(frames[4:5]))
    assert tokenizer.decode(codes[:1]).shape == (1, 64, 64, 3)


def test_what_is_saved_is_what_was_given(tmp_path):
    model, frames = model_of(), frames_of(1, 64, 64)
    tokenizer = tokenizer_of(model)
    codes = tokenizer.encode(frames)
    tokenizer.save(tmp_path / "first")
    again = DVAETokenizer.from_model(model, trained={})
    assert again.passport == tokenizer.passport
    again.save(tmp_path / "second")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert one == two
    assert again.encode(frames).equal(codes)


def test_training_does_not_meet_the_prepared_weights():
    model, frames = model_of(), frames_of(1, 64, 64)
    tokenizer_of(model).encode(frames)
    before = model.encode(frames)
    loss = model.logits(squeezed(frames.permute(0, 3, 1, 2).float() / 255)).square().mean()
    loss.backward()
    assert all(weight.grad is not None for weight in model.encoder.parameters())
    with torch.no_grad():
        model.encoder.last.weight.neg_()
    assert not model.encode(frames).equal(before)


# ---- the parts ----


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 5), (1, 1), (3, 30)])
@torch.inference_mode()
def test_winograd_is_the_convolution_of_the_rectified_input(height, width, monkeypatch):
    monkeypatch.setattr(convolution, "STRIP", 1)
    monkeypatch.setattr(convolution, "STRIP_TILES", 5)  # strips that don't divide the rows
    torch.manual_seed(0)
    x = torch.randn(3, 32, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(48, 32, 3, 3) / 17, torch.randn(48)
    wanted = F.conv2d(x.double().relu(), weight.double(), bias.double(), padding=1)
    error = (Winograd(weight, bias, torch.float32)(x) - wanted).norm() / wanted.norm()
    assert error < 1e-5


@torch.inference_mode()
def test_packed_convolutions_rectify_and_add():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, 32, 3, 3) / 17, torch.randn(16)
    packed, wanted = Packed(weight, bias, torch.float32), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(packed(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed(x, relu=True), wanted.relu(), atol=1e-5, rtol=1e-5)
    total = torch.ones(2, 16, 9, 7).contiguous(memory_format=torch.channels_last)
    packed.add_to(total, x)
    torch.testing.assert_close(total, wanted + 1, atol=1e-5, rtol=1e-5)


def head(vocab_size=512, channels=64):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 5, 7).relu().contiguous(memory_format=torch.channels_last)
    return x, torch.randn(vocab_size, channels, 1, 1) / 8, torch.randn(vocab_size)


@pytest.mark.parametrize("shift", [0, 100.0, -100.0])
@pytest.mark.parametrize("vocab_size", [512, 515])
@torch.inference_mode()
def test_the_largest_logit_is_that_of_float32(shift, vocab_size):
    x, weight, bias = head(vocab_size)
    bias += shift
    assert LargestLogit(weight, bias)(x).equal(F.conv2d(x.double(), weight.double(), bias.double()).argmax(1))


@torch.inference_mode()
def test_rows_that_bfloat16_cannot_tell_apart_are_told_apart():
    x, weight, bias = head(16)
    weight = weight.repeat(8, 1, 1, 1) * (1 + 1e-4 * torch.randn(128, 1, 1, 1))
    bias = torch.zeros(128)
    assert LargestLogit(weight, bias)(x).equal(F.conv2d(x.double(), weight.double()).argmax(1))


@pytest.mark.parametrize("copies", [2, 64])
@torch.inference_mode()
def test_the_first_of_equal_logits_wins_with_few_candidates_and_with_too_many(copies, monkeypatch):
    x, weight, bias = head(64)
    largest = LargestLogit(weight.repeat(copies, 1, 1, 1), bias.repeat(copies))
    taken = []
    exact = LargestLogit._exact
    monkeypatch.setattr(LargestLogit, "_exact", lambda self, *args: taken.append(0) or exact(self, *args))
    assert largest(x).equal(F.conv2d(x, weight, bias).argmax(1))
    assert bool(taken) == (copies == 2 and available(torch.bfloat16))


@torch.inference_mode()
def test_numbers_that_are_not_finite_and_cpus_without_bfloat16_get_all_logits(monkeypatch):
    x, weight, bias = head()
    wanted = F.conv2d(x, weight, bias).argmax(1)
    largest = LargestLogit(weight, bias)
    x[0, :, 0, 0] = torch.nan
    assert largest(x)[1].equal(wanted[1])
    assert largest(x).max() < 512
    monkeypatch.setattr(convolution, "available", lambda dtype: False)
    assert LargestLogit(weight, bias)(x)[1].equal(wanted[1])


def test_a_tokenizer_in_bfloat16_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="rounded for bf16"):
        tokenizer_of(model_of(), "bf16").save(tmp_path / "it")
    assert not (tmp_path / "it").exists()
