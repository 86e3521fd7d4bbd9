"""Make .venv and install toto into it with the pinned versions: `python tools/environment.py`.

Needs nothing but Python 3.11+. torch is asked for first, alone and by its pinned version, because that is how pip
finds a CPU build where one is offered; a torch in range that is there already, in .venv or in the interpreter that
makes it, is kept.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BINARIES = VENV / ("Scripts" if sys.platform == "win32" else "bin")
TORCH_IN_RANGE = (
    "import importlib.metadata as m; v = m.version('torch').split('+')[0].split('.');"
    "raise SystemExit(not (2, 11) <= (int(v[0]), int(v[1])) < (2, 15))"
)


def main() -> None:
    """Create the environment, then install torch, then everything else under the constraints, then the references."""
    if (sys.version_info.major, sys.version_info.minor) < (3, 11):
        raise SystemExit(
            f"toto needs Python 3.11 or newer, this is {sys.version.split()[0]}; use make PYTHON=python3.11"
        )
    python = BINARIES / "python"
    if not python.exists():
        shared = has_torch(Path(sys.executable))
        venv.create(VENV, with_pip=True, system_site_packages=shared, symlinks=sys.platform != "win32")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch_pin = next(line for line in pins if line.startswith("torch=="))
    if not has_torch(python):
        pip(python, torch_pin)
    others = VENV / "constraints.txt"
    others.write_text("\n".join(line for line in pins if line != torch_pin) + "\n")
    pip(python, "--constraint", str(others), "--editable", f"{ROOT}[dev]")
    pip(python, "--no-deps", "--requirement", str(ROOT / "references.txt"), needed=False)
    (VENV / ".ready").touch()


def has_torch(python: Path) -> bool:
    """Whether this interpreter has a torch that toto supports."""
    return subprocess.run([python, "-c", TORCH_IN_RANGE], capture_output=True, check=False).returncode == 0


def pip(python: Path, *arguments: str, needed: bool = True) -> None:
    """Run pip's install, quietly, and stop with its message where it fails; go on where it isn't needed."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code and needed:
        raise SystemExit(code)
    if code:
        print("the references of the parity tests can't be installed; these tests will be skipped", file=sys.stderr)


if __name__ == "__main__":
    main()
