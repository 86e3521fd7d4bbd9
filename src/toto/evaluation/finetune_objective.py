"""What fine-tuning minimises, and at which rates: losses of a batch, and AdamW's groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toto.evaluation.classifier import Classifier
from toto.evaluation.finetune_config import FinetuneConfig
from toto.tokens.patches import normalised
from toto.training.objective import code_loss


def layer_factor(name: str, layers: int, decay: float) -> float:
    """The rate of a backbone's weight as a multiple of the last block's: decay^(L - l) in block l of L.

    What comes before the blocks counts as block 0, what comes after as block L.

    >>> layer_factor("blocks.1.mlp.down.weight", 3, 0.5)
    0.5
    """
    if name.startswith("blocks."):
        return decay ** (layers - 1 - int(name.split(".")[1]))
    return decay**layers if name.startswith(("embedding.", "patch_embedding.")) else 1.0


def make_groups(classifier: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the backbone's weights by layer and decay, then the heads'; `rate` multiplies the schedule's."""
    backbone = classifier.backbone
    rules, weight_decay = backbone.weight_rules(), config.optimizer.weight_decay
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in backbone.named_parameters():
        if weight.requires_grad:
            rate = rules[name].rate * layer_factor(name, len(backbone.blocks), config.layer_decay)
            groups.setdefault((rate, rules[name].decay * weight_decay), []).append(weight)
    for weight in classifier.heads.parameters():
        groups.setdefault((config.head_rate, weight_decay if weight.ndim >= 2 else 0.0), []).append(weight)
    return [{"params": weights, "rate": rate, "weight_decay": wd} for (rate, wd), weights in groups.items()]


def losses(
    classifier: Classifier, config: FinetuneConfig, sequences: Tensor, patches: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Next-token loss (0 where it has no weight) and the sum of the heads' cross-entropies, of some items."""
    seen = classifier(sequences, patches)
    entropies = [
        F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing) for logits in seen.logits.values()
    ]
    entropy = torch.stack(entropies).sum()
    if config.mode == "full" or config.next_token_weight == 0:
        return torch.zeros((), device=entropy.device), entropy
    backbone = classifier.backbone
    if backbone.config.targets == "pixels":
        assert patches is not None
        predicted = backbone.head(backbone.norm(seen.last[:, :-1]))
        return F.mse_loss(predicted.float(), normalised(patches)), entropy
    return code_loss(backbone, seen.last, sequences[:, 1:]).mean, entropy


def freeze_unused(classifier: Classifier, config: FinetuneConfig) -> None:
    """Leave alone what no loss reaches: all of a backbone that isn't trained, or what predicts tokens."""
    backbone = classifier.backbone
    frozen = config.mode == "probes"
    for part in (backbone,) if frozen else (backbone.norm, backbone.head, *backbone.blocks[max(classifier.layers) :]):
        part.requires_grad_(False)
    if not frozen:
        backbone.embedding.requires_grad_(True)  # which a tied output layer shares
