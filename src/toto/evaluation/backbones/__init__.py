"""Every backbone that evaluation reads, and how one is opened by name."""

from toto.evaluation.backbones.names import load_backbone

__all__ = ["load_backbone"]
