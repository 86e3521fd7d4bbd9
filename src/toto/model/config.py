"""What every architecture says of itself, that of a Toto model, and the named sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from toto.runtime.errors import ConfigError

MlpRule = Literal["labels", "llama"]
SPECIAL_IDS = 4  # ids 0 .. 3 of a sequence are pad, video start, end, image start; visual ones follow


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What is asked of any architecture; abstract. Without further word it sees ids and predicts codes.

    Attributes:
        vocab_size: ids a sequence may hold, special ids included; None takes it from the training data.
        width: D.
        layers: how many blocks.
        tie_embeddings: whether the output layer shares the embedding's weights.
    """

    vocab_size: int | None = None
    width: int
    layers: int
    tie_embeddings: bool = False

    @property
    def kind(self) -> str:
        """The architecture's name in `config.json`."""
        raise NotImplementedError

    @property
    def inputs(self) -> Literal["tokens", "patches"]:
        """What it sees at visual positions."""
        return "tokens"

    @property
    def targets(self) -> Literal["codes", "pixels"]:
        """What it predicts."""
        return "codes"

    @property
    def patch_values(self) -> int | None:
        """P; None where it sees no patches."""
        return None

    @property
    def causal(self) -> bool:
        """Whether a position sees none after it, as one must that predicts the next."""
        return True

    @property
    def vocabulary(self) -> int:
        """`vocab_size`, which must be known by now."""
        if self.vocab_size is None:
            raise ConfigError("is not set yet", where="model.vocab_size", fix="give the tokenizer's vocabulary + 4")
        return self.vocab_size

    @property
    def values_in_patch(self) -> int:
        """`patch_values`, which must be known by now."""
        if self.patch_values is None:
            raise ConfigError("is not set yet", where="model.patch_values", fix="give the patch side squared x 3")
        return self.patch_values

    def require_positive(self, *names: str) -> None:
        """Refuse fields below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"model.{name}")


Config = TypeVar("Config", bound=BackboneConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BackboneConfig):
    """A LLaMA-style causal transformer (paper, section 3.2).

    Attributes:
        vocab_size: ids a sequence may hold, special ids included; None takes it from the training data.
        width: D.
        layers: how many blocks.
        heads: N; the head size K is width / heads.
        mlp_hidden: hidden width of SwiGLU. Not published; see `size`.
        rope_base: base of the rotary position angles (paper: 10,000; 50,000 when fine-tuned at 32 x 32 tokens).
        norm_eps: epsilon of RMSNorm. Not published.
        tie_embeddings: whether the output layer shares the embedding's weights. Not published.
        init_std: standard deviation of the initial weights; those that write into the residual stream get
            init_std / sqrt(2 x layers). Not published.
        parametrisation: how widths scale the initialisation, learning rates, attention and the output; see
            `toto.model.parametrisation`.
        inputs: what the model sees at visual positions: the tokens' ids, or the patches of pixels they were made from.
        targets: what it predicts: the next code, or the next patch, normalised (patch inputs only).
        patch_values: P, numbers in a patch (side x side x 3); None takes it from the training data.
        attention: whether a position sees those up to it, or all of them. All is for classifiers that were fine-tuned
            so; such a model predicts nothing.
    """

    heads: int
    mlp_hidden: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    parametrisation: Literal["standard"] = "standard"
    inputs: Literal["tokens", "patches"] = "tokens"
    targets: Literal["codes", "pixels"] = "codes"
    patch_values: int | None = None
    attention: Literal["causal", "full"] = "causal"

    def __post_init__(self) -> None:
        self.require_positive("width", "layers", "heads", "mlp_hidden")
        if self.width % self.heads or self.head_size % 2:
            raise ConfigError(
                f"width {self.width} doesn't give {self.heads} heads of an even size",
                where="model.heads",
                fix="change one",
            )
        if not 1 < self.rope_base < math.inf:
            raise ConfigError(f"must be above 1, is {self.rope_base}", where="model.rope_base")
        if self.inputs == "patches":
            if self.tie_embeddings:
                raise ConfigError(
                    "patch inputs have no embedding to share", where="model.tie_embeddings", fix="leave it out"
                )
            if self.patch_values is not None and self.patch_values < 1:
                raise ConfigError(f"must be at least 1, is {self.patch_values}", where="model.patch_values")
        elif self.targets == "pixels":
            raise ConfigError(
                "pixels are predicted from patches alone", where="model.targets", fix="set model.inputs to patches"
            )
        elif self.patch_values is not None:
            raise ConfigError("token inputs have no patches", where="model.patch_values", fix="leave it out")

    @property
    def kind(self) -> str:
        """The architecture's name in `config.json`."""
        return "toto"

    @property
    def causal(self) -> bool:
        """Whether a position sees none after it."""
        return self.attention == "causal"

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def embedded_ids(self) -> int:
        """How many ids have an embedding: with patch inputs, the special ones alone."""
        return SPECIAL_IDS if self.inputs == "patches" else self.vocabulary

    @property
    def outputs(self) -> int:
        """How many numbers the output layer gives at a position."""
        return self.values_in_patch if self.targets == "pixels" else self.vocabulary


