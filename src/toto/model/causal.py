"""The one contract of all backbones: ids in; predictions, and the hidden states on the way, out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.model.cache import Cache
from toto.model.config import BackboneConfig
from toto.model.parametrisation import WeightRule
from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a forward pass returns.

    Attributes:
        logits: `[B, S, V]`; of a model with pixel targets the predicted normalised patches, `[B, S, P]`.
        hidden_states: layer -> `[B, S, D]` for the asked layers; 0 is the embedding's output, l the residual stream
            after block l, before the final norm.
        cache: the given cache with these positions added; None where none was given.
    """

    logits: Float[Tensor, "B S V"]
    hidden_states: dict[int, Tensor]
    cache: Cache | None = None


class CausalModel(nn.Module, ABC):
    """A model that predicts what comes next: embedding, blocks with a residual stream, final norm, output layer.

    Training, likelihoods, read-outs and generation ask for nothing else.

    Attributes:
        config: the architecture.
        embedding: of ids.
        blocks: in their order.
        norm: of what the last block gives.
        head: the output layer; may share the embedding's weights.
    """

    config: BackboneConfig
    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config

    @abstractmethod
    def trunk(
        self,
        tokens: Int64[Tensor, "B S"],
        *,
        patches: Float[Tensor, "B N P"] | None = None,
        layers: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B S D"], dict[int, Tensor], Cache | None]:
        """Like `forward` without the final norm and the output layer; returns the last residual stream first."""

    @abstractmethod
    def new_cache(self, batch: int, room: int, dtype: torch.dtype = torch.float32) -> Cache:
        """An empty cache for this model, on its device."""

    @abstractmethod
    def weight_rules(self) -> dict[str, WeightRule]:
        """How the steps of each weight are scaled, by its name."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew."""

    @property
    def calls_blocks(self) -> bool:
        """Whether the trunk calls its blocks; one that reaches into them can't have them wrapped one by one."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(
        self,
        tokens: Int64[Tensor, "B S"],
        *,
        patches: Float[Tensor, "B N P"] | None = None,
        layers: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token, or its predicted patch, at every position.

        Args:
            tokens: ids `[B, S]`; with a cache, only those after what it holds.
            patches: for a model with patch inputs, the patches of all visual positions among `tokens`, whose ids are
                not looked at.
            layers: which hidden states to return, 0 .. number of blocks.
            cache: what was seen before; it is continued.

        Raises:
            ConfigError: a layer the model has not got, a cache without room, patches that don't fit, or a model whose
                positions see later ones.
        """
        self.require_causal()
        x, states, cache = self.trunk(tokens, patches=patches, layers=layers, cache=cache)
        return Output(logits=self.head(self.norm(x)), hidden_states=states, cache=cache)

    def require_causal(self) -> None:
        """Refuse to predict where positions see later ones."""
        if not self.config.causal:
            raise ConfigError(
                "was fine-tuned with full attention, so it predicts nothing",
                where="model",
                fix="use `toto predict`, or a model that was not",
            )

    def wanted(self, layers: Sequence[int]) -> set[int]:
        """The asked layers; those the model has not got are refused."""
        wanted = set(layers)
        if not wanted <= set(range(len(self.blocks) + 1)):
            raise ConfigError(f"layers {sorted(wanted)} asked, the model has 0 to {len(self.blocks)}", where="layers")
        return wanted


def refuse_patches(patches: Tensor | None) -> None:
    """Refuse patches where a model takes ids."""
    if patches is not None:
        raise ConfigError("the model's inputs are tokens", where="patches", fix="leave them out")


def draw_by_rules(model: CausalModel, generator: torch.Generator | None) -> None:
    """Draw each weight from the normal distribution that its rule gives."""
    rules = model.weight_rules()
    for name, weight in model.named_parameters():
        if rules[name].std:
            nn.init.normal_(weight, rules[name].mean, rules[name].std, generator=generator)
        else:
            nn.init.constant_(weight, rules[name].mean)
