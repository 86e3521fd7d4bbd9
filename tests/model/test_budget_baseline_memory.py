"""The memory that is planned for the baselines is what their real steps allocate."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from step_memory import measured_apart

from toto.model.architectures import build, config_of, described
from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.budget.baseline_memory import baseline_memory, memory_is_known
from toto.model.budget.memory import CATEGORIES, StepShape
from toto.model.budget.parameters import parameter_table
from toto.training.objective import next_token_loss
from toto.training.optimizer import OptimizerConfig, make_optimizer

pytest.importorskip("transformers")
GPT = GPT2Config(vocab_size=260, width=192, layers=2, heads=4, mlp_hidden=768)
DEEP = replace(GPT, vocab_size=1028, layers=4, mlp_hidden=384)
MAMBA = MambaConfig(vocab_size=260, width=128, layers=1)
AGAIN = replace(MAMBA, width=64, layers=2, state_size=64)  # states of a long sequence are made again
LARGE = {"vocab_size": 8196}


def case(config, *, batch=1, length=258, bf16=False, passes=1, checkpointing="none"):
    return {
        "model": described(config),
        "batch": batch,
        "length": length,
        "bf16": bf16,
        "passes": passes,
        "checkpointing": checkpointing,
    }


CASES = {
    f"{config.kind}, {'bf16' if bf16 else 'fp32'}, batch {batch}": case(config, batch=batch, bf16=bf16)
    for config in (GPT, MAMBA)
    for bf16 in (False, True)
    for batch in (1, 3)
}
CASES |= {
    f"gpt2, {'bf16' if bf16 else 'fp32'}, {kept} checkpointing": case(DEEP, batch=3, bf16=bf16, checkpointing=kept)
    for bf16 in (False, True)
    for kept in ("selective", "full")
}
CASES |= {
    "gpt2, full checkpointing, not tied": case(
        replace(DEEP, tie_embeddings=False), batch=3, bf16=True, checkpointing="full"
    ),
    "gpt2, large vocabulary, two passes": case(replace(GPT, **LARGE), bf16=True, passes=2),
    "gpt2, large vocabulary, not tied": case(replace(GPT, tie_embeddings=False, **LARGE), batch=3),
    "gpt2, few tokens": case(DEEP, length=6),
    "gpt2, bf16, few tokens, two passes": case(GPT, length=18, bf16=True, passes=2),
    "mamba, large vocabulary, two passes": case(replace(MAMBA, layers=2, **LARGE), batch=3, passes=2),
    "mamba, large vocabulary, not tied": case(replace(MAMBA, tie_embeddings=False, **LARGE), bf16=True),
    "mamba, few tokens": case(MAMBA, length=18, bf16=True),
    "mamba, fp32, small states": case(replace(MAMBA, state_size=1), batch=2, length=386),
    "mamba, bf16, small states": case(replace(MAMBA, state_size=1), batch=2, length=386, bf16=True),
    "mamba, fp32, states made again": case(AGAIN, length=2305),
    "mamba, bf16, states made again": case(AGAIN, length=2305, bf16=True),
    "mamba, states of a batch made again": case(AGAIN, batch=3, length=1025),
}


@pytest.fixture(scope="module")
def measured():
    return measured_apart(CASES)


def planned(model, batch, length, bf16, passes, checkpointing):
    shape = StepShape(batch=batch, positions=length - 1, bf16=bf16, accumulates=passes > 1, checkpointing=checkpointing)
    return baseline_memory(config_of(model), shape)


@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_what_a_real_step_allocates(measured, name):
    memory, found = planned(**CASES[name]), measured[name]
    assert memory.weights + memory.optimizer == pytest.approx(found["held"], rel=1e-3)
    assert memory.total == pytest.approx(found["peak"], rel=0.01)
    beside = found["peak"] - found["held"]
    assert memory.total - memory.weights - memory.optimizer == pytest.approx(beside, rel=0.015)


def test_every_moment_is_somewhere_the_fullest():
    assert {planned(**words).moment for words in CASES.values()} == {"loss", "last block", "first block", "end"}


def saved(config, batch, positions, bf16):
    """Bytes of all tensors that autograd keeps of a forward pass, weights aside."""
    model, kept = build(config), {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = next_token_loss(model, torch.randint(4, 260, (batch, positions + 1)))
        found = sum(count for place, count in kept.items() if place not in weights)
    assert loss.mean.requires_grad  # all of it was there until here
    return found


EACH = pytest.mark.parametrize("config", [GPT, MAMBA, replace(MAMBA, state_size=1, conv_kernel=64)], ids=str)
PRECISIONS = pytest.mark.parametrize("bf16", [False, True])


@EACH
@PRECISIONS
@pytest.mark.parametrize(("batch", "positions", "within"), [(1, 129, 3e-3), (3, 70, 1e-4)])
def test_what_a_block_keeps_is_known_tensor_by_tensor(config, bf16, batch, positions, within):
    """Of a single sequence, C needs no copy for its product, which isn't told apart."""
    shape = StepShape(batch=batch, positions=positions, bf16=bf16)
    more, less = (replace(config, layers=layers) for layers in (5, 4))
    planned = [baseline_memory(each, shape) for each in (more, less)]
    assert planned[0].moment == planned[1].moment
    block = sum(getattr(planned[0], name) - getattr(planned[1], name) for name in ("activations", "copies"))
    found = saved(more, batch, positions, bf16) - saved(less, batch, positions, bf16)
    assert block == pytest.approx(found, rel=within)


