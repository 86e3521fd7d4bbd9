"""Fine-tuning for recognition: by probes on every layer while the backbone learns on, or in full (paper, section 4.1).

With probes, each head's gradients end at its features, and the two are clipped apart, so that the backbone moves as it
would by next-token loss alone. A run continues from its newest checkpoint bit for bit: order, views and heads are
functions of the seed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from toto.evaluation.classifier import Classifier, ClassifierCard, Loaded, classifier_sha256, load_classifier
from toto.evaluation.finetune_config import FinetuneConfig
from toto.evaluation.finetune_data import Eyes, FreshViews, Kept, StoredViews
from toto.evaluation.finetune_objective import freeze_unused, losses, make_groups
from toto.evaluation.finetune_setup import open_eyes, read_backbone, record_of, require_same_run
from toto.evaluation.finetune_state import newest_state, read_state, save_checkpoint, write_aside
from toto.evaluation.labelled import LabelledClips, split_by_share
from toto.evaluation.recognition import Scores, result_of, score
from toto.evaluation.result import Result
from toto.media.ledger import LedgerRow
from toto.model.weights import Card, load_card
from toto.runtime.device import autocast, pick_device
from toto.runtime.errors import ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.interrupt import StopRequest, stop_on_signal
from toto.runtime.metrics import Metrics
from toto.runtime.progress import Progress, say
from toto.runtime.provenance import as_plain, write_provenance
from toto.runtime.seed import integer, stream
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import Tokenizer
from toto.training.optimizer import learning_rate, set_learning_rate
from toto.training.prefetch import ReadAhead

RESULT, CLASSIFIER, VIEWS = "result.json", "classifier", "views"


@dataclass(kw_only=True)
class _Run:
    """Everything a step needs."""

    config: FinetuneConfig
    out: Path
    classifier: Classifier
    optimizer: torch.optim.AdamW
    eyes: Eyes
    train: LabelledClips
    held: LabelledClips
    source: FreshViews | StoredViews
    card: ClassifierCard
    known: Card
    size: int
    frames: int
    stride: int
    step: int = 0

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch; what is left over waits for the next one's order."""
        return len(self.train.labels) // self.config.batch

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.per_epoch * self.config.epochs

    def save(self) -> Path:
        """Write a checkpoint of the finished steps."""
        failed = [self.source.failed[id] for id in sorted(self.source.failed)]
        return save_checkpoint(
            self.out, self.step, self.classifier, self.optimizer, self.card, self.told(), failed=failed
        )

    def told(self) -> Card:
        """The checkpoint's card, with the steps so far."""
        return replace(self.known, training=self.known.training | {"finetuning_steps": self.step})

    def score(self, clips: LabelledClips) -> Scores:
        """Scores by the run's views."""
        return score(
            self.classifier,
            clips,
            self.eyes,
            views=self.config.views,
            frames=self.frames,
            stride=self.stride,
            size=self.size,
            batch=self.config.micro_batch,
            precision=self.config.precision,
        )


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    checkpoint: str,
    tokenizer: Tokenizer | None,
    train: LabelledClips,
    test: LabelledClips,
    resume: bool = False,
) -> Result:
    """Fine-tune a checkpoint on labelled files and test it; the run's folder holds all of it.

    `out/classifier` is the classifier, `out/result.json` the record, `out/checkpoints` what a run continues from.

    Raises:
        ConfigError: data that don't fit, or a folder with another run.
        PassportError: the tokenizer is a stranger to the checkpoint.
        InterruptedRunError: asked to stop; everything is saved.
        NonFiniteLossError: the loss is no number any more.
    """
    run = _prepare(config, out, checkpoint, tokenizer, train, resume)
    if test.classes != run.train.classes:
        raise ConfigError("has other classes than the training items", where=test.name, fix="give their order")
    _train(run)
    write_aside(out / CLASSIFIER, run.classifier, run.card, run.told())
    scores = run.score(test)
    failed = run.source.failed
    rows = [failed.get(id, LedgerRow(id=id, kind=train.modality, status="ok")) for id in train.ids]
    result = result_of(
        scores,
        run.card,
        test=test.name,
        protocol={"train": train.name, "frames": run.frames, "stride": run.stride, "frame_size": run.size}
        | {"checkpoint": checkpoint, "held_back": len(run.held.labels), "options": as_plain(config)},
        model_sha256=classifier_sha256(out / CLASSIFIER),
        passport=run.known.passport,
        train=(*rows, *train.refused),
    )
    result.save(out / RESULT)
    return result


