"""Checkpoints of fine-tuning: the classifier, and beside it the optimizer's moments as plain tensors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from toto.evaluation.classifier import Classifier, ClassifierCard, save_classifier
from toto.media.ledger import LedgerRow
from toto.model.weights import Card, checkpoints
from toto.runtime.errors import CheckpointError
from toto.runtime.files import folder_written_aside, read_json, remove_leftovers, sha256_of, write_json
from toto.training.checkpoint import CHECKSUMS, newest_whole_checkpoint

MOMENTS_FILE, STATE_FILE = "trainer.safetensors", "trainer.json"
KEEP = 2


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands: its finished steps, and the training items that could not be read."""

    step: int
    failed: list[LedgerRow]


def newest_state(out: Path) -> Path | None:
    """The newest whole checkpoint of a run; leftovers of a killed one are removed."""
    remove_leftovers(out)
    remove_leftovers(out / "checkpoints")
    return newest_whole_checkpoint(out)


def save_checkpoint(
    out: Path,
    step: int,
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    card: ClassifierCard,
    known: Card,
    *,
    failed: list[LedgerRow],
) -> Path:
    """Write `checkpoints/step-NNNNNNNN` aside and rename it; the newest two stay."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    if not folder.exists():
        with folder_written_aside(folder) as aside:
            save_classifier(aside, classifier, card, known)
            save_file(_moments(classifier, optimizer), aside / MOMENTS_FILE)
            write_json(aside / STATE_FILE, {"step": step, "failed": [vars(row) for row in failed]})
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            write_json(aside / CHECKSUMS, {path.name: sha256_of(path) for path in files})
        for old in checkpoints(out)[:-KEEP]:
            shutil.rmtree(old)
    return folder


def write_aside(folder: Path, classifier: Classifier, card: ClassifierCard, known: Card) -> None:
    """Write a classifier's folder as a whole, in place of one that may be there."""
    shutil.rmtree(folder, ignore_errors=True)
    with folder_written_aside(folder) as aside:
        save_classifier(aside, classifier, card, known)


def read_state(folder: Path, classifier: Classifier, optimizer: torch.optim.Optimizer) -> State:
    """Give the optimizer its moments; returns where the run stands.

    Raises:
        CheckpointError: the moments are missing or of other weights.
    """
    plain = read_json(folder / STATE_FILE, what="state of the run")
    try:
        stored = load_file(folder / MOMENTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"moments can't be read ({error})", where=folder, fix="delete this checkpoint") from None
    names = _names(classifier)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if f"{names[weight]}:step" not in stored:
                continue
            kept = {key: stored[f"{names[weight]}:{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if kept["exp_avg"].shape != weight.shape:
                raise CheckpointError("moments are of other weights", where=folder, fix="delete this checkpoint")
            optimizer.state[weight] = {key: value.to(weight.device) for key, value in kept.items()}
    return State(step=int(plain["step"]), failed=[LedgerRow(**row) for row in plain["failed"]])


def _moments(classifier: Classifier, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _names(classifier)
    return {
        f"{names[weight]}:{key}": value.detach().cpu().contiguous()
        for weight, values in optimizer.state.items()
        for key, value in values.items()
    }


def _names(classifier: Classifier) -> dict[Tensor, str]:
    return {weight: name for name, weight in classifier.named_parameters()}
