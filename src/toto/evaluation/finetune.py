"""Fine-tuning for recognition: by probes on every layer while the backbone learns on, or in full (paper, section 4.1).

With probes, each head's gradients end at its features, and the two are clipped apart, so that the backbone moves as it
would by next-token loss alone. A run continues from its newest checkpoint bit for bit: order, views and heads are
functions of the seed.

Several processes (`torchrun` starts them) hold the same weights. Each reads a part of a batch; what is kept of the
items, codes as a rule, goes to all, each computes the losses of a part, and gradients are added up.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toto.evaluation.classifier import Classifier, ClassifierCard, Loaded, classifier_sha256, load_classifier
from toto.evaluation.finetune_config import FinetuneConfig
from toto.evaluation.finetune_data import Eyes, FreshViews, Kept, StoredViews
from toto.evaluation.finetune_objective import freeze_unused, losses, make_groups
from toto.evaluation.finetune_ranks import add_gradients, parts_of, share_batches
from toto.evaluation.finetune_setup import open_eyes, read_backbone, record_of, require_same_run
from toto.evaluation.finetune_state import newest_state, read_state, save_checkpoint, write_aside
from toto.evaluation.labelled import LabelledClips, split_by_share
from toto.evaluation.recognition import Scores, result_of, score
from toto.evaluation.result import Result
from toto.media.ledger import LedgerRow
from toto.model.weights import Card, load_card
from toto.runtime.device import autocast, pick_device
from toto.runtime.errors import ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.interrupt import LEAVE_AFTER, StopRequest, stop_on_signal
from toto.runtime.metrics import Metrics
from toto.runtime.progress import Progress, say
from toto.runtime.provenance import as_plain, write_provenance
from toto.runtime.ranks import Ranks, joined_ranks
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
    ranks: Ranks
    metrics: Metrics | None = None  # of the first process alone
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

    def write(self, values: dict[str, float]) -> None:
        """Add a row of metrics, which are the same in each process."""
        if self.metrics is not None:
            self.metrics.write(self.step, values)

    def save(self) -> Path:
        """Write a checkpoint of the finished steps, in the first process."""
        failed = [self.source.failed[id] for id in sorted(self.source.failed)]
        state = (self.classifier, self.optimizer, self.card, self.told())
        return self.ranks.from_first(lambda: save_checkpoint(self.out, self.step, *state, failed=failed))

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
            ranks=self.ranks,
        )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Items of a batch that could be read: their places in it, their numbers, and what is kept of them."""

    places: list[int]
    numbers: list[int]
    kept: Kept | None
    failed: list[LedgerRow]


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
        RankError: another process of the job has gone.
    """
    with joined_ranks(device=config.device, timeout=config.timeout) as ranks:
        own = replace(config, device=ranks.device(config.device))
        run = _prepare(own, out, checkpoint, tokenizer, train, resume, ranks)
        return _finetune(run, train, test, checkpoint, config)


def _finetune(run: _Run, train: LabelledClips, test: LabelledClips, checkpoint: str, config: FinetuneConfig) -> Result:
    """`finetune`, in one of the processes of its job."""
    if test.classes != run.train.classes:
        raise ConfigError("has other classes than the training items", where=test.name, fix="give their order")
    _train(run)
    folder = run.out / CLASSIFIER
    run.ranks.from_first(lambda: write_aside(folder, run.classifier, run.card, run.told()))
    scores = run.score(test)
    return run.ranks.from_first(lambda: _record(run, scores, train, test, checkpoint, config))


def _record(
    run: _Run, scores: Scores, train: LabelledClips, test: LabelledClips, checkpoint: str, config: FinetuneConfig
) -> Result:
    """Write the result of a finished run."""
    failed = run.source.failed
    rows = [failed.get(id, LedgerRow(id=id, kind=train.modality, status="ok")) for id in train.ids]
    result = result_of(
        scores,
        run.card,
        test=test.name,
        protocol={"train": train.name, "frames": run.frames, "stride": run.stride, "frame_size": run.size}
        | {"checkpoint": checkpoint, "held_back": len(run.held.labels), "options": as_plain(config)},
        model_sha256=classifier_sha256(run.out / CLASSIFIER),
        passport=run.known.passport,
        train=(*rows, *train.refused),
    )
    result.save(run.out / RESULT)
    return result


def _prepare(
    config: FinetuneConfig,
    out: Path,
    checkpoint: str,
    tokenizer: Tokenizer | None,
    clips: LabelledClips,
    resume: bool,
    ranks: Ranks,
) -> _Run:
    """Open everything, and restore the newest checkpoint of a run that is resumed."""
    device = pick_device(config.device)
    if config.batch % (ranks.world * config.micro_batch):
        raise ConfigError(
            f"{config.batch} items are no multiple of {ranks.world} processes x {config.micro_batch}",
            where="--batch",
            fix="change --batch, --micro-batch or the number of processes",
        )
    found = ranks.from_first(lambda: newest_state(out))
    if found and not resume:
        raise ConfigError("already holds a run", where=out, fix="add --resume to continue it, or choose another --out")
    ranks.from_first(lambda: require_same_run(config, out, checkpoint, clips))
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
    share_batches(classifier, ranks)
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
        ranks=ranks,
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
        ranks.from_first(lambda: write_provenance(out, record_of(config, checkpoint, clips)))
    weights = sum(weight.numel() for weight in backbone.parameters())
    say(f"{len(train.labels)} training items, {len(held.labels)} held back, {len(clips.classes)} classes")
    beside = f", {ranks.world} processes" if ranks.world > 1 else ""
    what = f"{weights / 1e6:.1f} M weights, heads on {len(layers)} layers, {run.steps} steps"
    say(f"{config.mode}: {what}, on {device}{beside}")
    return run


def _train(run: _Run) -> None:
    """All steps that are left, with looks at the held-back items and checkpoints between them."""
    config = run.config
    if isinstance(run.source, StoredViews):
        run.source.make(run.ranks)
    ahead = ReadAhead(lambda step: _read(run, step), end=run.steps, workers=1)
    run.metrics = Metrics(run.out, continue_from=run.step or None) if run.ranks.first else None
    with (
        stop_on_signal(leave_after=LEAVE_AFTER if run.ranks.world > 1 else None) as stop,
        contextlib.closing(run.metrics) if run.metrics is not None else contextlib.nullcontext(),
        contextlib.closing(ahead),
        Progress("fine-tuning", total=run.steps, unit="steps", done=run.step) as progress,
    ):
        while run.step < run.steps:
            began = time.perf_counter()
            values = _step(run, _together(run, ahead.take(run.step)))
            stopping = bool(run.ranks.added(torch.tensor(float(bool(stop)))))
            progress.advance(note=f"loss {values['train/entropy']:.3f}")
            if run.step % config.log_every == 0 or run.step == run.steps:
                seconds = time.perf_counter() - began
                run.write(values | {"speed/items_per_second": config.batch / seconds})
            epoch, rest = divmod(run.step, run.per_epoch)
            if not rest and (epoch % config.validate_every == 0 or epoch == config.epochs):
                _validate(run)
            if run.step % config.save_every == 0 or run.step == run.steps or stopping:
                run.save()
            if stopping and run.step < run.steps:
                raise _stopped(run, stop)


def _read(run: _Run, step: int) -> _Part:
    """This process's items of a step that can be read, in the order of their epoch."""
    epoch, place = divmod(step, run.per_epoch)
    order = stream(run.config.seed, "order", epoch).permutation(len(run.train.labels))
    batch = order[place * run.config.batch : (place + 1) * run.config.batch].tolist()
    wanted = {number: place for place, number in enumerate(batch)}
    mine = batch[run.ranks.rank :: run.ranks.world]
    numbers, kept = run.source.batch(mine, epoch)
    ids = [run.train.ids[number] for number in mine]
    failed = [run.source.failed[id] for id in ids if id in run.source.failed]
    return _Part(places=[wanted[number] for number in numbers], numbers=numbers, kept=kept, failed=failed)


