"""What the documents show is true: snippets run, links lead somewhere, commands name verbs and options that exist."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import toto
from toto.__main__ import VERBS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_the_first_snippet_of_the_readme_runs():
    (snippet, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["codes"].shape == (16, 8, 8)
    assert names["frames"].shape == (16, 64, 64, 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_verbs_that_exist(page):
    for verb in re.findall(r"^    toto (\w+)", page.read_text(), re.MULTILINE):
        assert verb in VERBS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_that_are_named_exist(page):
    known = runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"))["ALL"]
    assert {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")} == {*known, "timing"}
    assert {*re.findall(r"^    python -m benchmarks (\w+)", page.read_text(), re.MULTILINE)} <= {*known}


def test_examples_in_docstrings_are_true():
    for module in pkgutil.walk_packages(toto.__path__, "toto."):
        if module.name != "toto.__main__":
            assert doctest.testmod(importlib.import_module(module.name)).failed == 0
