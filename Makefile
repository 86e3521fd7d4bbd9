# Everything runs in .venv, which the targets make themselves. PYTHON names the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check bench sample tokenizer clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt references.txt tools/environment.py
	$(PYTHON) tools/environment.py

demo: setup
	$(BIN)/toto demo --out runs/demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