@EACH
@PRECISIONS
def test_what_is_kept_outside_of_blocks_is_known_tensor_by_tensor(config, bf16):
    memory = baseline_memory(replace(config, **LARGE), StepShape(batch=3, positions=70, bf16=bf16))
    assert memory.moment == "loss"
    ids = 3 * (71 + 70 + 70) * 8  # the batch, targets, and those as one row
    result = 3 * 70 * 4 * config.width  # of the last norm, which the loss is given
    copies = memory.copies - (2 * LARGE["vocab_size"] * config.width if bf16 else 0)
    kept = saved(replace(config, **LARGE), 3, 70, bf16) - 3 * 71 * 8
    assert memory.activations + copies == pytest.approx(kept + ids + result, rel=1e-4)


@pytest.mark.parametrize("config", [GPT, MAMBA], ids=str)
def test_more_of_anything_takes_more(config):
    shape = StepShape(batch=2, positions=4097, bf16=True)
    least = baseline_memory(config, shape).total
    for change in ({"batch": 3}, {"positions": 4098}, {"accumulates": True}):
        assert baseline_memory(config, replace(shape, **change)).total > least
    assert baseline_memory(replace(config, layers=5), shape).total > least
    assert baseline_memory(config, replace(shape, shards=8)).total != least


def test_a_gpu_takes_powers_in_fp32():
    shape = StepShape(batch=2, positions=300, bf16=True)
    here, there = (baseline_memory(GPT, replace(shape, fused_norm=gpu)) for gpu in (False, True))
    assert there.activations - here.activations == 3 * 2 * 600 * GPT.layers * GPT.mlp_hidden
    fp32 = replace(shape, bf16=False)
    assert baseline_memory(GPT, fp32) == baseline_memory(GPT, replace(fp32, fused_norm=True))
    assert baseline_memory(MAMBA, shape) == baseline_memory(MAMBA, replace(shape, fused_norm=True))


@pytest.mark.parametrize("config", [GPT, MAMBA], ids=str)
def test_shards_divide_what_is_held_and_are_gathered(config):
    shape = StepShape(batch=1, positions=257, bf16=False, accumulates=True)
    whole, part = (baseline_memory(config, replace(shape, shards=shards)) for shards in (1, 4))
    assert whole.moment == part.moment == "last block"
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(part, name) == getattr(whole, name) // 4
    assert part.activations == whole.activations
    table = parameter_table(config)
    outer = table["embedding"] + 2 * config.width  # with the last norm
    blocks = 4 * (table["total"] - outer) // config.layers
    gathered = outer + blocks if config is GPT else table["total"] + 2 * table["embedding"]
    assert part.copies - whole.copies == pytest.approx(4 * gathered, rel=1e-3)
    assert tuple(part.by_category()) == CATEGORIES


def test_of_a_scan_that_is_not_ours_the_least_is_what_weights_gradients_and_moments_take():
    config = replace(MAMBA, scan="transformers")
    assert not memory_is_known(config)
    assert memory_is_known(MAMBA)
    assert memory_is_known(GPT)
    model = build(config)
    optimizer = make_optimizer(model, OptimizerConfig())
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    held = sum(weight.nbytes + weight.grad.nbytes for weight in model.parameters())
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    shape = StepShape(batch=1, positions=9, bf16=True)
    assert baseline_memory(config, shape).total == held == 16 * parameter_table(config)["total"]
    assert baseline_memory(config, replace(shape, shards=4)).total == pytest.approx(held / 4, rel=1e-3)
