"""How a model is laid over the processes of a job, what of a block is kept for the backward pass, and compiling.

One mechanism, FSDP2 (`fully_shard`), for all layouts, on a mesh of `copies x shards` processes: fsdp is 1 x all, hsdp
hosts x processes of a host, ddp all x 1. Blocks are gathered one by one, everything outside them together. Weights and
moments are fp32; under bf16 a block's weights are gathered in bf16, gradients are added up in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from toto.model.budget.memory import Checkpointing
from toto.model.causal import CausalModel
from toto.model.fused import weights_cast_once
from toto.model.transformer import Transformer
from toto.runtime.errors import ConfigError
from toto.runtime.ranks import Ranks
from toto.training.objective import next_token_loss

Strategy = Literal["ddp", "fsdp", "hsdp"]
aten = torch.ops.aten
KEPT = [  # what the selective way keeps: products and attention
    torch.ops.toto.blockwise_attention.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is laid over the processes that `torchrun` starts, and what a step costs each.

    It changes no result beyond rounding, so a run may be continued with another.

    Attributes:
        strategy: ddp keeps all weights in each process; fsdp divides them among all; hsdp among those of a host.
        checkpointing: what of a block is kept for the backward pass: everything (none), its input and the results of
            matrix products and attention (selective), or its input (full). The rest is computed again.
        compile: compile each block with torch.compile, which takes minutes at the beginning.
        timeout: seconds after which a process that hears nothing of another one gives up.
    """

    strategy: Strategy = "ddp"
    checkpointing: Checkpointing = "none"
    compile: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ConfigError(f"must be positive, is {self.timeout}", where="--parallel.timeout")


class Learner(nn.Module):
    """A model with its objective, which is what a step calls: sharded weights are whole within the call alone."""

    def __init__(self, model: CausalModel):
        super().__init__()
        self.model = model

    def forward(
        self, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean loss, to be differentiated, and the loss of every prediction `[B, N]`, which isn't."""
        loss = next_token_loss(self.model, sequences, patches)
        return loss.mean, loss.each


def laid_out(
    model: CausalModel, config: ParallelConfig, ranks: Ranks, *, device: torch.device, bf16: bool
) -> nn.Module:
    """The model, on its device, with its objective, laid over the processes of the job; its blocks are changed.

    Raises:
        ConfigError: processes that can't be arranged so.
    """
    if not model.calls_blocks and (config.checkpointing != "none" or config.compile):
        raise blocks_stay_as_they_are(model.config.kind)
    for block in model.blocks:
        forward: Callable[..., Any] = block.forward
        if config.checkpointing != "none":
            forward = _recomputed(forward, selective=config.checkpointing == "selective")
        if config.compile:
            forward = torch.compile(forward, dynamic=False)
        block.forward = forward
    learner = Learner(model)
    if ranks.world == 1:
        return learner
    mesh = _mesh(config.strategy, ranks, device)
    gathered_in_bf16 = bf16 and isinstance(model, Transformer)  # the baselines' blocks are transformers' own
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if gathered_in_bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks if model.calls_blocks else ():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.strategy != "ddp")
    fully_shard(learner, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return learner


def blocks_stay_as_they_are(kind: str) -> ConfigError:
    """What to say where blocks were to be wrapped of a model that doesn't call them."""
    return ConfigError(
        f"blocks of a {kind} model with its own scan can't be wrapped",
        where="--parallel.checkpointing and --parallel.compile",
        fix="leave them out, or use --model.scan transformers",
    )


def last_of_step(learner: nn.Module, last: bool) -> None:
    """Copies of the weights exchange gradients after the last part of a batch only; shards after each."""
    if isinstance(learner, FSDPModule):
        learner.set_requires_all_reduce(last)


def unchanged_weights(learner: nn.Module, passes: int) -> contextlib.AbstractContextManager[None]:
    """No weight changes within: several passes share copies for matrix products, unless weights are gathered."""
    gathered = isinstance(learner, FSDPModule)
    return weights_cast_once() if passes > 1 and not gathered else contextlib.nullcontext()


@contextlib.contextmanager
def whole_weights(learner: nn.Module) -> Iterator[None]:
    """Within the block, the weights outside of the blocks are whole, as evaluation needs them; blocks gather theirs."""
    if not isinstance(learner, FSDPModule):
        yield
        return
    learner.unshard()
    try:
        yield
    finally:
        for module in learner.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _mesh(strategy: Strategy, ranks: Ranks, device: torch.device) -> DeviceMesh:
    """Copies x shards; a single dimension where there is one copy."""
    if strategy == "fsdp":
        return init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shards",))
    shards = ranks.on_host if strategy == "hsdp" else 1
    if ranks.world % shards:
        raise ConfigError(
            f"{ranks.world} processes are not whole hosts of {shards}",
            where="--parallel.strategy hsdp",
            fix="start as many on each host, or use fsdp",
        )
    return init_device_mesh(device.type, (ranks.world // shards, shards), mesh_dim_names=("copies", "shards"))


def _recomputed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """A block's forward that keeps less, and computes the rest again in the backward pass."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)

    def forward_again(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, **options, **named)

    return forward_again
