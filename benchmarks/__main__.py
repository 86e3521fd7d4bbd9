"""All benchmarks: `python -m benchmarks`, or `python -m benchmarks decoder reading`. Each prints a table.

Options after a name are that benchmark's own.
"""

from __future__ import annotations

import importlib
import itertools
import sys

ALL = (
    "reading",
    "online",
    "decoder",
    "generation",
    "baselines",
    "tokenizer",
    "encoding",
    "decoding",
    "tokenizing",
    "training",
    "probing",
)


def main() -> None:
    """Run the benchmarks that are named, or all."""
    words = sys.argv[1:]
    names = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    options, names = words[len(names) :], names or list(ALL)
    if unknown := sorted(set(names) - set(ALL)):
        raise SystemExit(f"unknown benchmarks {unknown}; there are {', '.join(ALL)}")
    for name in names:
        sys.argv = [f"python -m benchmarks {name}", *options]
        print(f"\n## {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
