"""A small config tree and a light job, so that the door and the sweeps are tested without the other rooms."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "config.yaml": """
# a small bench
defaults:
  - _self_
  - method: ti
  - model: tiny
  - data: cats
  - trainer: cpu
  - experiment: null
  - override hydra/launcher: process
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
seed: 0  # every random choice
stages: [fit, sample]  # what to do
run_dir: null
outputs_dir: outputs
resume: null
sweep: null
allowed_targets: []
fit:  # training
  steps: 2  # how long
behave: well  # what the light job does
hydra:
  run: {dir: "${run_dir}"}
  sweep: {dir: "${outputs_dir}/sweeps/${sweep}", subdir: .}
  output_subdir: null
""",
    "method/ti.yaml": "# Textual Inversion\n_target_: hiperlab.method.ti.TextualInversion\nlr: 0.005\n",
    "method/neti.yaml": "# @package method\n# NeTI\n_target_: hiperlab.method.neti.NeTI\nlr: 0.001\nscale: 1.0\n",
    "model/tiny.yaml": "# random twin\nseed: 0\n",
    "data/cats.yaml": "# cats\nconcepts: [cat]\n",
    "data/folder.yaml": "# your own photographs\ndir: ???\nword: ???\n",
    "trainer/cpu.yaml": "# one CPU\naccelerator: cpu\ndevices: 1\n",
    "trainer/gpu.yaml": "# GPUs\naccelerator: gpu\ndevices: 1\n",
    "experiment/both.yaml": "# @package _global_\n# both methods\nhydra:\n  mode: MULTIRUN\n  sweeper:\n"
    "    params: {method: 'ti,neti'}\n",
    "experiment/evil.yaml": "# @package _global_\n# asks for too much\nallowed_targets: [os]\n"
    "method: {_target_: os.system}\n",
}


def write_conf(folder: Path) -> Path:
    """The small config tree, with hiperlab's own launchers and sweepers."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    for path in (ROOT / "conf" / "hydra").rglob("*.yaml"):
        target = folder / "hydra" / path.relative_to(ROOT / "conf" / "hydra")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    return folder


def environment(**extra: str) -> dict[str, str]:
    """For a subprocess: hiperlab and this module importable, no rank from outside."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HIPERLAB_", "SLURM_")) and k != "LOCAL_RANK"}
    return {**env, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HIPERLAB_JOB": "tests.run.bench:job", **extra}


def job(cfg) -> float:
    """The light job: writes what a run writes, then behaves as `behave` says."""
    from hiperlab.cli.hydra_job import task_overrides
    from hiperlab.errors import StoppedError, UserError

    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.yaml").write_text(yaml.safe_dump(task_overrides()))
    watched = ("LOCAL_RANK", "NODE_RANK", "MASTER_", "WORLD_SIZE", "HYDRA_", "CUDA_")
    seen = {k: v for k, v in os.environ.items() if k.startswith(watched)}
    runs = len(list(folder.glob("ran-*")))
    (folder / f"ran-{runs}").touch()

    def write(status: str, **more) -> None:
        facts = {
            "status": status,
            "stages": list(cfg.stages),
            "env": seen,
            "pid": os.getpid(),
            "sweep": cfg.sweep,
            "torch": "torch" in sys.modules,
            "method": cfg.method._target_,
            "seed": cfg.seed,
            **more,
        }
        (folder / "results.json").write_text(json.dumps(facts))

    write("running")
    match cfg.get("behave", "well"):
        case "raise":
            raise RuntimeError("the mapper exploded")
        case "user":
            raise UserError("prompt too long")
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "silent":
            return 0.0
        case "once" if runs == 0:
            raise RuntimeError("only the first time")
        case "wait":
            told = []
            signal.signal(signal.SIGTERM, lambda *_: told.append(143))
            signal.signal(signal.SIGINT, lambda *_: told.append(130))
            write("running", ready=True)
            while not told:
                time.sleep(0.02)
            write("stopped")
            raise StoppedError("saved step 7", told[0])
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
    write("finished", objective=-(float(cfg.fit.steps - 7) ** 2))
    return 0.0
