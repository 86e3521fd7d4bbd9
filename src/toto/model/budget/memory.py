"""Memory of a training step on one rank, from the structure alone.

It follows what autograd keeps of `toto.model.layers` until the backward pass: fp32 master weights with AdamW's two
moments; matrix products and attention in the compute precision (bf16 under autocast, or fp32), the residual stream in
fp32. A step takes the most either at the loss, where all activations lie, the logits of some rows, and the gradients
that the loss makes at once; or at one of the moments after it, while activations go and gradients come. The fullest
moment is given.

Symbols: E bytes of a number in the compute precision, 4 those of fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from toto.model.blockwise import most_scores
from toto.model.budget.parameters import parameter_table
from toto.model.config import BackboneConfig, ModelConfig
from toto.model.fused import ROWS_OF_A_CAST

Checkpointing = Literal["none", "selective", "full"]
Moment = Literal["loss", "last block", "first block", "end"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
LOGIT_ROWS = {"cpu": 1024, "gpu": 4096}  # as in `toto.training.fused_loss`
SOFTMAX_ROWS = 64
CATEGORIES = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "workspace")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step.

    Attributes:
        weights: fp32 master weights.
        gradients: those that exist at that moment.
        optimizer: AdamW's moments.
        copies: weights in bf16 for matrix products; of sharded ones, what is gathered at a time.
        activations: what the backward pass still needs.
        logits: those that exist at a time; of patches, their errors.
        workspace: what the loss, or the backward pass of a block, makes on the way.
        moment: when: at the loss, or as gradients pass the last or the first block, or all lie.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    logits: int
    workspace: int
    moment: Moment

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_category().values())

    def by_category(self) -> dict[str, int]:
        """Bytes by category, in the order of `CATEGORIES`."""
        return {name: getattr(self, name) for name in CATEGORIES}


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How a rank runs a step.

    Attributes:
        batch: B, sequences in one forward pass.
        positions: S, what the model is given of each.
        bf16: matrix products and attention in bfloat16.
        accumulates: gradients of an earlier forward pass are kept while another one runs.
        shards: ranks among which weights, gradients and moments are divided; 1 keeps all of them on each.
        checkpointing: what of a block is kept. "none": everything. "selective": its input and the results of matrix
            products and attention. "full": its input. The rest is computed again in the backward pass.
        fused_norm: kernels are those of GPUs. Attention in bf16 on a processor keeps queries, keys and values once;
            a GPU's keeps them before and after they are turned.
    """

    batch: int
    positions: int
    bf16: bool
    accumulates: bool = False
    shards: int = 1
    checkpointing: Checkpointing = "none"
    fused_norm: bool = False


def training_memory(config: ModelConfig, shape: StepShape) -> Memory:
    """Bytes on one rank at the fullest moment of a step."""
    return fullest(config, shape, {moment: _at(moment, config, shape) for moment in MOMENTS})


