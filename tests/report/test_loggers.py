"""Local metrics are complete by themselves; W&B may fail in any way and the run goes on."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from PIL import Image

from hiperlab.errors import StoppedError, UserError
from hiperlab.report.loggers import JsonlLogger, read_metrics
from hiperlab.report.tracker import Identity, flatten
from hiperlab.report.wandb_tracker import WandbTracker
from tests.report.toy import Toy, build

NAMED = Identity()


def test_a_full_disk_costs_the_curve_not_the_training(tmp_path, caplog):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is Linux's")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    logger = JsonlLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 0.5}, step)
    assert caplog.text.count("training goes on, the curve has a gap") == 1
    (tmp_path / "metrics.jsonl").unlink()  # there is room again
    logger.log_metrics({"loss": 0.25}, 3)
    assert [row["step"] for row in read_metrics(logger.path)] == [3]


def test_jsonl_survives_a_torn_line_and_rewinds(tmp_path):
    logger = JsonlLogger(tmp_path)
    for step in range(5):
        logger.log_metrics({"loss": step / 10, "epoch": 0}, step)
    logger.log_metrics({"other": float("nan")}, 4)
    assert len(read_metrics(logger.path)) == 6  # flushed before any closing
    with open(logger.path, "a") as file:
        file.write('{"step": 5, "lo')
    again = JsonlLogger(tmp_path)
    again.log_metrics({"loss": 0.5}, 5)
    assert [row["step"] for row in read_metrics(again.path)] == [0, 1, 2, 3, 4, 4, 5]
    again.rewind(3)
    again.log_metrics({"loss": 9.0, "x": 1}, 3)
    again.finalize("success")
    assert [row["step"] for row in read_metrics(again.path)] == [0, 1, 2, 3]
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["0.0", "0.1", "0.2", "9.0"]
    assert list(rows[0]) == ["step", "time", "loss", "x"] and rows[0]["x"] == ""


def test_flatten():
    values = {"method": {"lr": 1, "layers": [1, 2]}, "data": [{"a": None}], "path": Path("x"), "on": True}
    assert flatten(values) == {
        "method.lr": 1, "method.layers": [1, 2], "data.0.a": None, "path": "x", "on": True,
    }  # fmt: skip
    json.dumps(flatten(values))


def use(logger):
    """Every call a run makes."""
    logger.log_hyperparams({"seed": 0, "method": {"lr": 1.0}})
    logger.log_images("samples", [Image.new("RGB", (8, 8))], ["<cats> & co"], 3)
    logger.log_table("scores", ["prompt", "picture", "value"], [["a", Image.new("RGB", (8, 8)), 0.5]])
    logger.summary({"clip_t": {"mean": 0.3}})
    logger.log_files({"results.json": "{}", "samples/samples.jsonl": ""})
    logger.finish()


def test_offline_run_is_written_without_network(tmp_path, caplog):
    logger = WandbTracker(tmp_path, Identity(group="sweep", job_type="train", tags=("neti", "x" * 99)))
    trainer, _, _ = build(tmp_path, 5, logger=[logger])
    trainer.fit(Toy())
    use(logger)
    assert "W&B" not in caplog.text
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1 and logger.version in written[0].name
    assert WandbTracker(tmp_path, NAMED).version == logger.version  # a resumed segment is the same run


@pytest.mark.parametrize("error", [RuntimeError("no network\nsecond line"), TimeoutError(), SystemExit(1), OSError(28)])
def test_a_failing_start_costs_one_line(tmp_path, monkeypatch, caplog, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    logger = WandbTracker(tmp_path, NAMED)
    trainer, _, _ = build(tmp_path, 5, logger=[logger])
    with caplog.at_level(logging.WARNING):
        trainer.fit(Toy())
        use(logger)
    assert trainer.global_step == 5
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert caplog.text.count("W&B failed") == 1


def test_unreachable_server_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    logger = WandbTracker(tmp_path, NAMED, mode="online", init_timeout=2)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.finish()
    assert "logging offline" in caplog.text and "wandb sync" in caplog.text
    assert "W&B failed" not in caplog.text
    assert list((tmp_path / "wandb").glob(f"offline-run-*/run-{logger.version}.wandb"))


def test_not_installed(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(WandbTracker(tmp_path, NAMED))
    assert caplog.text.count("W&B failed") == 1


def test_a_killed_service_costs_one_line(tmp_path, caplog):
    logger = WandbTracker(tmp_path, NAMED, finish_timeout=10)
    logger.log_metrics({"loss": 1.0}, 0)
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    services = [int(line.split()[0]) for line in listing.stdout.splitlines() if "wandb-core" in line]
    assert services
    for service in services:
        os.kill(service, signal.SIGKILL)
    trainer, _, _ = build(tmp_path, 20, logger=[logger])
    trainer.fit(Toy(sleep=0.02))
    use(logger)
    assert trainer.global_step == 20
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 20
    assert caplog.text.count("W&B failed") == 1


def test_disabled_and_wrong_mode_and_our_own_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("started"))
    use(WandbTracker(tmp_path, NAMED, mode="disabled"))
    with pytest.raises(UserError, match=r"mode=onlin"):
        WandbTracker(tmp_path, NAMED, mode="onlin")

    def stopped(**_):
        raise StoppedError("told to stop", 143)

    monkeypatch.setattr(wandb, "init", stopped)
    with pytest.raises(StoppedError):
        WandbTracker(tmp_path, NAMED).log_metrics({"loss": 1.0}, 0)
