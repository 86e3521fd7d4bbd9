"""The extra that holds the baselines' blocks."""

from __future__ import annotations

import importlib
from typing import Any

from toto.runtime.errors import ConfigError


def modeling(name: str) -> Any:
    """The module of `transformers` that holds an architecture, for example "gpt2".

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"needs {(error.name or 'transformers').partition('.')[0]}, which isn't installed",
            where=f"a {name} model",
            fix="pip install 'toto-video[baselines]'",
        ) from None
