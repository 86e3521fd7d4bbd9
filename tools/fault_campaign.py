"""Offers damaged files to the real pipeline and looks at what becomes of them, of the time and of the memory.

Two passes. First the files are read one by one in worker processes, which gives each file's time and memory. Then
`toto.tokens.extract.tokenize` gets them all at once, as a user's folder, and every one must be in its ledger.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from fault_mutations import mutation_of

from toto.media.catalog import Item, list_source
from toto.media.reading import stream_item
from toto.runtime.errors import MediaError, TotoError
from toto.runtime.workers import Lost, Workers
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.shards import LEDGER, read_ledger
from toto.tokens.views import View
from toto.tokens.vqvae import VQVAE, StackConfig, VQVAEConfig, VQVAETokenizer

SIZE, STRIDE = 32, 4
GRACE = 5.0  # seconds past the limit until a process is gone
POLL = 0.02
STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What reading one file took.

    Attributes:
        id: the file's name.
        status: ok, short, corrupt; "crashed" or "too long", where its worker was lost; "escaped", where something
            else than a MediaError was raised.
        reason: why.
        seconds: to read, resize and crop it; of those that took too long, the limit.
        memory: bytes that its process held more at the worst moment than before; 0 where it was lost.
    """

    id: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    memory: int = 0


