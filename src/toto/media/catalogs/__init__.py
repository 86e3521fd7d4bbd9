"""Catalogs of data as its users have it: folder trees, manifests that name clips, and containers that hold them."""

from toto.media.catalogs.sources import KINDS, open_source, recognise, takes_clips, takes_column

__all__ = ["KINDS", "open_source", "recognise", "takes_clips", "takes_column"]
