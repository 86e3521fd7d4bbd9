"""Toto: learning from videos by predicting the next visual token (arXiv 2501.05453).

The few names most programs need are here; everything else is imported from its room, for example
`from toto.training.loop import train`. Importing this package imports neither torch nor a codec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toto.runtime.errors import TotoError
from toto.runtime.version import __version__

if TYPE_CHECKING:
    from toto.model.weights import load_model
    from toto.tokens.tokenizer import load_tokenizer

__all__ = ["TotoError", "__version__", "load_model", "load_tokenizer"]

_HOMES = {"load_model": "toto.model.weights", "load_tokenizer": "toto.tokens.tokenizer"}


def __getattr__(name: str) -> Any:
    """Import the names that need torch when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'toto' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
