"""Memory of the baselines' training steps on one rank, from the structure alone; see `toto.model.budget.memory`.

It follows what autograd keeps of transformers' GPT-2 block, whose GELU is made of single operations, and of our Mamba:
its states are kept or, where a layer's are large, made again a chunk at a time. Matrix products and attention are in
the compute precision; the residual stream, norms and the scan are in fp32.

Symbols: E bytes of a number in the compute precision, 4 those of fp32; C channels of a Mamba block, G numbers of a
channel's state, R the rank of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.baselines.scan import CHUNK, KEPT_BYTES
from toto.model.budget.baselines import BaselineConfig
from toto.model.budget.memory import (
    MOMENTS,
    Checkpointing,
    Memory,
    Moment,
    StepShape,
    autocast_copies,
    code_logits,
    fullest,
    loss_workspace,
)
from toto.model.budget.parameters import parameter_table


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What a block takes.

    Attributes:
        kept: bytes that stay until its backward pass.
        backward: bytes that there are beside those in its backward pass, at most; what it makes again included.
        cast: numbers of its weights that autocast copies.
    """

    kept: int
    backward: int
    cast: int


def memory_is_known(config: BaselineConfig) -> bool:
    """Whether all memory of a step can be told; what transformers' own scan keeps depends on its kernels."""
    return isinstance(config, GPT2Config) or config.scan == "chunked"


def baseline_memory(config: BaselineConfig, shape: StepShape) -> Memory:
    """Bytes on one rank at the fullest moment of a step.

    Where that isn't known (`memory_is_known`), the least: weights, moments, and all gradients.
    """
    if not memory_is_known(config):
        gradients = 4 * parameter_table(config)["total"] // shape.shards
        least = {"gradients": gradients, "copies": 0, "activations": 0, "logits": 0, "workspace": 0}
        return fullest(config, shape, {"end": least})
    block = _gpt2_block(config, shape) if isinstance(config, GPT2Config) else _mamba_block(config, shape)
    return fullest(config, shape, {moment: _at(moment, config, shape, block) for moment in MOMENTS})


def _at(moment: Moment, config: BaselineConfig, shape: StepShape, block: _Block) -> dict[str, int]:
    """Bytes by category at one moment, without what is always held."""
    table = parameter_table(config)
    head = config.vocabulary * config.width
    weights = (table["total"] - table["embedding"] - table["output"]) // config.layers  # of a block
    new: dict[Moment, int] = {
        "loss": head,
        "last block": head,
        "first block": head + (config.layers - 1) * weights,
        "end": table["total"],
    }
    outside = shape.batch * shape.positions * _outside_saved(config)
    made: dict[Moment, tuple[int, int, int]] = {  # activations, logits, workspace
        "loss": (config.layers * block.kept + outside, code_logits(config, shape), loss_workspace(config, shape, 4)),
        "last block": (config.layers * block.kept, 0, block.backward),
        "first block": (block.kept, 0, block.backward),
        "end": (0, 0, 0),
    }
    activations, logits, workspace = made[moment]
    copies = autocast_copies(shape, moment, layers=config.layers, block=block.cast, head=head)
    return {
        "gradients": 4 * (table["total"] if shape.accumulates else new[moment]) // shape.shards,
        "copies": copies + _gathered(config, shape, weights, new[moment]),
        "activations": activations,
        "logits": logits,
        "workspace": workspace + _to_be_added(moment, config, shape),
    }


def _to_be_added(moment: Moment, config: BaselineConfig, shape: StepShape) -> int:
    """Bytes of gradients of the embedding and the output layer beside what they are added to.

    A tied output layer's waits for the embedding's, which comes last.
    """
    to_earlier_passes = shape.accumulates and (config.tie_embeddings or moment in ("loss", "end"))
    to_each_other = config.tie_embeddings and moment == "end"
    return 4 * config.vocabulary * config.width * (to_earlier_passes + to_each_other)


def _outside_saved(config: BaselineConfig) -> int:
    """Bytes a position beside the blocks': ids, and of the last norm its input, what else it keeps, and its result."""
    D = config.width
    norm = 4 * D + 2 * 4 if isinstance(config, GPT2Config) else 2 * 4 * D + 4
    return 3 * 8 + norm + 4 * D


