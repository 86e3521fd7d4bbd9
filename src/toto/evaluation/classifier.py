"""A classifier: a decoder with a head on each layer that is read, as fine-tuning makes it and `toto predict` uses it.

On disk it is a checkpoint (`config.json`, `model.safetensors`), which every verb takes as one, with two files beside:
`classifier.json` (classes, protocol, which layer speaks) and `heads.safetensors`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toto.evaluation.heads import AttentionHead, AverageHead
from toto.evaluation.views import ViewConfig
from toto.model.causal import CausalModel
from toto.model.weights import Card, checkpoint_folder, load_card, load_model, save_model, weights_sha256
from toto.runtime.errors import CheckpointError, ConfigError, StoreError
from toto.runtime.files import read_json, sha256_of, write_json
from toto.runtime.provenance import as_plain
from toto.runtime.ranks import summed
from toto.tokens.sequence import Modality

CARD_FILE, HEADS_FILE = "classifier.json", "heads.safetensors"
FORMAT, VERSION = "toto-classifier", 1
EPSILON = 1e-6  # AIM's


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What reads a layer.

    Attributes:
        pool: "attention" (a learned query attends over the tokens) or "average".
        classifier: "linear", or "mlp" with one hidden layer, its width `mlp_ratio` x the features' (Table 16).
        heads: of attention pooling; must divide the features' width.
        mlp_ratio: see `classifier`. Not published.
    """

    pool: Literal["attention", "average"] = "attention"
    classifier: Literal["linear", "mlp"] = "linear"
    heads: int = 4
    mlp_ratio: float = 1.0


class SharedBatchNorm(nn.BatchNorm1d):
    """A batch norm without parameters, whose batch is that of all processes of the job where `shared` is set."""

    shared = False

    def forward(self, rows: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """Standardised rows; in training the running moments move towards the batch's."""
        if not (self.training and self.shared):
            return super().forward(rows)
        count = float(summed(torch.tensor(float(len(rows)), device=rows.device)))
        mean = summed(rows.sum(dim=0)) / count
        centred = rows - mean
        variance = summed(centred.square().sum(dim=0)) / count
        with torch.no_grad():
            assert self.momentum is not None  # as torch has it by itself
            self.get_buffer("running_mean").lerp_(mean, self.momentum)
            self.get_buffer("running_var").lerp_(variance * (count / max(1.0, count - 1)), self.momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        out: Tensor = centred * (variance + self.eps).rsqrt()
        return out


class ClassifierHead(nn.Module):
    """Tokens, normalised over the batch without parameters as AIM's; pooled; classified."""

    def __init__(self, width: int, classes: int, config: HeadConfig):
        super().__init__()
        self.norm = SharedBatchNorm(width, eps=EPSILON, affine=False)
        attends = config.pool == "attention"
        self.pool = AttentionHead(width, classes, config.heads) if attends else AverageHead(width, classes)
        if config.classifier == "mlp":
            hidden = max(1, round(width * config.mlp_ratio))
            mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))
            self.pool.linear = mlp  # type: ignore[assignment]

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits, in fp32."""
        with torch.autocast(tokens.device.type, enabled=False):
            normal = self.norm(tokens.float().flatten(0, 1)).view(tokens.shape)
            out: Tensor = self.pool(normal)
        return out


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a pass over some items gives.

    Attributes:
        logits: layer -> `[B, classes]`.
        last: the residual stream after the last block, `[B, S, D]`.
    """

    logits: dict[int, Tensor]
    last: Float[Tensor, "B S D"]


class Classifier(nn.Module):
    """A decoder, and a head for each of some layers.

    Args:
        backbone: whose hidden states are read.
        layers: 0 is the embedding's output.
        classes: how many.
        head: the form of every head.
        joined: let the heads' gradients into the backbone; else their features are cut off from it.
    """

    def __init__(
        self, backbone: CausalModel, layers: tuple[int, ...], classes: int, head: HeadConfig, *, joined: bool = False
    ):
        super().__init__()
        backbone.wanted(layers)
        self.backbone, self.layers, self.joined = backbone, layers, joined
        self.heads = nn.ModuleDict(
            {str(layer): ClassifierHead(backbone.config.width, classes, head) for layer in layers}
        )

    def forward(self, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None = None) -> Seen:
        """Read sequences (`toto.tokens.sequence.pack`); heads see visual positions alone, and no end."""
        last, states, _ = self.backbone.trunk(sequences[:, :-1], patches=patches, layers=self.layers)
        logits = {}
        for layer in self.layers:
            tokens = states[layer][:, 1:]
            logits[layer] = self.heads[str(layer)](tokens if self.joined else tokens.detach())
        return Seen(logits=logits, last=last)


