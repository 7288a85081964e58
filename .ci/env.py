"""Run a command inside the project's own environment, making or updating it first. Needs Python >= 3.11 only.

    python3 .ci/env.py python -m hiperlab.run method=neti data=cats

The environment is .venv in the checkout: the package in editable form with the developers' extras, at versions held by
.ci/constraints.txt. A stamp in it says what it was made from, so the next call starts at once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("HIPERLAB_VENV", ROOT / ".venv"))
BIN = HOME / ("Scripts" if os.name == "nt" else "bin")
STAMP = HOME / "hiperlab.stamp"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def wanted() -> str:
    """What the environment is made from."""
    content = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()
    return hashlib.sha256(content + f"{sys.version_info[:2]} {ROOT}".encode()).hexdigest()


def make() -> None:
    """Make or update the environment; uv does it in seconds, pip is the fallback."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 a newcomer has
        sys.exit(f"hiperlab needs Python 3.11 or newer, this is {sys.version.split()[0]}.")
    print(f"hiperlab: setting up {HOME} (about 6 GB, once) …", file=sys.stderr, flush=True)
    start = time.monotonic()
    if not (BIN / "python").exists():
        venv.create(HOME, with_pip=True)
    python = str(BIN / "python")
    target = ["-e", f"{ROOT}[dev]", "-c", str(CONSTRAINTS)]
    quiet = {"check": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([python, "-m", "pip", "--version"], **quiet).returncode:  # type: ignore[call-overload]
        # An environment that uv made has no pip of its own.
        subprocess.run([python, "-m", "ensurepip"], **quiet)  # type: ignore[call-overload]
    subprocess.run([python, "-m", "pip", "install", "-q", "uv"], **quiet)  # type: ignore[call-overload]
    has_uv = subprocess.run([python, "-m", "uv", "--version"], **quiet).returncode == 0  # type: ignore[call-overload]
    # Bytecode now, as pip does unasked: where Python may not write any later (PYTHONDONTWRITEBYTECODE, a folder that is
    # read-only), every start would compile 4,500 modules anew, 9 of 15 seconds.
    compiled = ["-m", "uv", "pip", "install", "-q", "--compile-bytecode", "--python", python]
    installer = compiled if has_uv else ["-m", "pip", "install", "-q"]
    if subprocess.run([python, *installer, *target]).returncode:
        sys.exit("hiperlab: the environment could not be made; the lines above say why.")
    STAMP.write_text(wanted())
    print(f"hiperlab: set up in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Set up if needed, then become the command."""
    if not STAMP.exists() or STAMP.read_text() != wanted():
        make()
    if len(sys.argv) < 2:
        return
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(HOME)}
    environment.pop("PYTHONHOME", None)
    program = BIN / sys.argv[1]
    command = [str(program) if program.exists() else sys.argv[1], *sys.argv[2:]]
    if os.name == "nt":
        sys.exit(subprocess.run(command, env=environment).returncode)
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