def _gathered(config: BaselineConfig, shape: StepShape, weights: int, new: int) -> int:
    """Bytes of sharded weights that are whole at a time, in fp32, and of their gradients.

    Those outside of the blocks, and two blocks' of which one has its gradient twice: as it is made and as it is sent.
    Of a model that doesn't call its blocks, all weights, with the gradients there are.

    Args:
        config: the architecture.
        shape: of the step.
        weights: of a block.
        new: gradients that this pass has made so far.
    """
    if shape.shards == 1:
        return 0
    total = parameter_table(config)["total"]
    if isinstance(config, MambaConfig):
        return 4 * (total + 2 * new)
    return 4 * (total - config.layers * weights + 2 * weights + 2 * weights)


def _gpt2_block(config: GPT2Config, shape: StepShape) -> _Block:
    """GPT-2's: attention and the MLP, a norm before each."""
    D, M, E, tokens = config.width, config.mlp_hidden, 2 if shape.bf16 else 4, shape.batch * shape.positions
    P = 4 if shape.fused_norm else E  # a GPU's autocast takes powers, and what is made of them, in fp32
    norms = 2 * (4 * D + 2 * 4 + E * D)  # input, mean and deviation, result
    attention = E * (3 * D + D) + 4 * config.heads  # queries, keys and values as one; the result; logarithms of sums
    gelu = 3 * P * M + 2 * E * M  # its input, tanh and 1 + tanh; half of the input, and the result
    whole = tokens * (norms + attention + gelu)
    kept: dict[Checkpointing, int] = {
        "none": whole,
        "selective": tokens * (4 * D + attention + E * (D + M + D)),
        "full": tokens * 4 * D,
    }
    for_nothing = tokens * E * D if shape.checkpointing == "selective" else 0  # the last product's result
    copy = 2 * D * M if shape.bf16 else 0  # of the last weight, which goes as its gradient comes
    factors = tokens * (
        3 * P * M - E * M
    )  # gradients of the GELU's result and of what it is a product of; itself is gone
    inside = tokens * 4 * D + 4 * D * M + max(0, factors - copy)
    return _Block(
        kept=kept[shape.checkpointing],
        backward=whole - kept[shape.checkpointing] + for_nothing + inside,
        cast=4 * D * D + 2 * D * M,
    )


def _mamba_block(config: MambaConfig, shape: StepShape) -> _Block:
    """Mamba's: a norm, projections, convolution, steps, scan and gate."""
    D, C, G, R = config.width, config.channels, config.state_size, config.step_rank
    E, B, S, bf16 = 2 if shape.bf16 else 4, shape.batch, shape.positions, int(shape.bf16)
    tokens, chunk = B * S, B * min(S, CHUNK)
    norm = 2 * 4 * D + 4 + E * D  # input, divided, by what, result
    convolution = 2 * E * C + E * C + 4 * C + E * C + bf16 * 4 * C  # with the gate; input, sum, result, again in fp32
    steps = E * (R + 2 * G) + bf16 * 4 * G + 2 * 4 * C  # with B, again in fp32; before and after the softplus
    gate = 4 * C + 2 * E * C  # what it is put on, itself, result
    states = 4 * C + (2 * 4 + bf16 * 2) * C * G + E * G  # input times step; decay, state, and for a product it and C
    between = B * -(-S // CHUNK) * 4 * C * G  # states before chunks
    before = B * (config.conv_kernel - 1) * E * C  # what the convolution sees before the first position
    always = tokens * (norm + convolution + steps + gate) + before + between + 2 * 4 * C * G  # A and its exponential
    again = 4 * tokens * C * G > KEPT_BYTES
    gating = tokens * (4 * C * (3 + bf16) - E * C)  # gradients of its result and factors; the result is gone
    scan = chunk * C * G * (3 * 4 - bf16 * 2) - tokens * (E * C + 4 * C)  # a chunk's gradients; more is gone elsewhere
    if again:  # at the first chunk, as gradients of the others lie
        scan += chunk * states + tokens * 2 * 4 * (C + G) - between
    return _Block(
        kept=always + tokens * (bf16 * 4 * G if again else states),
        backward=tokens * 4 * D + (4 - bf16 * 2) * D * C + max(gating, scan),
        cast=C * (3 * D + 2 * R + 2 * G),
    )
