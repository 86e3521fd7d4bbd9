"""All benchmarks: `python -m benchmarks`, or `python -m benchmarks decoder reading`. Each prints a table.

Options after the names are the benchmarks' own.
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
)


def main() -> None:
    names = list(itertools.takewhile(lambda word: not word.startswith("--"), sys.argv[1:])) or list(ALL)
    if unknown := sorted(set(names) - set(ALL)):
        raise SystemExit(f"unknown benchmarks {unknown}; there are {', '.join(ALL)}")
    for name in names:
        print(f"\n## {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