def _together(run: _Run, part: _Part) -> _Part:
    """What all processes have read of a batch, in the batch's order.

    Raises:
        ConfigError: they have read nothing, or less than an item for each process.
    """
    parts = run.ranks.gathered(part)
    failed = [row for each in parts for row in each.failed]
    run.source.failed.update({row.id: row for row in failed})
    places = [place for each in parts for place in each.places]
    if len(places) < run.ranks.world:
        what = "no item" if not places else f"{len(places)} item{'s' * (len(places) > 1)}, fewer than processes,"
        raise ConfigError(f"{what} of a batch can be read (the first: {failed[0].reason})", where=run.train.name)
    if len(parts) == 1:
        return part
    order = np.argsort(places)
    numbers = [number for each in parts for number in each.numbers]
    kept = np.concatenate([each.kept for each in parts if each.kept is not None])
    return _Part(
        places=[places[i] for i in order], numbers=[numbers[i] for i in order], kept=kept[order], failed=failed
    )


def _step(run: _Run, batch: _Part) -> dict[str, float]:
    """One optimizer step of all processes; returns its losses."""
    config, ranks, numbers, kept = run.config, run.ranks, batch.numbers, batch.kept
    assert kept is not None  # something was read
    device = run.classifier.backbone.device
    rate = learning_rate(run.step, run.steps, config.optimizer)
    set_learning_rate(run.optimizer, rate)
    run.classifier.train()
    labels = torch.tensor([run.train.labels[number] for number in numbers], device=device)
    totals = torch.zeros(2, dtype=torch.float64)
    for together in parts_of(len(numbers), ranks.world * config.micro_batch, least=ranks.world):
        part = slice(together.start + ranks.rank, together.stop, ranks.world)
        sequences, patches = run.eyes.inputs(kept[part], device)
        with autocast(config.precision, device):
            next_token, entropy = losses(run.classifier, config, sequences, patches, labels[part])
        share = len(sequences) / len(numbers)
        ((config.next_token_weight * next_token + entropy) * share).backward()  # type: ignore[no-untyped-call]
        totals += share * torch.stack([next_token, entropy]).detach().double().cpu()
    totals = ranks.added(totals)
    add_gradients(run.classifier, ranks)
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


def _validate(run: _Run) -> None:
    """Look at the held-back items: the best layer speaks from now on; the lowest of equals."""
    found = run.score(run.held)
    accuracies = {layer: found.accuracy(layer) for layer in run.card.layers}
    best = max(accuracies, key=lambda layer: (accuracies[layer], -layer))
    run.card = replace(run.card, layer=best, validation=accuracies)
    held = {*run.held.ids}
    run.source.failed.update({row.id: row for row in found.ledger if row.id in held and row.status != "ok"})
    run.write({f"validation/layer_{layer}": value for layer, value in accuracies.items()})
    say(f"step {run.step}: held-back accuracy {100 * accuracies[best]:.1f} at layer {best}")


def _stopped(run: _Run, stop: StopRequest) -> InterruptedRunError:
    what = f"stopped by {stop.name or 'a signal'} after step {run.step}"
    return InterruptedRunError(what, where=run.out, fix="add --resume to continue")
