"""Sweeps: fresh processes, failures that stay alone, signals, only what is missing, Optuna, optional launchers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hiperlab.errors import UserError
from hiperlab.sweep import job as sweep_job
from hiperlab.sweep import launcher
from hiperlab.sweep import outcome as sweep
from tests.run import bench

posix = pytest.mark.skipif(os.name != "posix", reason="process groups and signals are POSIX")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the small conf."""
    bench.write_conf(tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hiperlab.run", "--config-path", "conf", *words]
    env = bench.environment(**env)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: str, **env: str) -> tuple[int, str, str]:
    process = start(*words, **env)
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def jobs(name: str) -> dict[str, dict]:
    """sweep.json's rows by their overrides without what all share."""
    rows = json.loads(Path("outputs/sweeps", name, "sweep.json").read_text())["jobs"]
    return {" ".join(row["overrides"]): row for row in rows}


def results(row: dict) -> dict:
    return json.loads(Path(row["folder"], "results.json").read_text())


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@posix
def test_one_failure_never_costs_the_others(here):
    """Raised, exited, killed, silent: each is one row; the rest finishes; again does only what is missing."""
    words = ("-m", "method=ti", "behave=raise,exit,kill,silent,once,well", "sweep=all", "hydra.launcher.slots=2")
    leaks = {"MASTER_ADDR": "1.2.3.4", "MASTER_PORT": "1", "HYDRA_MAIN_MODULE": "x", "RANK": "0"}
    code, out, err = run(*words, **leaks)
    assert code == 1, err
    rows = {key.removeprefix("method=ti behave="): row for key, row in jobs("all").items()}
    assert {key: row["status"] for key, row in rows.items()} == {
        "raise": "failed",
        "exit": "failed",
        "kill": "failed",
        "silent": "failed",
        "once": "failed",
        "well": "finished",
    }
    assert rows["raise"]["error"] == "RuntimeError: the mapper exploded"
    assert rows["exit"]["error"] == "exit code 3"
    assert rows["kill"]["error"] == "killed by SIGKILL"
    assert rows["silent"]["error"] == "ended without a finished results.json (status: running)"
    assert rows["well"]["objective"] == -25.0
    facts = results(rows["well"])
    assert facts["env"] == {} and facts["sweep"] == "all" and not facts["torch"]
    assert "Traceback" in Path(rows["raise"]["folder"], "job.log").read_text()
    assert "5 failed, 1 finished" in out and "Traceback" not in out + err

    code, out, _ = run("-m", "method=ti", "behave=once,well", "sweep=all")
    rows = {key.removeprefix("method=ti behave="): row for key, row in jobs("all").items()}
    assert code == 0 and rows["well"]["status"] == "skipped" and rows["once"]["status"] == "finished"
    assert not Path(rows["well"]["folder"], "ran-1").exists() and Path(rows["once"]["folder"], "ran-1").exists()
    assert "1 finished, 1 skipped" in out


def test_each_job_has_its_own_overrides_and_process(here):
    code, out, err = run("-m", "method=ti,neti", "seed=1,2", "hydra.launcher.slots=2")
    assert code == 0, err
    (folder,) = Path("outputs/sweeps").iterdir()
    assert folder.name.startswith("method-seed-")  # the swept keys, then the hash
    found = {key: results(row) for key, row in jobs(folder.name).items()}
    assert {(key, f["method"].rpartition(".")[2], f["seed"]) for key, f in found.items()} == {
        (f"method={m} seed={s}", name, s) for m, name in [("ti", "TextualInversion"), ("neti", "NeTI")] for s in (1, 2)
    }
    assert len({f["pid"] for f in found.values()}) == 4
    assert {f["sweep"] for f in found.values()} == {folder.name}

    code, out, _ = run("-m", "seed=1,2", "method=ti,neti")  # the same sweep, said in another order
    assert code == 0 and "4 skipped" in out
    code, out, _ = run("-m", "method=ti", "seed=1", "stages=[sample,score]", f"sweep={folder.name}")
    assert code == 0 and "1 finished" in out  # the same job and folder, one stage more
    assert [results(row)["stages"] for row in jobs(folder.name).values()] == [["sample", "score"]]


