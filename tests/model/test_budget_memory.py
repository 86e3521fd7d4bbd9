"""The memory that is planned is what real steps allocate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from step_memory import measured_apart

from toto.model.budget.flops import positions_of
from toto.model.budget.memory import CATEGORIES, StepShape, training_memory
from toto.model.budget.parameters import parameter_table
from toto.model.config import ModelConfig, size

SHAPE = {"vocab_size": 1028, "width": 192, "layers": 4, "heads": 4, "mlp_hidden": 512}
PIXELS = {"inputs": "patches", "targets": "pixels", "patch_values": 192}


def case(model=SHAPE, *, batch=2, length=258, bf16=True, passes=1, checkpointing="none", **changes):
    return {
        "model": {**model, **changes},
        "batch": batch,
        "length": length,
        "bf16": bf16,
        "passes": passes,
        "checkpointing": checkpointing,
    }


CASES = {
    "fp32": case(bf16=False, length=770),
    "bf16": case(),
    "bf16, large vocabulary, tied": case(vocab_size=8196, tie_embeddings=True),
    "bf16, two passes": case(passes=2),
    "fp32, few codes": case(bf16=False, vocab_size=68, layers=2),
    "bf16, many rows": case(batch=1, length=2050, layers=8),
    "few tokens": case(batch=1, length=18),
    "bf16, pixels": case(**PIXELS),
    "bf16, full checkpointing": case(checkpointing="full", layers=6, vocab_size=68),
    "bf16, selective checkpointing": case(checkpointing="selective", vocab_size=260),
}


@pytest.fixture(scope="module")
def measured():
    return measured_apart(CASES)


def planned(model, batch, length, bf16, passes, checkpointing):
    config = ModelConfig(**model)
    shape = StepShape(
        batch=batch,
        positions=positions_of(config, length - 2),
        bf16=bf16,
        accumulates=passes > 1,
        checkpointing=checkpointing,
    )
    return training_memory(config, shape)


@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_what_a_real_step_allocates(measured, name):
    memory, found = planned(**CASES[name]), measured[name]
    assert memory.weights + memory.optimizer == pytest.approx(found["held"], rel=1e-4)
    assert memory.total == pytest.approx(found["peak"], rel=0.03)
    beside = found["peak"] - found["held"]
    assert memory.total - memory.weights - memory.optimizer == pytest.approx(beside, rel=0.06)


def test_the_process_grows_by_what_was_counted(measured):
    """The system's own figure, which includes code and the profiler's records: no tensor is missed."""
    peak, resident = (measured["fp32"][name] for name in ("peak", "resident"))
    assert 0.9 * peak < resident < peak + 250e6


def test_more_of_anything_takes_more():
    config = size("base", vocab_size=8196)
    shape = StepShape(batch=2, positions=4097, bf16=True)
    least = training_memory(config, shape).total
    for change in ({"batch": 3}, {"positions": 4098}, {"bf16": False}, {"accumulates": True}):
        assert training_memory(config, replace(shape, **change)).total > least
    for change in ({"shards": 8}, {"checkpointing": "full"}):
        assert training_memory(config, replace(shape, **change)).total < least
    gpu = replace(shape, fused_norm=True)  # on a processor, blocks keep no more than products and attention give
    assert training_memory(config, replace(gpu, checkpointing="selective")).total < training_memory(config, gpu).total
    assert training_memory(replace(config, layers=13), shape).total > least


def test_shards_divide_what_is_held():
    config = size("1b", vocab_size=8196)
    shape = StepShape(batch=1, positions=4097, bf16=True, accumulates=True, fused_norm=True)
    whole, part = (training_memory(config, replace(shape, shards=shards)) for shards in (1, 16))
    total = parameter_table(config)["total"]
    for name, bytes_a_weight in {"weights": 4, "gradients": 4, "optimizer": 8}.items():
        assert getattr(whole, name) == bytes_a_weight * total
        assert getattr(part, name) == bytes_a_weight * total // 16
    assert part.moment == whole.moment
    assert part.activations == whole.activations
    assert tuple(part.by_category()) == CATEGORIES
