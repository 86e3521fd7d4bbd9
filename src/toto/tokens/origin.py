"""Where the items of a store came from, for whoever reads them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toto.media.catalog import Catalog, Item, size_of
from toto.media.catalogs import open_source
from toto.media.catalogs.sources import recognise
from toto.runtime.errors import ConfigError
from toto.runtime.places import as_path
from toto.runtime.provenance import as_plain
from toto.tokens.shards import ONLINE
from toto.tokens.tokenizer import EMBEDDED

CHOSEN = ("split", "image_column", "label_column")  # of a source, which a job names where they aren't the usual ones


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source as a job names it, with what its catalog held then.

    Attributes:
        source: KIND:PATH, whatever folder somebody stands in.
        clips: the folder that holds what a manifest names.
        split: the one that was used.
        tokenizer: its name or folder.
        image_column: the column with the bytes, where it was named.
        label_column: the column with the labels, where it was named.
        catalog_sha256: of what the source offered; None before that is known.
    """

    source: str
    clips: str | None
    split: str | None
    tokenizer: str
    image_column: str | None = None
    label_column: str | None = None
    catalog_sha256: str | None = None

    @staticmethod
    def named(source: str, *, clips: Any, split: str | None, tokenizer: str) -> Origin:
        """The origin of a job, with names that hold everywhere on this machine."""
        found = recognise(source)
        return Origin(
            source=f"{found.kind}:{_absolute(found.path)}",
            clips=None if clips is None else _absolute(clips),
            split=split,
            tokenizer=tokenizer if tokenizer == EMBEDDED else str(Path(tokenizer).absolute()),
        )

    @staticmethod
    def of_job(job: Mapping[str, Any]) -> Origin:
        """The origin that a store's job names."""
        chosen: dict[str, Any] = {name: job.get(name) for name in CHOSEN}
        return Origin(**job[ONLINE], **chosen, catalog_sha256=job["catalog_sha256"])

    def for_job(self) -> dict[str, Any]:
        """What the job says of it beside what was chosen of it and the catalog."""
        return {"source": self.source, "clips": self.clips, "tokenizer": self.tokenizer}

    def catalog(self, *, where: Any) -> Catalog:
        """What the source offers, which is what it offered then.

        Raises:
            ConfigError: it is gone, or has changed.
        """
        catalog = open_source(
            self.source,
            clips=None if self.clips is None else as_path(self.clips),
            split=self.split,
            image_column=self.image_column,
            label_column=self.label_column,
        )
        if digest(catalog) != self.catalog_sha256:
            raise ConfigError(
                f"was made of other files than {self.source} holds now",
                where=where,
                fix="make it again with `toto tokenize --online`",
            )
        return catalog


def digest(catalog: Catalog) -> str:
    """The SHA-256 of what the catalog offers: names, sizes, and what a manifest or a container says of them."""
    if catalog.classes is None:
        files: list[Any] = [[item.id, item.kind, _size_or_missing(item)] for item in catalog.items]
        said: list[Any] = [files, [row.id for row in catalog.skipped]]
    else:
        files = [[item.id, item.kind, item.size, item.label, item.split, as_plain(item.part)] for item in catalog.items]
        said = [files, [[row.id, row.reason] for row in catalog.skipped], catalog.classes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _size_or_missing(item: Item) -> int:
    size = size_of(item.path)
    return -1 if size is None else size


def _absolute(path: Any) -> str:
    return str(path.absolute()) if isinstance(path, Path) else str(path)
