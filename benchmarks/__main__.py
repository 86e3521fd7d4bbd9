"""All benchmarks: `python -m benchmarks`, or `python -m benchmarks decoder reading`. Each prints a table."""

from __future__ import annotations

import importlib
import sys

ALL = ("reading", "decoder", "tokenizer", "encoding")


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    if unknown := sorted(set(names) - set(ALL)):
        raise SystemExit(f"unknown benchmarks {unknown}; there are {', '.join(ALL)}")
    for name in names:
        print(f"\n## {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
