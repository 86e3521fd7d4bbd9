"""Every architecture by its name: its configuration, and the model that is made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.causal import CausalModel
from toto.model.config import BackboneConfig, ModelConfig
from toto.runtime.errors import ConfigError

OURS: Final = "toto"
CONFIGS: Final[dict[str, type[BackboneConfig]]] = {OURS: ModelConfig, "gpt2": GPT2Config, "mamba": MambaConfig}


def build(config: BackboneConfig) -> CausalModel:
    """A new model of this architecture.

    Raises:
        ConfigError: it needs an extra that is not installed.
    """
    if isinstance(config, GPT2Config):
        from toto.model.baselines.gpt2 import GPT2

        return GPT2(config)
    if isinstance(config, MambaConfig):
        from toto.model.baselines.mamba import Mamba

        return Mamba(config)
    from toto.model.transformer import Transformer

    assert isinstance(config, ModelConfig)
    return Transformer(config)


def described(config: BackboneConfig) -> dict[str, Any]:
    """The architecture as JSON holds it."""
    return {"kind": config.kind} | dataclasses.asdict(config)


def config_class(plain: Mapping[str, Any]) -> type[BackboneConfig]:
    """Which configuration a stored architecture is of; one without a name is Toto's.

    Raises:
        ConfigError: nobody knows its name.
    """
    kind = plain.get("kind", OURS)
    if kind not in CONFIGS:
        raise ConfigError(f"unknown architecture {kind!r}", where="kind", fix=f"known ones: {', '.join(CONFIGS)}")
    return CONFIGS[kind]


def config_of(plain: Mapping[str, Any]) -> BackboneConfig:
    """The configuration that `described` gave.

    Raises:
        ConfigError: nobody knows its name, or its values are impossible.
        TypeError: fields are missing or surplus.
    """
    return config_class(plain)(**{name: value for name, value in plain.items() if name != "kind"})
