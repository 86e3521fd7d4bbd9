"""Fine-tuning in several processes: parts of a batch, heads normalised over all of it, gradients added up."""

from __future__ import annotations

import torch.distributed as dist

from toto.evaluation.classifier import Classifier, SharedBatchNorm
from toto.runtime.ranks import Ranks


def parts_of(count: int, size: int, *, least: int) -> list[range]:
    """A batch of `count` items in parts of a size; a last part with fewer than `least` items joins the one before.

    >>> parts_of(9, 4, least=2)
    [range(0, 4), range(4, 9)]
    """
    starts = [*range(0, count, size)]
    if len(starts) > 1 and count - starts[-1] < least:
        starts.pop()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def share_batches(classifier: Classifier, ranks: Ranks) -> None:
    """Let the heads' norms see the items of all processes."""
    for module in classifier.heads.modules():
        if isinstance(module, SharedBatchNorm):
            module.shared = ranks.world > 1


def add_gradients(classifier: Classifier, ranks: Ranks) -> None:
    """Give every process the sum of all processes' gradients."""
    if ranks.world == 1:
        return
    for weight in classifier.parameters():
        if weight.grad is not None:
            dist.all_reduce(weight.grad)
