"""The sample that ships inside the package: scenes of a film, and photographs, split into train and held-out.

Whole scenes are in one split, so no shot is shared. What they are and whose: `sample/ATTRIBUTION.md`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
FRAME_RATE = 24


def sample_folder() -> Path:
    """The folder of the sample, with `scenes/` and `photographs/` below it."""
    return Path(str(resources.files("toto.media"))) / "sample"


def scenes(split: Split) -> list[Path]:
    """The film's scene clips of a split, in the film's order: 128 pixels high, 24 frames a second."""
    return sorted((sample_folder() / "scenes" / split).glob("*.mp4"))


def photographs(split: Split) -> list[Path]:
    """The photographs of a split, by name."""
    return sorted((sample_folder() / "photographs" / split).glob("*.jpg"))
