"""The version of this installation."""

from __future__ import annotations

import importlib.metadata

__version__ = importlib.metadata.version("toto-video")
