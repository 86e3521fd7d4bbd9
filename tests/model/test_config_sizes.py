"""Named sizes: every number, what is published of it, and the parameters that follow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from toto.model.budget import parameter_table
from toto.model.config import SCALING, SHAPES, note_on, size
from toto.model.transformer import Transformer


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(name, tied):
    config = replace(size(name, vocab_size=8196), tie_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameter_table(config)["total"]


def test_table_1_of_the_paper():
    for name, width, heads, layers in (("base", 768, 12, 12), ("large", 1024, 16, 16), ("1b", 2048, 16, 22)):
        config = size(name)
        assert (config.width, config.heads, config.layers) == (width, heads, layers)


def test_the_scaling_study_keeps_its_heads_and_grows():
    sizes = [size(name) for name in SCALING]
    assert {config.heads for config in sizes} == {16}
    for small, large in pairwise(sizes):
        assert small.width < large.width
        assert small.layers < large.layers


def test_notes_say_what_is_not_published():
    assert "reconstructed" in note_on(size("a1"))
    assert "guess" in note_on(size("a5"))
    assert "4,096 is what gives" in note_on(size("large"))
    assert "2,816 is not the one" in note_on(size("large", mlp="llama"))
    assert note_on(size("small")) is None
    assert note_on(replace(size("a1"), width=320)) is None