SHAPES = {
    "nano": (128, 4, 4),
    "tiny": (256, 6, 4),
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 16, 16),
    "1b": (2048, 22, 16),
    "a1": (256, 12, 16),
    "a2": (512, 16, 16),
    "a3": (768, 20, 16),
    "a4": (1024, 24, 16),
    "a5": (1536, 28, 16),
    "a6": (1792, 32, 16),
}
LABEL_HIDDEN = {"base": 3072, "large": 4096, "1b": 5632}
LLAMA_HIDDEN = {"base": 2048, "large": 2816, "1b": 5632}
SCALING = ("a1", "a2", "a3", "a4", "a5", "a6")
MLP_NOTE = "the MLP width isn't published: {hidden:,} is what gives the parameters the paper's label says"
OTHER_MLP_NOTE = "the MLP width isn't published: {hidden:,} is not the one whose parameters the paper's label says"
SCALING_NOTE = (
    "{name} is reconstructed: the paper's Table 15 isn't at hand; width, depth and MLP fit the first points of five of"
    " its compute curves within 1 %"
)
GUESS_NOTE = "{name} is a guess: it lies between its neighbours, and no published figure fixes it"


def size(name: str, *, vocab_size: int | None = None, mlp: MlpRule = "labels") -> ModelConfig:
    """A model of a named size.

    base, large and 1b are the paper's (Table 1). It does not publish their MLP widths: "labels" takes those that give
    the sizes its labels say (120m, 280m, 1.1b), 3072, 4096, 5632; "llama" takes LLaMA's rule, 8/3 of the width rounded
    up to 256: 2048, 2816, 5632.

    nano, tiny and small are for laptops: 8/3 of the width, rounded up to 64.

    a1 to a6 are those of its scaling study (Table 15), reconstructed: of the shapes whose width and depth grow by
    steps, these give the compute that its curves begin with. 8/3 of the width, to the nearest multiple of 8. a5 is a
    guess.

    Raises:
        ConfigError: no such size.
    """
    if name not in SHAPES:
        raise ConfigError(f"unknown size {name!r}", where="model", fix=f"known sizes: {', '.join(SHAPES)}")
    width, layers, heads = SHAPES[name]
    ratio = round(width / 3) * 8 if name in SCALING else -(-8 * width // 3 // 64) * 64
    hidden = (LABEL_HIDDEN if mlp == "labels" else LLAMA_HIDDEN).get(name, ratio)
    return ModelConfig(vocab_size=vocab_size, width=width, layers=layers, heads=heads, mlp_hidden=hidden)


def note_on(config: ModelConfig) -> str | None:
    """What a reader should know about a model of a published size: which of its numbers are reconstructed."""
    shape = (config.width, config.layers, config.heads)
    for name in SHAPES:
        if SHAPES[name] == shape and name in SCALING:
            return (GUESS_NOTE if name == "a5" else SCALING_NOTE).format(name=name)
        if SHAPES[name] == shape and name in LABEL_HIDDEN:
            note = MLP_NOTE if config.mlp_hidden == LABEL_HIDDEN[name] else OTHER_MLP_NOTE
            return note.format(hidden=config.mlp_hidden)
    return None


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """The configuration for this vocabulary; one that names another vocabulary is refused."""
    if config.vocab_size not in (None, vocab_size):
        raise ConfigError(
            f"is {config.vocab_size}, the data needs {vocab_size}",
            where="model.vocab_size",
            fix="leave it out",
        )
    return replace(config, vocab_size=vocab_size)


def with_patch_values(config: ModelConfig, patch_values: int) -> ModelConfig:
    """The configuration for patches of this many numbers; one that names another is refused."""
    if config.patch_values not in (None, patch_values):
        raise ConfigError(
            f"is {config.patch_values}, the data has patches of {patch_values}",
            where="model.patch_values",
            fix="leave it out",
        )
    return replace(config, patch_values=patch_values)
