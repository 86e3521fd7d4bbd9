"""The fault campaign: damaged media files offered to toto, runs that are killed, disks that are full.

    python tools/faults.py media --out FOLDER --count 10000 --run        # write damaged files, and offer them
    python tools/faults.py media --out FOLDER --from VIDEOS --count 500  # of a user's own files; write them alone
    python tools/faults.py kill --out FOLDER --times 50                  # kill -9 a tokenizing run, then finish it
    python tools/faults.py kill --out FOLDER --times 20 --workers-only   # kill its workers one at a time
    python tools/faults.py train --out FOLDER --times 30                 # kill -9 a training run, then resume it
    python tools/faults.py train --out FOLDER --times 10 --ranks 2       # one rank of it, or all

The same seed gives the same bytes. Ends with 1 where something is wrong. docs/faults.md says what was found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from fault_campaign import Report, batches, lines_of, offer, tiny_tokenizer
from fault_kills import kill_runs, kill_workers
from fault_mutations import write_mutated
from fault_originals import make_originals, read_originals
from fault_training import kill_training

BATCH = 1000
REPORT = "report.txt"  # of all batches so far


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    media = modes.add_parser("media", help="damaged media files")
    kill = modes.add_parser("kill", help="a tokenizing run that is killed")
    train = modes.add_parser("train", help="a training run that is killed")
    for mode in (media, kill, train):
        mode.add_argument("--out", type=Path, required=True, help="a folder for everything that is written")
        mode.add_argument("--seed", type=int, default=0)
    for mode in (media, kill):
        mode.add_argument("--workers", type=int, default=2)
    media.add_argument("--count", type=int, default=1000, help="how many files")
    media.add_argument("--from", dest="source", type=Path, help="damage the media files below this folder instead")
    media.add_argument("--run", action="store_true", help="offer them to the pipeline, and check what becomes of them")
    media.add_argument("--keep", action="store_true", help="keep the files after the run")
    media.add_argument("--limit", type=float, default=10.0, help="seconds that an item may take")
    media.add_argument("--memory", type=float, default=4.0, help="gigabytes that a worker may hold")
    kill.add_argument("--times", type=int, default=50)
    kill.add_argument("--workers-only", action="store_true", help="kill single workers, not the run")
    train.add_argument("--times", type=int, default=30)
    train.add_argument("--ranks", type=int, default=1, help="processes of the run, through torchrun")
    train.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    return {"media": run_media, "kill": run_kills, "train": run_training}[options.mode](options)


def run_media(options: argparse.Namespace) -> int:
    """Write damaged files, batch by batch; with --run, offer each batch."""
    originals = read_originals(options.source) if options.source else make_originals()
    whole = Report()
    for numbers in batches(options.count, BATCH):
        folder = options.out / "files" / f"from-{numbers[0]:06d}"
        write_mutated(folder, originals, options.seed, numbers)
        if not options.run:
            continue
        report = offer(
            folder,
            options.out / "shards",
            tiny_tokenizer(options.out / "tokenizer"),
            limit=options.limit,
            memory=int(options.memory * 1e9),
            workers=options.workers,
        )
        whole.add(report)
        done = f"{numbers[-1] + 1:,} of {options.count:,}"
        print(f"{done}, {report.seconds:.0f} s, wrong {len(report.wrong)}", flush=True)
        (options.out / REPORT).write_text("\n".join(lines_of(whole)) + "\n")
        if not options.keep and not report.wrong:
            shutil.rmtree(folder)
    if not options.run:
        print(f"{options.count:,} files in {options.out / 'files'}")
        return 0
    print("\n".join(lines_of(whole)))
    return 1 if whole.wrong else 0


def run_kills(options: argparse.Namespace) -> int:
    """Kill runs or workers; the store must be that of a run nobody disturbed."""
    work = kill_workers if options.workers_only else kill_runs
    result = work(options.out, times=options.times, seed=options.seed, workers=options.workers)
    print("\n".join(result.lines()))
    return 1 if result.wrong else 0


def run_training(options: argparse.Namespace) -> int:
    """Kill training runs; what resuming makes of them must be what an undisturbed run makes."""
    result = kill_training(
        options.out, times=options.times, seed=options.seed, ranks=options.ranks, steps=options.steps
    )
    print("\n".join(result.lines()))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
