"""Promises about the repository itself: settings target their rooms, the README's commands work, the notebook runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ROOMS = ("method", "model", "data", "sampler", "metric")


@pytest.mark.parametrize("room", ROOMS)
def test_yaml_targets_its_own_room(room) -> None:
    for path in (ROOT / "conf" / room).glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        node = settings.get(room, settings)
        target = node.get("_target_")
        if target is None:
            assert "defaults" in settings, f"{path.name} names no target and builds on nothing"
            continue
        wanted = "model" if room == "sampler" else room
        assert target.startswith(f"hiperlab.{wanted}."), path.name


def test_every_yaml_describes_itself() -> None:
    for path in (ROOT / "conf").glob("*/*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# ") and len(lines[0]) > 12, path


def test_no_host_and_no_machine_path_is_committed() -> None:
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    forbidden = re.compile("|".join(["py" + r"pi\.org", "python" + "hosted", "/ro" + "ot/", "/wo" + "rk/"]))
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".ipynb", "") and path.is_file():
            assert not (found := forbidden.search(path.read_text(encoding="utf-8", errors="ignore"))), (name, found)


def test_top_level_is_what_was_agreed() -> None:
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in files if name}
    assert {name for name in top if not name.startswith(".")} == {
        "pyproject.toml", "conf", "hiperlab", "tests", "notebooks", "outputs", "Makefile", "README.md", "CHANGELOG.md",
        "CONTRIBUTING.md", "METHODS.md", "LICENSE",
    }  # fmt: skip


def test_readme_commands_compose() -> None:
    """Every `python -m hiperlab.run` line of the README is accepted by the door."""
    import shlex

    from hydra import compose, initialize_config_dir

    commands = re.findall(r"^python -m hiperlab\.run (.+?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) >= 8
    for command in commands:
        words = [word for word in shlex.split(command) if word != "-m"]
        if any(word.startswith("run_dir=") for word in words):
            words = [word for word in words if not word.startswith("run_dir=")]
        single = [re.sub(r"=([^\[{\"']+?),.*$", r"=\1", w) if "(" not in w else w.split("=")[0] + "=1" for w in words]
        single = [word for word in single if not word.startswith("hydra/sweeper")]
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            compose("config", overrides=[*single, "hydra/launcher=basic"])


def test_constraints_cover_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.split(r"[=<>!~ ]", line)[0].lower().replace("_", "-")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    names = {re.split(r"[\[=<>!~ ]", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    assert names <= pinned, names - pinned


def test_rooms_keep_their_walls() -> None:
    import subprocess
    import sys

    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"), [("quickstart", 2), ("miniature", 4), ("attention", 2), ("compare", 2), ("read_a_run", 4)]
)
def test_notebooks_run(name: str, pictures: int, tmp_path, monkeypatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HIPERLAB_PICTURE", str(tmp_path))  # where the miniature's writes the README's picture
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=480, resources={"metadata": {"path": str(ROOT)}}).execute()
    found = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(found) == pictures