def fullest(config: BackboneConfig, shape: StepShape, moments: Mapping[Moment, Mapping[str, int]]) -> Memory:
    """The fullest of some moments, each given by what there is beside weights and optimizer's moments."""
    weights = parameter_table(config)["total"]
    held = {"weights": 4 * weights // shape.shards, "optimizer": 8 * weights // shape.shards}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(moment=moment, **held, **moments[moment])


def code_logits(config: BackboneConfig, shape: StepShape) -> int:
    """Bytes of the logits that exist at a time, where codes are predicted."""
    return (2 if shape.bf16 else 4) * _rows(shape) * config.vocabulary


def loss_workspace(config: BackboneConfig, shape: StepShape, hidden: int) -> int:
    """Bytes of the gradient of the hidden states, and of what some rows give to it and to the weight's.

    Args:
        config: of a model that predicts codes.
        shape: of the step.
        hidden: bytes of a number of the hidden states.
    """
    E, D, V = 2 if shape.bf16 else 4, config.width, config.vocabulary
    of_hidden, of_weight = E * D * _rows(shape), (2 + 4 if shape.bf16 else 4) * V * D
    cast = E * D * _rows(shape) if hidden != E else 0
    return hidden * D * shape.batch * shape.positions + cast + max(of_hidden, of_weight, 8 * SOFTMAX_ROWS * V)


def autocast_copies(shape: StepShape, moment: Moment, *, layers: int, block: int, head: int) -> int:
    """Bytes of bf16 copies of weights, of which a block has `block`, where autocast makes them.

    It keeps them until the forward pass is over; autograd until their product's gradient is there, or, where blocks
    are computed again, for one block at a time.
    """
    if not shape.bf16 or moment == "end":
        return 0
    if moment == "loss":
        return 2 * (layers * block + head)
    return 2 * block * (1 if moment == "first block" or shape.checkpointing != "none" else layers)


def _at(moment: Moment, config: ModelConfig, shape: StepShape) -> dict[str, int]:
    """Bytes by category at one moment, without what is always held."""
    table, tokens, codes = parameter_table(config), shape.batch * shape.positions, config.targets == "codes"
    E = 2 if shape.bf16 else 4
    block = (table["attention"] + table["mlp"]) // config.layers
    head = config.outputs * config.width
    embedding = table["total"] - block * config.layers - (0 if config.tie_embeddings else head)
    kept = _block_saved(config, shape, shape.checkpointing)
    inside = (
        _block_saved(config, shape, "none")
        - kept
        + max(_swiglu_backward(config, shape), _attention_backward(config, shape))
    )
    angles = 2 * 4 * config.head_size * shape.positions
    through = config.layers * kept + tokens * _outside_saved(config, shape) + angles
    new: dict[Moment, int] = {
        "loss": head if codes else 0,
        "last block": head,
        "first block": table["total"] - block - embedding,
    }
    gradients = table["total"] if shape.accumulates else new.get(moment, table["total"])
    again = 4 * head if shape.accumulates and codes else 0  # of the output layer, beside what it is added to
    made: dict[Moment, tuple[int, int, int]] = {  # activations, logits, workspace
        "loss": (through, _logits(config, shape), again + (loss_workspace(config, shape, E) if codes else 0)),
        "last block": (config.layers * kept + angles, 0, inside),
        "first block": (kept + angles, 0, inside),
        "end": (0, 0, 4 * embedding if shape.accumulates else 0),
    }
    activations, logits, workspace = made[moment]
    return {
        "gradients": 4 * gradients // shape.shards,
        "copies": _copies(config, shape, moment, block, head),
        "activations": activations,
        "logits": logits,
        "workspace": workspace,
    }


def _logits(config: ModelConfig, shape: StepShape) -> int:
    """Bytes of the logits that exist at a time; predicted pixels, their squared errors and gradients all do."""
    if config.targets == "pixels":
        return 16 * config.outputs * shape.batch * shape.positions
    return code_logits(config, shape)


def _rows(shape: StepShape) -> int:
    """How many rows of logits a product makes."""
    tokens = shape.batch * shape.positions
    return -(-tokens // -(-tokens // LOGIT_ROWS["gpu" if shape.fused_norm else "cpu"]))


def _block_saved(config: ModelConfig, shape: StepShape, checkpointing: Checkpointing) -> int:
    """Bytes of a block's input and what else is kept of it, weights' copies aside."""
    D, M, N, K = config.width, config.mlp_hidden, config.heads, config.head_size
    E = 2 if shape.bf16 else 4
    tokens = shape.batch * shape.positions
    residual, statistic, logsumexp = 4 * D, 4, 4 * N
    blockwise = shape.bf16 and not shape.fused_norm
    if checkpointing == "full":
        return tokens * residual
    if checkpointing == "selective":
        turned = E * 3 * D if blockwise else logsumexp
        return tokens * (residual + E * (3 * D + D + D + 2 * M + D) + turned)
    norm = residual + statistic + (E * D if shape.fused_norm else 0)  # a processor makes its result again
    norms = 2 * norm if shape.fused_norm else 2 * norm - residual + E * D  # of the second, the branch that was added
    mlp = E * (2 * M + (M if shape.fused_norm else 0))  # gate and up as one; silu(gate) * up, likewise
    if blockwise:
        return tokens * (norms + E * (3 * D + D) + mlp)  # q and k turned, and v; the result
    attention = E * (3 * D + 2 * D + D) + logsumexp  # q, k, v as one; q and k turned; the result
    turned_again = 4 * K * 2 * shape.positions + tokens * E * D if shape.bf16 else 0  # angles, and the result, in bf16
    gpu = tokens * E * M if shape.fused_norm else 0  # silu(gate)
    return tokens * (norms + attention + mlp) + turned_again + gpu


def _outside_saved(config: ModelConfig, shape: StepShape) -> int:
    """Bytes a position of what is kept before the first block and after the last one."""
    D, E = config.width, 2 if shape.bf16 else 4
    ids = 3 * 8  # as input, as target, and the batch they are views of
    patches = 4 * config.values_in_patch if config.inputs == "patches" else 0
    seen = E * config.values_in_patch if config.inputs == "patches" and shape.bf16 else 0
    return ids + patches + seen + 4 * D + 4 + E * D


def _copies(config: ModelConfig, shape: StepShape, moment: Moment, block: int, head: int) -> int:
    """Bytes of weights as matrix products take them.

    Matrices are copied to bf16. A processor keeps a copy until its product's gradient is there, which a GPU's autocast
    does for longer; most of them it casts again where they have many rows. Sharded weights are gathered: the outer
    ones, and two blocks at a time, of which one has its gradient, in the compute precision and in fp32.
    """
    E = 2 if shape.bf16 else 4
    if shape.shards > 1:
        outer = head + (0 if config.tie_embeddings else config.embedded_ids * config.width)
        return E * outer + (2 * E + E + 4) * block
    by_autocast = autocast_copies(shape, moment, layers=config.layers, block=block, head=head)
    if shape.fused_norm or not shape.bf16:
        return by_autocast
    if shape.accumulates:  # one copy of each for all passes of a step
        return 2 * (config.layers * block + (head if moment == "loss" else 0))
    if shape.checkpointing == "none" and shape.batch * shape.positions >= ROWS_OF_A_CAST and moment != "end":
        now = head if moment == "loss" else config.width * config.mlp_hidden
        return 2 * (now + (1 if moment == "first block" else config.layers) * config.width**2)
    return 2 * head if moment == "loss" and shape.checkpointing != "none" else by_autocast


def _swiglu_backward(config: ModelConfig, shape: StepShape) -> int:
    """Bytes of what the backward pass of a block's SwiGLU and its product makes on its way, at most.

    Gradients of the residual stream and of gate and up, what these make, and the gradient of the matrix as a product
    gives it and in fp32.
    """
    E = 2 if shape.bf16 else 4
    D, M = config.width, config.mlp_hidden
    a_token = 4 * D + (E * D if shape.bf16 else 0) + 3 * E * M
    return shape.batch * shape.positions * a_token + (2 + 4 if shape.bf16 else 4) * D * M


def _attention_backward(config: ModelConfig, shape: StepShape) -> int:
    """Bytes of what the backward pass of attention in blocks makes, less what was kept of the MLP and is gone by then.

    Gradients of the residual stream, the result, and queries, keys and values, before and after they are turned back;
    scores of some queries, their gradient, and that of what was before the softmax.
    """
    D, M, E = config.width, config.mlp_hidden, 2
    if not shape.bf16 or shape.fused_norm:
        return 0
    a_token = 4 * D + E * (D + 3 * D + 3 * D) - E * D - 4 - 2 * E * M
    scores = most_scores(shape.batch * config.heads, shape.positions)
    return shape.batch * shape.positions * a_token + 3 * E * scores