@dataclass(kw_only=True)
class Report:
    """What became of some files, and what is wrong with that."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: Counter[str] = field(default_factory=Counter)
    measured: list[Measured] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    worker_memory: int = 0
    run_memory: int = 0
    seconds: float = 0.0

    def add(self, other: Report) -> None:
        """Take over what another batch gave."""
        for mutation, statuses in other.counts.items():
            self.counts[mutation] += statuses
        self.reasons += other.reasons
        self.measured = (
            sorted([*self.measured, *other.measured], key=lambda one: one.seconds)[-3:]
            + sorted([*self.measured, *other.measured], key=lambda one: one.memory)[-3:]
        )
        self.crashed += other.crashed
        self.wrong += other.wrong
        self.worker_memory = max(self.worker_memory, other.worker_memory)
        self.run_memory = max(self.run_memory, other.run_memory)
        self.seconds += other.seconds


def tiny_tokenizer(folder: Path) -> Path:
    """Save a random tokenizer of 64 codes, which costs next to nothing, and reads every pixel all the same."""
    stack = StackConfig(widths=(8, 8), hidden=(8, 8), blocks=(1, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQVAE(VQVAEConfig(vocab_size=64, code_width=8, encoder=stack, decoder=stack))
        model.codebook.copy_(torch.nn.functional.normalize(torch.randn(64, 8), dim=-1))
    folder.mkdir(parents=True, exist_ok=True)
    VQVAETokenizer.from_model(model, trained={}).save(folder)
    return folder


def read_one_by_one(source: Path, *, limit: float, workers: int) -> list[Measured]:
    """Read, resize and crop each file below a folder in a worker of its own, with its time and memory."""
    tasks = [(item,) for item in list_source(source).items]
    found = []
    with Workers[tuple[Item, ...], Measured](_nothing, measure, count=workers, what="the decoder") as pool:
        for task, one in pool.in_order(tasks, limit=lambda _: limit):
            if isinstance(one, Lost):
                kind = "crashed" if "crashed" in one.reason else "too long"
                one = Measured(id=task[0].id, status=kind, reason=one.reason, seconds=limit)
            found.append(one)
    return found


def measure(task: tuple[Item, ...]) -> Measured:
    """Read one file as tokenizing does."""
    before = _reset_peak()
    began = time.perf_counter()
    status, reason = "ok", ""
    try:
        view = View(size=SIZE, stride=STRIDE)
        for clip in stream_item(task[0], stride=STRIDE):
            view.crop(clip)
    except MediaError as error:
        status, reason = error.status, str(error)
    except Exception as error:
        status, reason = "escaped", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    peak = memory_of(STATUS)
    return Measured(id=task[0].id, status=status, reason=reason, seconds=seconds, memory=max(0, peak - before))


def offer(source: Path, out: Path, tokenizer: Path, *, limit: float, memory: int, workers: int) -> Report:
    """Tokenize a folder of damaged files and check what became of each.

    Args:
        source: the folder.
        out: a folder for the store, made anew.
        tokenizer: a tokenizer's folder.
        limit: seconds that an item may take.
        memory: bytes that a worker may hold at most.
        workers: processes.
    """
    report = Report()
    began = time.perf_counter()
    report.measured = read_one_by_one(source, limit=limit, workers=workers)
    slow = {one.id for one in report.measured if one.status == "too long"}
    for one in report.measured:
        if one.status == "escaped":
            report.wrong.append(f"{one.id}: {one.reason} is no MediaError")
        if one.memory > memory:
            report.wrong.append(f"{one.id}: took {one.memory / 1e6:.0f} MB")
    offered = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    shutil.rmtree(out, ignore_errors=True)
    with _watched_memory() as peaks:
        try:
            config = TokenizeConfig(source=source, out=out, tokenizer=str(tokenizer), size=SIZE, stride=STRIDE)
            tokenize(replace(config, min_frames=2, workers=workers, time_limit=limit))
        except Exception as error:
            if not (isinstance(error, TotoError) and (out / LEDGER).exists()):
                report.wrong.append(f"the run ended without a ledger: {type(error).__name__}: {error}")
                return report
    report.worker_memory, report.run_memory = peaks["workers"], peaks["run"]
    rows = {row.id: row for row in read_ledger(out)}
    report.wrong += [f"{name}: has no row in the ledger" for name in sorted(offered - set(rows))]
    report.wrong += [f"{name}: has a row and is no file" for name in sorted(set(rows) - offered)]
    for name, row in rows.items():
        report.counts[mutation_of(name)][row.status] += 1
        report.reasons[_kind_of(row.reason)] += row.status not in ("ok", "duplicate")
        if row.status != "ok" and not row.reason:
            report.wrong.append(f"{name}: {row.status} without a reason")
        if mutation_of(name) == "untouched" and row.status not in ("ok", "duplicate"):
            report.wrong.append(f"{name}: {row.status}, though nothing is wrong with it ({row.reason})")
        if "\n" in row.reason:
            report.wrong.append(f"{name}: a reason of several lines")
        if "crashed" in row.reason:
            report.crashed.append(f"{name}: {row.reason}")
            if not row.reason.startswith("the decoder crashed"):
                report.wrong.append(f"{name}: a crash that is called {row.reason!r}")
    if report.worker_memory > memory:
        report.wrong.append(f"a worker took {report.worker_memory / 1e6:.0f} MB, the bound is {memory / 1e6:.0f}")
    report.seconds = time.perf_counter() - began
    longest = 2 * len(slow) * (limit + GRACE) + 3 * sum(one.seconds for one in report.measured) + 120
    if report.seconds > longest:
        report.wrong.append(f"took {report.seconds:.0f} s, its files {longest:.0f} s at most")
    return report


def lines_of(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    statuses = ("ok", "short", "duplicate", "corrupt", "skipped")
    yield f"{'mutation':<18}" + "".join(f"{name:>11}" for name in statuses)
    total: Counter[str] = Counter()
    for mutation in sorted(report.counts):
        total += report.counts[mutation]
        yield f"{mutation:<18}" + "".join(f"{report.counts[mutation][name]:>11,}" for name in statuses)
    yield f"{'all':<18}" + "".join(f"{total[name]:>11,}" for name in statuses)
    yield f"{sum(total.values()):,} files in {report.seconds:.0f} s"
    yield from (f"  {count:>6,}  {reason}" for reason, count in report.reasons.most_common(12))
    if report.measured:
        slowest = max(report.measured, key=lambda one: one.seconds)
        largest = max(report.measured, key=lambda one: one.memory)
        yield f"slowest: {slowest.seconds:.2f} s, {slowest.id} ({slowest.status} {slowest.reason})"
        yield f"most memory for one file: {largest.memory / 1e6:.0f} MB, {largest.id} ({largest.status})"
    yield f"most memory of a worker: {report.worker_memory / 1e6:.0f} MB"
    yield f"most memory of the run itself: {report.run_memory / 1e6:.0f} MB"
    yield f"decoders that crashed: {len(report.crashed)}"
    yield from (f"  {line}" for line in report.crashed[:20])
    yield f"wrong: {len(report.wrong)}"
    yield from (f"  {line}" for line in report.wrong[:40])


def memory_of(status: Path) -> int:
    """The most bytes that a process held in memory, by its status file; 0 where it is gone."""
    try:
        text = status.read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(found[0]) if found else 0


def children_of(process: int | str) -> list[int]:
    """The processes that a process has started and that live."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(word) for word in file.read_text().split()]
        except OSError:
            continue
    return found


def _reset_peak() -> int:
    """Forget the most memory that this process held; what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_of(STATUS)


@contextmanager
def _watched_memory() -> Iterator[dict[str, int]]:
    """Watch the processes that are started in the block; afterwards, the most that one of them and this one held."""
    peaks = {"workers": 0, "run": 0}
    done = threading.Event()
    before = set(children_of("self"))

    def watch() -> None:
        while not done.wait(POLL):
            found = [memory_of(Path(f"/proc/{child}/status")) for child in set(children_of("self")) - before]
            peaks["workers"] = max([peaks["workers"], *found])

    _reset_peak()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        peaks["run"] = memory_of(STATUS)


def _kind_of(reason: str) -> str:
    """A reason without its numbers, to count those that are alike."""
    return "".join("#" if letter.isdigit() else letter for letter in reason)[:70]


def _nothing() -> None:
    """A worker of measurements needs nothing to begin."""
    torch.set_num_threads(1)


def batches(count: int, size: int) -> Sequence[range]:
    """Numbers `0 .. count - 1` in batches."""
    return [range(first, min(count, first + size)) for first in range(0, count, size)]
