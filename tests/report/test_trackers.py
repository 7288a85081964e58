"""Tracking services: which are used, what reaches them, and that the failure of one is its own."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.report import trackers
from hiperlab.report.tracker import Identity, Trackers
from hiperlab.report.trackers import make_trackers
from tests.report.test_loggers import use
from tests.report.toy import Toy, build

CONFIG = {"method": {"lr": 0.5}, "seed": 3}
PICTURE = Image.new("RGB", (8, 8), "red")


def made(folder, services, **settings) -> Trackers:
    return make_trackers(folder, {"services": services, **settings}, "neti_cats_0", ["neti"], CONFIG)


def test_none_and_several_and_those_turned_off(tmp_path) -> None:
    assert made(tmp_path, {}).members == [] and made(tmp_path, {}).name == ""
    use(made(tmp_path, {}))
    found = made(tmp_path, {"wandb": True, "tensorboard": True}, mode="disabled", project="p", tags=["a"]).members
    assert [each.service for each in found] == ["wandb", "tensorboard"]
    assert found[0].identity == Identity("p", "neti_cats_0", None, None, ("a", "neti")) == found[1].identity
    assert [each.service for each in made(tmp_path, {"wandb": False, "tensorboard": True}).members] == ["tensorboard"]


def test_mistakes_are_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"logger\.services\.wandbb: no such service.*wandb"):
        made(tmp_path, {"wandbb": True})
    with pytest.raises(UserError, match=r"logger\.mode is no setting of logger=tensorboard"):
        made(tmp_path, {"tensorboard": True}, mode="online")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger=trackio needs the package trackio: pip install"):
        made(tmp_path, {"trackio": True})


def test_one_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, caplog) -> None:
    import wandb

    def fail(**_):
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", fail)
    both = made(tmp_path, {"wandb": True, "tensorboard": True})
    trainer, _, _ = build(tmp_path, 5, logger=[both])
    trainer.fit(Toy())
    use(both)
    assert trainer.global_step == 5 and caplog.text.count("W&B failed") == 1 and "TensorBoard failed" not in caplog.text
    assert len(scalars(tmp_path)["loss"]) == 5


def scalars(folder):
    """What TensorBoard would show: tag -> [(step, value)]."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    found = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {**found, "pictures": events.Tags()["images"], "texts": events.Tags()["tensors"]}


def test_tensorboard_shows_everything_and_a_resumed_run_once(tmp_path) -> None:
    first = made(tmp_path, {"tensorboard": True})
    for step in range(6):
        first.log_metrics({"loss": float(step), "epoch": 0}, step)
    first.finish()
    again = made(tmp_path, {"tensorboard": True})
    again.rewind(3)
    for step in range(3, 6):
        again.log_metrics({"loss": 10.0 + step}, step)
    use(again)
    found = scalars(tmp_path)
    assert found["loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
    assert found["clip_t.mean"][0][1] == pytest.approx(0.3)
    assert found["pictures"] == ["samples/0 <cats> & co", "scores/0"]
    assert {"config/text_summary", "scores/text_summary"} <= set(found["texts"])


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # its artifacts lie in ./mlruns
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = made(tmp_path, {"mlflow": True}, uri=uri, group="sweep")
    first.log_metrics({"loss": 1.0}, 0)
    again = made(tmp_path, {"mlflow": True}, uri=uri)
    again.log_metrics({"loss": 0.5}, 1)
    again.log_images("samples", [PICTURE], ["<cats>"], 3)
    again.log_table("scores", ["prompt", "picture", "value"], [["a, b", PICTURE, 0.5]])
    again.summary({"clip_t": {"mean": 0.25}, "note": "x"})
    again.log_files({"samples/samples.jsonl": "{}"})
    again.finish()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("hiperlab").experiment_id])
    assert run.info.run_id == again.version and run.info.status == "FINISHED"
    assert run.data.tags["group"] == "sweep" and run.data.params["method.lr"] == "0.5"
    assert [each.value for each in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 0.5]
    assert run.data.metrics["clip_t.mean"] == 0.25
    lines = list(csv.reader(io.StringIO(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/scores.csv"))))
    assert lines == [["prompt", "picture", "value"], ["a, b", "scores/0000_1.png", "0.5"]]
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/results/samples/samples.jsonl") == "{}"
    assert json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/samples/000003/captions.json")) == ["<cats>"]


TRACKIO = """
import sys
sys.path[:] = {path!r}
from trackio.sqlite_storage import SQLiteStorage
from tests.report.test_trackers import made, use
first = made({folder!r}, {{"trackio": True}}, project="p")
first.log_metrics({{"loss": 1.0}}, 0)
first.finish()
again = made({folder!r}, {{"trackio": True}}, project="p")
again.log_metrics({{"loss": 0.5}}, 1)
use(again)
(name,) = SQLiteStorage.get_runs("p")
assert name == f"neti_cats_0-{{again.version}}", name
rows = SQLiteStorage.get_logs("p", name)
assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5], rows
assert {{"samples/0", "scores", "clip_t.mean"}} <= {{key for row in rows for key in row}}, rows
"""


def test_trackio_goes_on_with_its_run(tmp_path) -> None:
    """In a process of its own: Trackio reads its folder when it is imported, and would take over the user's."""
    pytest.importorskip("trackio")
    script = TRACKIO.format(path=sys.path, folder=str(tmp_path))
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert "Trackio project" not in found.stdout and "failed" not in found.stderr