def test_an_experiment_that_is_a_sweep_takes_several_values(here):
    code, _, err = run("experiment=both", "fit.steps=7,8", "sweep=more")
    assert code == 0, err
    assert len(list(Path("outputs/sweeps/more").glob("*/results.json"))) == 4


def test_an_experiment_may_be_a_sweep(here):
    code, _, err = run("experiment=both", "fit.steps=7", "sweep=exp")
    assert code == 0, err
    assert {row["objective"] for row in jobs("exp").values()} == {0.0}
    assert {results(row)["method"].rpartition(".")[2] for row in jobs("exp").values()} == {"TextualInversion", "NeTI"}


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop_it_lets_the_jobs_save(here, number, code):
    process = start("-m", "behave=wait", "seed=1,2,3", "sweep=s", "hydra.launcher.slots=2")
    wait_for(lambda: sum('"ready"' in p.read_text() for p in Path("outputs").rglob("results.json")) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    rows = jobs("s")
    assert [row["status"] for row in rows.values()].count("stopped") == 2
    assert [row["status"] for row in rows.values()].count("not started") == 1
    stopped = [row for row in rows.values() if row["status"] == "stopped"]
    assert all(results(row)["status"] == "stopped" and "saved step 7" in row["error"] for row in stopped)
    assert "the same command goes on" in err and "Traceback" not in err


@posix
def test_a_job_saves_when_its_sweep_is_killed(here):
    if not sys.platform.startswith("linux"):
        pytest.skip("the death signal of a parent is Linux's")
    process = start("-m", "behave=wait", "seed=1,2", "sweep=s")
    wait_for(lambda: any('"ready"' in p.read_text() for p in Path("outputs").rglob("results.json")))
    process.kill()
    process.communicate(timeout=30)
    (path,) = Path("outputs").rglob("results.json")
    wait_for(lambda: '"stopped"' in path.read_text())


@posix
def test_a_job_that_hangs_is_ended_and_the_next_one_runs(here):
    limits = ("hydra.launcher.timeout_min=0.13", "hydra.launcher.grace_s=0.5")
    code, _, _ = run("-m", "behave=hang,well", "sweep=h", *limits)
    rows = jobs("h")
    assert code == 1 and rows["behave=well"]["status"] == "finished"
    assert rows["behave=hang"]["status"] == "failed" and "time limit" in rows["behave=hang"]["error"]


def test_two_equal_sweeps_at_once_keep_their_own_rows(here):
    """Each command's table and exit code tell what its own jobs did, whatever another does with the same ones."""
    both = [start("-m", "behave=raise,user", "sweep=same") for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=90)
        assert process.returncode == 1 and "2 failed" in out, out
    failed = sweep.Outcome("job", ["seed=1"], "failed", 1.0, "job", error="full disk", invocation="one")
    sweep.record(Path("s"), failed)
    sweep.record(Path("s"), sweep.Outcome("job", ["seed=1"], "finished", 1.0, "job", invocation="another"))
    assert sweep.outcomes(Path("s"), "one") == [failed]


def test_jobs_share_gpus_fairly(here):
    """Two pretended GPUs, named as the cluster names them: each job sees one, no two at a time the same."""
    code, out, err = run("-m", "seed=1,2", "trainer=gpu", "sweep=g", CUDA_VISIBLE_DEVICES="4,GPU-x")
    assert code == 0, err
    assert {results(row)["env"]["CUDA_VISIBLE_DEVICES"] for row in jobs("g").values()} == {"4", "GPU-x"}
    first, second, *_ = [line for line in out.splitlines() if line.startswith("[")]
    assert "started" in first and "started" in second and first.split()[-1] != second.split()[-1]
    code, _, err = run("-m", "seed=1", "trainer=gpu", "trainer.devices=3", CUDA_VISIBLE_DEVICES="4,GPU-x")
    assert code == 2 and err == ("hiperlab: trainer.devices=3, but 2 GPU(s) are visible. Lower it or show more GPUs.\n")


@pytest.mark.parametrize(
    ("trainer", "gpus", "need"),
    [
        ({"accelerator": "cpu", "devices": 4}, ["0"], 0),
        ({"accelerator": "gpu", "devices": 2}, ["0", "1"], 2),
        ({"accelerator": "auto", "devices": "auto"}, ["0", "1"], 1),
        ({"accelerator": "auto", "devices": 1}, [], 0),
        ({"accelerator": "gpu", "devices": -1}, ["0", "1", "2"], 3),
        (None, ["0"], 1),
    ],
)
def test_devices_needed(trainer, gpus, need):
    cfg = OmegaConf.create({"trainer": trainer} if trainer else {})
    assert launcher.devices_needed(cfg, gpus) == need


def test_devices_named_one_by_one_are_refused():
    with pytest.raises(UserError, match="give a number"):
        launcher.devices_needed(OmegaConf.create({"trainer": {"accelerator": "gpu", "devices": [1]}}), ["0", "1"])


def test_devices_are_handed_out_whole():
    pool = launcher.Devices(["a", "b", "c"], None)
    assert pool.take(2) == ["a", "b"] and pool.take(2) is None and pool.take(1) == ["c"] and pool.take(1) is None
    pool.give_back(["a", "b"])
    assert pool.take(2) == ["a", "b"]
    assert pool.take(0) == [] and pool.take(0) is None  # on the CPU one at a time
    slots = launcher.Devices([], 2)
    assert [slots.take(0) for _ in range(3)] == [[], [], None]


def test_visible_gpus(monkeypatch):
    for text, expected in [("0,2", ["0", "2"]), ("", []), ("-1", []), (" MIG-1 ", ["MIG-1"])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert launcher.visible_gpus() == expected


def test_names_depend_on_the_overrides_alone(tmp_path):
    lines = ["method=ti", "+a.lr=0.00012345", "text='x/../y z'", "sweep=q", "stages=[fit]"]
    name = sweep.job_name(tmp_path, lines, ["text"])
    assert name.startswith("method-ti_lr-0.0001234_") or name.startswith("method-ti_lr-0.0001235_")
    assert sweep.job_name(tmp_path, lines[::-1][:2] + lines[:3], ["text"]) == name
    unsafe = sweep.job_name(tmp_path, lines, [])
    assert "/" not in unsafe and not unsafe.startswith(".")
    (tmp_path / name).mkdir()
    assert sweep.job_name(tmp_path, lines, ["text", "a.lr"]) == name  # found again though another key was swept
    assert sweep.digest(["seed=1"]) != sweep.digest(["seed=2"])


def test_the_line_that_says_why(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("old RuntimeError: no\n")
    size = log.stat().st_size
    with log.open("a") as file:
        file.write("Traceback\n  File x\n\x1b[31mtorch.OutOfMemoryError: CUDA\x1b[0m\n 10%|#  |\r 20%|## |\nbye\n")
    assert sweep_job.last_error(log, size) == "torch.OutOfMemoryError: CUDA"
    log.write_text("one\n\ntwo\n")
    assert sweep_job.last_error(log, 0) == "two"


def test_torchrun_and_sweep_do_not_mix(here):
    code, _, err = run("-m", "seed=1,2", LOCAL_RANK="0")
    assert code == 2 and "without torchrun" in err


def test_a_job_inherits_no_ranks(monkeypatch):
    for key in (
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "HYDRA_MAIN_MODULE",
        "HIPERLAB_RUN_DIR",
    ):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_PROCID", "0")
    for tasks, kept in [("1", False), ("4", True)]:  # with several tasks srun has started the ranks
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        env = sweep_job.environment(["3"])
        assert not {"LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "HIPERLAB_RUN_DIR"} & set(env)
        assert "HYDRA_MAIN_MODULE" not in env and env["HYDRA_FULL_ERROR"] == "1" and env["CUDA_VISIBLE_DEVICES"] == "3"
        assert ("SLURM_PROCID" in env) == kept and "SLURM_JOB_ID" in env


no_optuna = importlib.util.find_spec("optuna") is None
needs_optuna = pytest.mark.skipif(no_optuna, reason="the extra hiperlab[optuna] is absent")


@needs_optuna
def test_optuna_finds_resumes_and_survives_failures(here):
    words = [
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "fit.steps=range(1,20)",
        "behave=well,once",
        "seed=3",
        "sweep=o",
    ]
    code, out, err = run(*words, "hydra.sweeper.n_jobs=2", "hydra.launcher.slots=2")
    assert err == "" or "Traceback" not in err
    assert "best objective" in out and code == 1  # some point failed the first time
    failed = {key for key, row in jobs("o").items() if row["status"] == "failed"}
    assert failed and all("behave=once" in key for key in failed)
    code, out, err = run(*words)
    again = jobs("o")
    assert code == 0 and set(again) == failed and {row["status"] for row in again.values()} == {"finished"}
    best = json.loads(Path("outputs/sweeps/o/best.json").read_text())
    assert set(best["params"]) == {"fit.steps", "behave"} and best["value"] == -((best["params"]["fit.steps"] - 7) ** 2)


@needs_optuna
def test_optuna_grid_is_complete(here):
    code, out, err = run(
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.sampler=grid",
        "hydra.sweeper.n_trials=null",
        "method=ti",
        "fit.steps=range(6,8)",
        "sweep=g",
        "hydra.sweeper.n_jobs=4",
    )
    assert code == 0, err
    assert set(jobs("g")) == {f"method=ti fit.steps={s}" for s in (6, 7)}
    assert "best objective 0 " in out


@needs_optuna
def test_optuna_space():
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from hiperlab.sweep.optuna import grid, space

    swept, fixed = space(
        [
            "a=interval(0,1)",
            "b=tag(log,interval(1e-4,1e-2))",
            "c=range(0,10,3)",
            "d=x,'y z'",
            "+e=choice(1,2)",
            "f=range(0,1,0.25)",
            "g=1",
        ],
        None,
    )
    assert fixed == ["g=1"]
    assert swept["b"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert swept["c"] == IntDistribution(0, 9, step=3)
    assert swept["d"] == CategoricalDistribution(["x", "'y z'"]) and swept["+e"] == CategoricalDistribution(["1", "2"])
    assert swept["f"] == FloatDistribution(0.0, 0.75, step=0.25)
    assert len(grid({key: swept[key] for key in ("c", "d", "+e", "f")})) == 4 * 2 * 2 * 4
    with pytest.raises(UserError, match="finite choice for a"):
        grid(swept)
    with pytest.raises(UserError, match="nothing to search"):
        space(["g=1"], None)


def test_optuna_mistakes_are_named():
    from hiperlab.sweep.optuna import Study

    good = {"n_trials": 1, "n_jobs": 1, "direction": "maximize", "sampler": "tpe", "seed": 0}
    for wrong, expected in [
        ({"sampler": "bayes"}, "no such sampler"),
        ({"direction": "up"}, "maximize or minimize"),
        ({"n_trials": None}, "n_trials is missing"),
    ]:
        with pytest.raises(UserError, match=expected):
            Study(**{**good, "storage": None, "params": None, **wrong})


@needs_optuna
def test_a_users_mistake_in_the_sweeper_is_one_line(here):
    code, _, err = run("-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.sampler=bayes")
    assert code == 2 and "Did you mean" not in err and "no such sampler" in err and err.count("\n") == 1


def test_an_absent_extra_is_named(here):
    """A Python in which the extras cannot be found."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "gone = ('optuna', 'hydra_plugins.hydra_submitit_launcher');"
        "u.find_spec = lambda name, *a: None if name in gone else find(name, *a);"
        "from hiperlab.run.main import main; sys.exit(main(sys.argv[1:]))"
    )
    for words, extra in [("hydra/sweeper=optuna", "optuna"), ("hydra/launcher=submitit_local", "slurm")]:
        command = [sys.executable, "-c", code, "--config-path", "conf", "-m", "seed=1,2", words]
        done = subprocess.run(command, env=bench.environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"pip install 'hiperlab[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("submitit_local", "hydra_plugins.hydra_submitit_launcher"),
        ("basic", "hydra"),
    ],
)
def test_other_launchers_run_the_same_jobs(here, name, module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the extra for hydra/launcher={name} is absent")
    code, _, err = run("-m", f"hydra/launcher={name}", "behave=well,raise", "sweep=x")
    assert code == 1 and "Traceback" not in err and "UserWarning" not in err
    rows = jobs("x")
    assert rows["behave=well"]["status"] == "finished" and rows["behave=well"]["objective"] == -25.0
    assert rows["behave=raise"]["status"] == "failed" and "the mapper exploded" in rows["behave=raise"]["error"]
    assert results(rows["behave=well"])["sweep"] == "x"


def test_a_job_whose_folder_was_removed_is_named(tmp_path) -> None:
    assert sweep_job.last_error(tmp_path / "job.log", 0) == f"{tmp_path / 'job.log'} is gone"
