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
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from toto.model.causal import CausalModel
from toto.model.config import BackboneConfig
from toto.model.weights import Card, checkpoints, load_card, save_weights
from toto.runtime.errors import CheckpointError, StoreError
from toto.runtime.files import folder_written_aside, read_json, sha256_of, write_json, writing
from toto.runtime.progress import say
from toto.runtime.ranks import Ranks

TRAINER, CHECKSUMS = "trainer", "checksums.json"
LAST_WAIT = 5.0  # seconds
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


class Saver:
    """Saves checkpoints of a run beside training: what is to be saved is copied at once, and written by a thread.

    Args:
        run: the run's folder.
        ranks: the processes of the job; each writes its own part.
        keep: this many checkpoints stay, the newest ones.
        keep_every: so do those of every so many steps; 0 for none.
        background: go on training while a checkpoint is written, for a copy of weights and moments in memory; without,
            `save` returns when it lies there.
        last: the step whose checkpoint lies there already.
    """

    def __init__(
        self,
        run: Path,
        *,
        ranks: Ranks | None = None,
        keep: int = 1,
        keep_every: int = 0,
        background: bool = True,
        last: int | None = None,
    ):
        self._run, self._ranks, self._background = run, ranks or Ranks(), background
        self._keep, self._keep_every = keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last = last

    def save(self, model: CausalModel, optimizer: torch.optim.Optimizer, card: Card, *, step: int) -> None:
        """Save after `step` finished steps; what is being saved is finished first, and nothing is saved twice."""
        if step == self._last:
            return
        self.wait()
        weights = self._whole_weights(model) if self._ranks.world > 1 else None
        state = _state(model, optimizer)
        if self._background:
            state = _copied(state)
        if weights is None:
            weights = state["model"]
        self._last = step
        write = partial(self._write, state, weights, model.config, card, step)
        if not self._background:
            write()
            return
        self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong while a checkpoint was being written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until what is being saved lies there.

        Raises:
            StorageError: it can't be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Let what is being saved be finished, whatever comes of it; of several processes, as far as others answer."""
        if self._thread is not None:
            self._thread.join(None if self._ranks.world == 1 else LAST_WAIT)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def _write(
        self, state: dict[str, Any], weights: dict[str, Tensor], config: BackboneConfig, card: Card, step: int
    ) -> None:
        """Write a checkpoint aside, rename it, and delete those that are not to be kept."""
        folder, together = self._run / "checkpoints" / f"step-{step:08d}", self._ranks.beside
        with folder_written_aside(folder) if self._ranks.first else contextlib.nullcontext() as opened:
            told: list[Any] = [opened]
            if together is not None:
                dist.broadcast_object_list(told, src=0, group=together)
            aside = told[0]
            with writing(folder), _quiet():
                save(state, checkpoint_id=str(aside / TRAINER), process_group=together, no_dist=together is None)
            mine = _hashes(aside, sorted((aside / TRAINER).glob(f"__{self._ranks.rank}_*")))
            hashes = [mine] * self._ranks.world  # as many places as processes
            if together is not None:
                dist.gather_object(mine, hashes if self._ranks.first else None, dst=0, group=together)
            if self._ranks.first:
                save_weights(aside, weights, config, card)
                known = {name: sha256 for part in hashes for name, sha256 in part.items()}
                others = [path for path in aside.rglob("*") if path.is_file() and _name(aside, path) not in known]
                write_json(aside / CHECKSUMS, dict(sorted((_hashes(aside, others) | known).items())))
        if self._ranks.first:
            self._delete_old()
        if together is not None:
            dist.barrier(group=together)  # it lies there when anybody says so

    def _whole_weights(self, model: CausalModel) -> dict[str, Tensor]:
        """A copy of the weights that processes share among them, in the first one; all of them call this."""
        whole: dict[str, Tensor] = {}
        for name, weight in model.named_parameters():
            gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if self._ranks.first:
                whole[name] = gathered.detach().to("cpu", copy=True)  # one that isn't divided would go on changing
        return whole

    def _delete_old(self) -> None:
        for old in checkpoints(self._run)[: -self._keep]:
            if not self._keep_every or int(old.name.removeprefix("step-")) % self._keep_every:
                shutil.rmtree(old)


def _hashes(folder: Path, files: list[Path]) -> dict[str, str]:
    return {_name(folder, path): sha256_of(path) for path in files}


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in the host's memory of all tensors of this process."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    try:
        copied = stager.stage(state)
    finally:
        stager.close()
    assert isinstance(copied, dict)
    return copied


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


def restore_checkpoint(
    folder: Path, model: CausalModel, optimizer: torch.optim.Optimizer, *, ranks: Ranks | None = None
) -> Card:
    """Load weights and optimizer state in place; returns the checkpoint's card.

    Any number of processes reads what any other number has written.

    Raises:
        CheckpointError: it is damaged, or of another architecture.
    """
    _fill_state(optimizer)
    state = _state(model, optimizer)
    try:
        with _quiet():
            alone = ranks is None or ranks.world == 1
            load(state, storage_reader=_SafeReader(str(folder / TRAINER)), no_dist=alone)
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