def _prepare(
    config: FinetuneConfig,
    out: Path,
    checkpoint: str,
    tokenizer: Tokenizer | None,
    clips: LabelledClips,
    resume: bool,
) -> _Run:
    """Open everything, and restore the newest checkpoint of a run that is resumed."""
    device = pick_device(config.device)
    found = newest_state(out)
    if found and not resume:
        raise ConfigError("already holds a run", where=out, fix="add --resume to continue it, or choose another --out")
    require_same_run(config, out, checkpoint, clips)
    train, held = split_by_share(clips, config.validation, seed=config.seed)
    absent = [clips.classes[label] for label in sorted({*range(len(clips.classes))} - {*train.labels})]
    if absent:
        what = f"no training item is left of class {', '.join(absent[:8])}, as one of each is held back"
        raise ConfigError(what, where=clips.name, fix="give two of each class, or more")
    if len(train.labels) < config.batch:
        what = f"{len(train.labels)} training items, fewer than a batch of {config.batch}"
        raise ConfigError(what, where=clips.name, fix="use a smaller --batch")
    before = load_card(checkpoint)
    passport = Passport.from_dict(before.passport, where=checkpoint)
    size = config.frame_size or (passport.frame_size or (0,))[0]
    if not size:
        raise ConfigError("its passport names no frame size", where=checkpoint, fix="give --frame-size")
    frames = 1 if clips.modality == "image" else config.frames or before.sequence["frames"]
    stride = config.stride or before.sequence["stride"]
    torch.manual_seed(integer(config.seed, "heads"))
    backbone = read_backbone(checkpoint, config).to(device)
    eyes, known = open_eyes(backbone, tokenizer, passport, before, clips, size=size, frames=frames, stride=stride)
    layers = config.layers or (
        (len(backbone.blocks),) if config.mode == "full" else (*range(len(backbone.blocks) + 1),)
    )
    joined = config.mode == "full"
    classifier = Classifier(backbone, layers, len(clips.classes), config.head, joined=joined).to(device)
    if joined or config.next_token_weight == 0:
        freeze_unused(classifier, config)
    optimizer = torch.optim.AdamW(
        make_groups(classifier, config),
        lr=config.optimizer.peak_lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )
    fresh = FreshViews(
        train, eyes, frames=frames, stride=stride, size=size, augmentation=config.augmentation, seed=config.seed
    )
    source = StoredViews(fresh, config.stored_views, out / VIEWS) if config.stored_views else fresh
    card = ClassifierCard(
        classes=clips.classes,
        modality=clips.modality,
        mode=config.mode,
        head=config.head,
        layers=layers,
        layer=None,
        validation={},
        views=config.views,
    )
    run = _Run(
        config=config,
        out=out,
        classifier=classifier,
        optimizer=optimizer,
        eyes=eyes,
        train=train,
        held=held,
        source=source,
        card=card,
        known=known,
        size=size,
        frames=frames,
        stride=stride,
    )
    if found:
        loaded: Loaded = load_classifier(found, device=device)
        classifier.load_state_dict(loaded.classifier.state_dict())
        state = read_state(found, classifier, optimizer)
        run.step, run.card = state.step, loaded.card
        fresh.failed.update({row.id: row for row in state.failed})
    else:
        write_provenance(out, record_of(config, checkpoint, clips))
    weights = sum(weight.numel() for weight in backbone.parameters())
    say(f"{len(train.labels)} training items, {len(held.labels)} held back, {len(clips.classes)} classes")
    say(f"{config.mode}: {weights / 1e6:.1f} M weights, heads on {len(layers)} layers, {run.steps} steps, on {device}")
    return run


