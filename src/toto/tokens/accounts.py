"""What becomes of the inputs of a store where only some of it can be used: one kind, enough frames, one split."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from toto.media.decode import Kind
from toto.media.ledger import in_order_of_severity
from toto.runtime.errors import ConfigError
from toto.tokens.shards import TokenStore, read_splits

VIEW = r"#\d+$"  # what the id of a further view ends with


def count_inputs(store: TokenStore, kind: Kind, *, least: int, split: str | None = None) -> dict[str, int]:
    """How many inputs of a store have each status, for a reader of items of one kind with at least so many frames.

    Views of an input count once. Inputs of the other kind or of another split are skipped, those with fewer frames are
    short, and those that became no item stay what the store's ledger says (of which split they were is not known).
    """
    _, inputs = np.unique(_input_ids(store), return_inverse=True)
    wanted = store.is_kind(kind)
    if split is not None:
        wanted = wanted & is_split(store, split)
    fits = np.unique(inputs[wanted & (store.column("frame_count") >= least)])
    of_kind = np.unique(inputs[wanted])
    every = int(inputs.max()) + 1 if len(inputs) else 0
    counts = dict(store.manifest["ledger"])
    counts["ok"] = len(fits)
    counts["short"] = counts.get("short", 0) + len(of_kind) - len(fits)
    counts["skipped"] = counts.get("skipped", 0) + every - len(of_kind)
    return in_order_of_severity(counts)


def rows_of_inputs(store: TokenStore) -> npt.NDArray[np.int64]:
    """Which input each item is a view of, `[items]`; inputs are numbered in the order of the table."""
    _, first, inputs = np.unique(_input_ids(store), return_index=True, return_inverse=True)
    numbered: npt.NDArray[np.int64] = np.argsort(np.argsort(first))[inputs]
    return numbered


def is_split(store: TokenStore, split: str) -> npt.NDArray[np.bool_]:
    """Which items are of a split.

    Raises:
        ConfigError: none is.
    """
    splits = read_splits(store.folder)
    known = sorted({name for name in splits.values() if name is not None})
    if split not in known:
        fix = f"splits with items here: {', '.join(known) or 'none'}"
        raise ConfigError(f"no item of split {split!r}", where=store.folder, fix=fix)
    return np.array([splits.get(str(name)) == split for name in store.table.column("id").to_pylist()])


def _input_ids(store: TokenStore) -> npt.NDArray[np.object_]:
    found: npt.NDArray[np.object_] = pc.replace_substring_regex(
        store.table.column("id"), pattern=VIEW, replacement=""
    ).to_numpy()
    return found