@dataclass(frozen=True, kw_only=True)
class ClassifierCard:
    """What is known about a classifier beside its weights.

    Attributes:
        classes: the classes' names; a label is an index into them.
        modality: of what it was trained on.
        mode: "probes" or "full", see `toto.evaluation.finetune_config`.
        head: the form of its heads.
        layers: that have one.
        layer: the one that speaks: the best on a held-back slice of the training items; None before the first look.
        validation: accuracy there, by layer.
        views: what it is tested with.
    """

    classes: tuple[str, ...]
    modality: Modality
    mode: str
    head: HeadConfig
    layers: tuple[int, ...]
    layer: int | None
    validation: dict[int, float]
    views: ViewConfig

    @property
    def speaker(self) -> int:
        """The layer that speaks; the last one where none was chosen."""
        return self.layers[-1] if self.layer is None else self.layer


def save_classifier(folder: Path, classifier: Classifier, card: ClassifierCard, known: Card) -> None:
    """Write a classifier into a folder that exists; the caller makes the folder atomic."""
    save_model(folder, classifier.backbone, known)
    weights = {name: value.detach().cpu().contiguous() for name, value in classifier.heads.state_dict().items()}
    save_file(weights, folder / HEADS_FILE)
    plain = as_plain(card) | {"validation": {str(layer): value for layer, value in card.validation.items()}}
    write_json(folder / CARD_FILE, {"format": FORMAT, "version": VERSION, **plain})


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A classifier from disk, in evaluation mode."""

    classifier: Classifier
    card: ClassifierCard
    known: Card
    folder: Path


def load_classifier(name: str | Path, *, device: str | torch.device = "cpu") -> Loaded:
    """Load a classifier from its folder, or from a run of `toto finetune`.

    Raises:
        CheckpointError: nothing there, a checkpoint without heads, or heads that don't fit.
    """
    folder = Path(name) / "classifier" if (Path(name) / "classifier" / CARD_FILE).exists() else checkpoint_folder(name)
    card = _read_card(folder)
    backbone = load_model(folder, device=device)
    try:
        classifier = Classifier(backbone, card.layers, len(card.classes), card.head, joined=True).to(device)
        classifier.heads.load_state_dict(load_file(folder / HEADS_FILE, device=str(device)))
    except (ConfigError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"heads don't fit ({reason})", where=folder / HEADS_FILE, fix="use a whole folder"
        ) from None
    return Loaded(classifier=classifier.eval(), card=card, known=load_card(folder), folder=folder)


def classifier_sha256(folder: Path) -> str:
    """SHA-256 of the hexadecimal SHA-256 of the backbone's weights and of the heads' file, one after the other."""
    return hashlib.sha256((weights_sha256(folder) + sha256_of(folder / HEADS_FILE)).encode()).hexdigest()


def _read_card(folder: Path) -> ClassifierCard:
    path = folder / CARD_FILE
    if not path.exists():
        raise CheckpointError("knows no classes", where=folder, fix="make a classifier by `toto finetune`")
    try:
        plain: Any = read_json(path, what="classifier's card")
        if (plain.pop("format"), plain.pop("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"not a {FORMAT} of version {VERSION}", where=path, fix="check the path")
        return ClassifierCard(
            **plain
            | {
                "classes": tuple(plain["classes"]),
                "layers": tuple(plain["layers"]),
                "head": HeadConfig(**plain["head"]),
                "views": ViewConfig(**plain["views"]),
                "validation": {int(layer): value for layer, value in plain["validation"].items()},
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError, StoreError, ConfigError) as error:
        raise CheckpointError(f"damaged classifier's card ({error})", where=path, fix="use a whole folder") from None
