"""CONTRIBUTING's recipe followed word for word: its listings, put where it says, pass what every method must pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHODS = ("shift", "outfit")


def listings() -> dict[str, str]:
    """Python and yaml listings of both methods by file name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = {}
    for kind, code in re.findall(r"^ *```(python|yaml)\n(.*?)^ *```$", text, re.M | re.S):
        code = re.sub(r"^   ", "", code, flags=re.M) if code.startswith("   ") else code  # inside a numbered list
        if named := re.search(r"^class (\w+)\((?:Method|RareTokenMethod)\)|hiperlab\.method\.(\w+)\.", code, re.M):
            name = (named[1] or named[2]).lower()
            found[
                f"{'hiperlab' if kind == 'python' else 'conf'}/method/{name}.{kind[:2] if kind == 'python' else kind}"
            ] = code
    return found


def test_the_listings_are_methods(tmp_path) -> None:
    written = listings()
    assert sorted(written) == sorted(
        path for name in METHODS for path in (f"hiperlab/method/{name}.py", f"conf/method/{name}.yaml")
    )
    for room in ("hiperlab", "conf", "tests"):
        shutil.copytree(
            ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("weights", "__pycache__", "earlier")
        )
    (tmp_path / "hiperlab" / "weights").symlink_to(ROOT / "hiperlab" / "weights")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in written.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (
        ["-m", "pytest", "-n", "0", "-q", "tests/method/test_conformance.py", "-k", " or ".join(METHODS)],
        ["-m", "ruff", "check", *(name for name in written if name.endswith(".py"))],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout or "All checks passed" in done.stdout
