"""Results that W&B keeps become run folders; what it may answer is tried with a stand-in for its API."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hiperlab.compare.runs import read
from hiperlab.compare.wandb_runs import download
from hiperlab.errors import UserError
from tests.compare.folders import run


class Artifact:
    type = "hiperlab-results"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def download(self, root: str) -> str:
        shutil.copytree(self.folder, root, dirs_exist_ok=True)
        return root


def api(*runs: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(runs=lambda project: list(runs))


def kept(name: str, *artifacts: object) -> SimpleNamespace:
    return SimpleNamespace(id=name, logged_artifacts=lambda: list(artifacts))


def test_runs_come_as_folders_with_the_newest_results(tmp_path) -> None:
    old = Artifact(run(tmp_path / "old", "ti", {"identity": 0.1}, pictures=False))
    new = Artifact(run(tmp_path / "new", "ti", {"identity": 0.4}, pictures=False))
    other = Artifact(run(tmp_path / "other", "xti", {"identity": 0.6}, pictures=False))
    (tmp_path / "new" / "evil.py").write_text("boom")
    service = api(kept("a1", old, SimpleNamespace(type="model"), new), kept("b2", other), kept("c3"))
    folders = download("me/hiperlab", tmp_path / "out", service)
    assert [path.name for path in folders] == ["a1", "b2"] and not (tmp_path / "out" / "a1" / "evil.py").exists()
    found = read(folders)
    assert found.names == ["ti", "xti"] and found.values(0, 0).value.min() == pytest.approx(0.4)


def test_what_cannot_be_is_said_in_a_line(tmp_path) -> None:
    def refuse(project: str) -> None:
        raise OSError("no network\nsecond line")

    for project, service, expected in (
        ("hiperlab", api(), "expected entity/project"),
        ("me/hiperlab", api(), "holds no results of hiperlab"),
        ("me/hiperlab", SimpleNamespace(runs=refuse), r"cannot be asked \(no network\)"),
        ("me/hiperlab", api(kept("../../a")), "is no id of hiperlab's"),
    ):
        with pytest.raises(UserError, match=expected):
            download(project, tmp_path, service)
