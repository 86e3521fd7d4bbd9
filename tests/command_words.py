"""Commands as people type them, and what they are told where they went wrong."""

from __future__ import annotations

from toto.__main__ import main


def run(*words):
    """The exit code of a command."""
    return main([str(word) for word in words])


def refused(capsys, *words, code=2):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert run(*words) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("toto: ")
    return line
