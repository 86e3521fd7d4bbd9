"""The architectures of Table 6 beside Toto's: GPT-2 with sin-cos positions, and Mamba."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from toto.model.config import BackboneConfig
from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GPT2Config(BackboneConfig):
    """GPT-2 with absolute sin-cos positions, which aren't learnt; no dropout.

    Attributes:
        tie_embeddings: whether the output layer shares the embedding's weights.
        heads: N; the head size K is width / heads.
        mlp_hidden: hidden width of the MLP; GPT-2 has 4 x width.
        position_scale: what the positions' sines and cosines are multiplied by before they are added. Not published;
            1 drowns embeddings that begin with a deviation of 0.02.
        norm_eps: epsilon of LayerNorm.
        init_std: standard deviation of the initial weights; those that write into the residual stream get
            init_std / sqrt(2 x layers).
    """

    kind: str = field(default="gpt2", init=False)
    tie_embeddings: bool = True
    heads: int
    mlp_hidden: int
    position_scale: float = 0.02
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self.require_positive("width", "layers", "heads", "mlp_hidden")
        if self.width % self.heads or self.width % 2:
            raise ConfigError(
                f"width {self.width} must be even, and divisible by {self.heads} heads",
                where="model.heads",
                fix="change one",
            )

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class MambaConfig(BackboneConfig):
    """Mamba (arXiv 2312.00752): blocks of a causal convolution and a selective state space, no attention.

    Attributes:
        tie_embeddings: whether the output layer shares the embedding's weights.
        state_size: numbers in the state of each channel.
        conv_kernel: positions that the convolution sees, the present one included.
        expand: channels of a block as a multiple of the width.
        scan: how the states of a sequence are computed. "chunked": in plain torch, a chunk of positions at a time.
            "transformers": by its function, which is a fast kernel on GPUs where `mamba_ssm` is installed, and very
            slow without. Results are the same within rounding.
        norm_eps: epsilon of RMSNorm.
        init_std: standard deviation of the initial embedding; all else begins as in state-spaces/mamba.
    """

    kind: str = field(default="mamba", init=False)
    tie_embeddings: bool = True
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    scan: Literal["chunked", "transformers"] = "chunked"
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self.require_positive("width", "layers", "state_size", "conv_kernel", "expand")

    @property
    def channels(self) -> int:
        """E, channels of a block."""
        return self.expand * self.width

    @property
    def step_rank(self) -> int:
        """Rank of the matrix that gives the step sizes."""
        return math.ceil(self.width / 16)

    @property
    def calls_blocks(self) -> bool:
        """Whether the model calls its blocks; our own scan takes the blocks' parts."""
        return self.scan == "transformers"