def _train(run: _Run) -> None:
    """All steps that are left, with looks at the held-back items and checkpoints between them."""
    config = run.config
    if isinstance(run.source, StoredViews):
        run.source.make()
    ahead = ReadAhead(lambda step: _read(run, step), end=run.steps, workers=1)
    metrics = Metrics(run.out, continue_from=run.step or None)
    with (
        stop_on_signal() as stop,
        contextlib.closing(metrics),
        contextlib.closing(ahead),
        Progress("fine-tuning", total=run.steps, unit="steps", done=run.step) as progress,
    ):
        while run.step < run.steps:
            began = time.perf_counter()
            values = _step(run, ahead.take(run.step))
            progress.advance(note=f"loss {values['train/entropy']:.3f}")
            if run.step % config.log_every == 0 or run.step == run.steps:
                seconds = time.perf_counter() - began
                metrics.write(run.step, values | {"speed/items_per_second": config.batch / seconds})
            epoch, rest = divmod(run.step, run.per_epoch)
            if not rest and (epoch % config.validate_every == 0 or epoch == config.epochs):
                _validate(run, metrics)
            if run.step % config.save_every == 0 or run.step == run.steps or stop:
                run.save()
            if stop and run.step < run.steps:
                raise _stopped(run, stop)


def _read(run: _Run, step: int) -> tuple[list[int], Kept | None]:
    """The items of a step that can be read, in the order of their epoch."""
    epoch, place = divmod(step, run.per_epoch)
    order = stream(run.config.seed, "order", epoch).permutation(len(run.train.labels))
    numbers = order[place * run.config.batch : (place + 1) * run.config.batch]
    return run.source.batch([int(number) for number in numbers], epoch)


def _step(run: _Run, batch: tuple[list[int], Kept | None]) -> dict[str, float]:
    """One optimizer step; returns its losses."""
    config, (numbers, kept) = run.config, batch
    if kept is None:
        reason = next(iter(run.source.failed.values())).reason
        raise ConfigError(f"no item of a batch can be read (the first: {reason})", where=run.train.name)
    device = run.classifier.backbone.device
    rate = learning_rate(run.step, run.steps, config.optimizer)
    set_learning_rate(run.optimizer, rate)
    run.classifier.train()
    labels = torch.tensor([run.train.labels[number] for number in numbers], device=device)
    totals = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(numbers), config.micro_batch):
        part = slice(first, first + config.micro_batch)
        sequences, patches = run.eyes.inputs(kept[part], device)
        with autocast(config.precision, device):
            next_token, entropy = losses(run.classifier, config, sequences, patches, labels[part])
        share = len(sequences) / len(numbers)
        ((config.next_token_weight * next_token + entropy) * share).backward()  # type: ignore[no-untyped-call]
        totals += share * torch.stack([next_token, entropy]).detach().double().cpu()
    norms = [float(torch.nn.utils.clip_grad_norm_(list(weights), config.optimizer.clip)) for weights in _clipped(run)]
    next_token_loss, total = totals.tolist()
    if not all(math.isfinite(value) for value in (next_token_loss, total, *norms)):
        raise NonFiniteLossError(
            f"loss {total + next_token_loss}, gradient norms {norms} at step {run.step + 1}",
            where=run.out,
            fix="lower --optimizer.peak-lr or --head-rate and --resume",
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    values = {"train/entropy": total / len(run.card.layers), "train/lr": rate, "train/grad_norm": norms[0]}
    return values | ({"train/next_token": next_token_loss} if config.mode == "probes" else {})


def _clipped(run: _Run) -> Iterator[Iterator[Tensor]]:
    """What is clipped together: all in full fine-tuning; else the backbone, and the heads."""
    if run.config.mode == "full":
        yield run.classifier.parameters()
    else:
        yield run.classifier.backbone.parameters()
        yield run.classifier.heads.parameters()


def _validate(run: _Run, metrics: Metrics) -> None:
    """Look at the held-back items: the best layer speaks from now on; the lowest of equals."""
    found = run.score(run.held)
    accuracies = {layer: found.accuracy(layer) for layer in run.card.layers}
    best = max(accuracies, key=lambda layer: (accuracies[layer], -layer))
    run.card = replace(run.card, layer=best, validation=accuracies)
    held = {*run.held.ids}
    run.source.failed.update({row.id: row for row in found.ledger if row.id in held and row.status != "ok"})
    metrics.write(run.step, {f"validation/layer_{layer}": value for layer, value in accuracies.items()})
    say(f"step {run.step}: held-back accuracy {100 * accuracies[best]:.1f} at layer {best}")


def _stopped(run: _Run, stop: StopRequest) -> InterruptedRunError:
    what = f"stopped by {stop.name or 'a signal'} after step {run.step}"
    return InterruptedRunError(what, where=run.out, fix="add --resume to continue")
