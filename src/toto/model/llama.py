"""Our decoder under Llama's names: its configuration, its weights, and both back again.

The only place that knows these names. Queries, keys and values lie behind each other in one matrix of ours, gate and up
in another; Llama has one matrix for each. Everything else is the same, so logits are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from toto.model.config import ModelConfig
from toto.model.parametrisation import parametrisation
from toto.model.transformer import Transformer
from toto.runtime.errors import CheckpointError, ConfigError

MODEL_TYPE: Final = "llama"
PAD, VIDEO_START, END, IMAGE_START = 0, 1, 2, 3  # ids of a sequence; a code follows at code + 4
ENDS: Final = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
IN_BLOCK: Final = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
SIZES: Final = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_hidden": "intermediate_size",
}
ROPE_BASE, NORM_EPS, INIT_STD = 10_000.0, 1e-6, 0.02  # what a Llama has whose configuration doesn't say
BUFFERS: Final = "rotary_emb.inv_freq"  # stored by old versions of transformers, which read them no more


def llama_config(config: ModelConfig, *, context: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `config.json` of a `LlamaForCausalLM` says for our architecture; transformers 4 and 5 both read it.

    Args:
        config: ours.
        context: positions in a sequence.
        dtype: of the stored weights.

    Raises:
        ConfigError: it is not a Llama.
    """
    _require_llama(config)
    stored = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": _tied(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pad_token_id": PAD,
        "bos_token_id": VIDEO_START,
        "eos_token_id": END,
        "dtype": stored,
        "torch_dtype": stored,
    }


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """A model's weights by Llama's names; most share their memory with ours, and a tied output layer is left out.

    What a parametrisation multiplies scores and outputs by goes into the weights, since Llama knows no such factors.

    Raises:
        ConfigError: it is not a Llama.
    """
    config = model.config
    _require_llama(config)
    state = model.state_dict()
    rules = parametrisation(config)
    queries = rules.attention_scale(config) / (1 / math.sqrt(config.head_size))
    outputs = rules.output_multiplier(config)
    weights: dict[str, Tensor] = {}
    for ours, theirs in llama_names(config).items():
        pieces = state[ours].chunk(len(theirs))
        for name, piece in zip(theirs, pieces, strict=True):
            factor = queries if name.endswith("q_proj.weight") else outputs if ours == "head.weight" else 1.0
            weights[name] = piece if factor == 1 else piece * factor
    return weights


def weights_of_llama(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights with Llama's names and shapes by ours; takes them out of `weights`, so nothing lies in memory twice."""
    found: dict[str, Tensor] = {}
    for ours, theirs in llama_names(config).items():
        pieces = [weights.pop(name) for name in theirs]
        found[ours] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return found


def llama_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our weights' names, and for each the names of the Llama weights that lie behind each other in it."""
    ends = {ours: theirs for ours, theirs in ENDS.items() if ours != "head" or not _tied(config)}
    names: dict[str, tuple[str, ...]] = {f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in ends.items()}
    for layer in range(config.layers):
        for ours, parts in IN_BLOCK.items():
            names[f"blocks.{layer}.{ours}.weight"] = tuple(f"model.layers.{layer}.{part}.weight" for part in parts)
    return names


def config_of_llama(plain: Mapping[str, Any], *, where: object) -> ModelConfig:
    """Our architecture for a Llama's `config.json`, always with the standard parametrisation.

    Raises:
        CheckpointError: it is another kind of model, or a Llama with a part that ours has not got; it is named.
    """

    def refuse(what: str, fix: str = "use a plain Llama") -> NoReturn:
        raise CheckpointError(what, where=where, fix=fix)

    def number(name: str, usual: float | None = None) -> float:
        value = plain.get(name, usual)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            refuse(f"{name} is {value!r}" if name in plain else f"{name} is missing", "use a whole folder")
        return value

    if plain.get("model_type") != MODEL_TYPE:
        refuse(f"holds a model of type {plain.get('model_type')!r}, not {MODEL_TYPE!r}")
    for name, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if plain.get(name, only) != only:
            refuse(f"{name} is {plain[name]!r}, toto's decoder has {only!r}")
    if plain.get("quantization_config") is not None:
        refuse("its weights are quantised", "use the weights they were made from")
    sizes = {ours: number(theirs) for ours, theirs in SIZES.items()}
    if broken := [SIZES[ours] for ours, value in sizes.items() if value != int(value)]:
        refuse(f"{broken[0]} is {plain[broken[0]]}", "use a whole folder")
    heads, width = int(sizes["heads"]), int(sizes["width"])
    if plain.get("num_key_value_heads") not in (None, heads):
        refuse(f"{plain['num_key_value_heads']} heads of keys for {heads} of queries, toto's decoder has as many")
    if plain.get("head_dim") not in (None, width / heads):
        refuse(f"head_dim is {plain['head_dim']}, toto's decoder has width / heads = {width / heads:g}")
    try:
        return ModelConfig(
            vocab_size=int(sizes["vocab_size"]),
            width=width,
            layers=int(sizes["layers"]),
            heads=heads,
            mlp_hidden=int(sizes["mlp_hidden"]),
            rope_base=_rope_base(plain, refuse),
            norm_eps=float(number("rms_norm_eps", NORM_EPS)),
            init_std=float(number("initializer_range", INIT_STD)),
            tie_embeddings=bool(plain.get("tie_word_embeddings", False)),
        )
    except ConfigError as error:
        refuse(f"impossible architecture ({error})", "use a whole folder")


def without_buffers(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Drop what carries nothing: stored rotary frequencies, and a tied output layer that is the embedding again."""
    kept = {name: weight for name, weight in weights.items() if not name.endswith(BUFFERS)}
    output, embedding = (kept.get(f"{ENDS[part]}.weight") for part in ("head", "embedding"))
    if _tied(config) and output is not None and embedding is not None and output.equal(embedding):
        del kept[f"{ENDS['head']}.weight"]
    return kept


def _rope_base(plain: Mapping[str, Any], refuse: Callable[..., NoReturn]) -> float:
    """The base of plain rotary positions, from the fields of transformers 5 or 4."""
    bases: list[Any] = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = plain.get(name) or {}
        if not isinstance(rope, dict):
            refuse(f"{name} is {rope!r}", "use a whole folder")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            refuse(f"its rotary positions are scaled ({kind}), toto's decoder has plain ones")
        if rope.get("partial_rotary_factor", 1) != 1:
            refuse(f"it turns {rope['partial_rotary_factor']} of each head only, toto's decoder turns the whole")
        bases.append(rope.get("rope_theta"))
    bases = [base for base in (*bases, plain.get("rope_theta")) if base is not None]
    if any(isinstance(base, bool) or not isinstance(base, int | float) for base in bases) or len(set(bases)) > 1:
        refuse(f"rope_theta is {' and '.join(map(repr, bases))}", "use a whole folder")
    return float(bases[0]) if bases else ROPE_BASE


def _tied(config: ModelConfig) -> bool:
    """Whether the output layer is the embedding in Llama, too: a factor between them parts the two."""
    return config.tie_embeddings and parametrisation(config).output_multiplier(config) == 1


def _require_llama(config: ModelConfig) -> None:
    if not config.causal:
        raise ConfigError("a model with full attention is no Llama", where="--to hf", fix="export it with --to toto")
    if config.inputs != "tokens" or config.targets != "codes":
        raise ConfigError(
            f"a model that takes {config.inputs} and predicts {config.targets} is no Llama",
            where="--to hf",
            fix="export it with --to toto",
        )
