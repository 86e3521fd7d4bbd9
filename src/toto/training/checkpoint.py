"""Checkpoints of a run: `checkpoints/step-NNNNNNNN`, each written aside and renamed.

Beside the model for inference (`config.json`, `model.safetensors`) lies `trainer/`, written by
torch.distributed.checkpoint: weights and optimizer state, from which training goes on bit for bit. `checksums.json`
names the SHA-256 of every file; a run never goes on from a checkpoint that has another.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from toto.model.causal import CausalModel
from toto.model.weights import Card, checkpoints, load_card, save_model
from toto.runtime.errors import CheckpointError, StoreError
from toto.runtime.files import folder_written_aside, read_json, sha256_of, write_json
from toto.runtime.progress import say

TRAINER, CHECKSUMS = "trainer", "checksums.json"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}


def save_checkpoint(
    run: Path,
    model: CausalModel,
    optimizer: torch.optim.Optimizer,
    card: Card,
    *,
    step: int,
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Save after `step` finished steps, then delete checkpoints that are not to be kept.

    Args:
        run: the run's folder.
        model: to be saved.
        optimizer: likewise.
        card: what the model was trained on.
        step: finished steps.
        keep: this many stay, the newest ones.
        keep_every: so do those of every so many steps; 0 for none.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    if not folder.exists():
        with folder_written_aside(folder) as aside:
            save_model(aside, model, card)
            with _quiet():
                save(_state(model, optimizer), checkpoint_id=str(aside / TRAINER), no_dist=True)
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            write_json(aside / CHECKSUMS, {path.relative_to(aside).as_posix(): sha256_of(path) for path in files})
    for old in checkpoints(run)[:-keep]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)
    return folder


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files are those that were saved; None where it has none at all.

    Damaged ones are named, loudly, and renamed, so that nobody uses them: `step-...` becomes `damaged-step-...`.

    Raises:
        CheckpointError: all are damaged.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            require_whole(folder)
        except CheckpointError as error:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(f"DAMAGED CHECKPOINT, NOT USED: {error}; it is {aside.name} now")
        else:
            if folder != found[-1]:
                say(f"going on from the one before: {folder}")
            return folder
    if found:
        raise CheckpointError("every checkpoint is damaged", where=run, fix="begin anew with another --out")
    return None


def require_whole(folder: Path) -> None:
    """Compare every file of a checkpoint with its checksum; those of before checksums were written pass.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not (folder / CHECKSUMS).exists() and (folder / TRAINER).exists():
        return
    try:
        known = read_json(folder / CHECKSUMS, what="table of checksums")
    except StoreError as error:
        raise CheckpointError(error.what, where=folder / CHECKSUMS, fix="restore it") from None
    if not isinstance(known, dict):
        raise CheckpointError("is no table of checksums", where=folder / CHECKSUMS, fix="restore it")
    odd = [
        name for name, sha256 in known.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha256
    ]
    if odd:
        raise CheckpointError(f"damaged or missing: {', '.join(odd)}", where=folder, fix="restore it")


def restore_checkpoint(folder: Path, model: CausalModel, optimizer: torch.optim.Optimizer) -> Card:
    """Load weights and optimizer state in place; returns the checkpoint's card.

    Raises:
        CheckpointError: it is damaged, or of another architecture.
    """
    _fill_state(optimizer)
    state = _state(model, optimizer)
    try:
        with _quiet():
            load(state, storage_reader=_SafeReader(str(folder / TRAINER)), no_dist=True)
    except (
        CheckpointException,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"trainer state can't be read ({reason})",
            where=folder,
            fix="delete this checkpoint to use the one before it",
        ) from None
    return load_card(folder)


def _state(model: CausalModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors that training goes on from, by name; loading fills them in place."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    moments = {names[id(weight)]: dict(values) for weight, values in optimizer.state.items()}
    return {"model": dict(model.named_parameters()), "optimizer": moments}


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its moments, as one step with a zero gradient and rate would."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class _SafeReader(FileSystemReader):
    """Reads metadata through an allow-list: torch's own reader would execute any pickle it finds there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's table of tensors."""
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata: Metadata = _AllowListUnpickler(io.BytesIO(content)).load()
        described = metadata.storage_meta or StorageMeta()
        described.load_id, metadata.storage_meta = self.load_id, described
        return metadata


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only the classes that describe tensors."""
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}, which is not allowed")
        return super().find_class(module, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notice that there is one process only, which is so on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        yield
