"""Keep a run of this version for later ones to resume: `python -m tests.earlier.keep`, once at each release.

Writes tests/earlier/<version>: a training that stopped half way, and `whole.safetensors`, what the same training made
when nothing stopped it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from hiperlab import __version__, files
from hiperlab.run.main import main

HERE = Path(__file__).parent
HALF, WHOLE = 4, 8
ASKED = (
    "method=ti", "model=tiny", "data=cats", "data.max_views=2", "logger=csv", "trainer=cpu", f"fit.steps={WHOLE}",
    "fit.batch_size=2", f"fit.checkpoint_every={HALF}", "fit.keep_checkpoints=true", "fit.sample_every=0",
    "sampler.steps=2", "sample.prompts=1", "sample.seeds=[0]", "stages=[fit]",
)  # fmt: skip
KEPT = ("config.yaml", "overrides.yaml", "results.json", "metrics.jsonl", "checkpoints")


def keep(folder: Path) -> None:
    """Write the run that stopped half way, and the whole one's artifact, into `folder`."""
    with tempfile.TemporaryDirectory() as made:
        run = Path(made) / "run"
        if main([*ASKED, f"run_dir='{run}'"]):
            raise SystemExit("the run failed")
        for later in (run / "checkpoints").glob(f"step-{WHOLE:06d}.ckpt*"):
            later.unlink()
        folder.mkdir()
        shutil.copyfile(run / "artifacts" / "cats.safetensors", folder / "whole.safetensors")
        for name in KEPT:
            copy = shutil.copytree if (run / name).is_dir() else shutil.copyfile
            copy(run / name, folder / name)
        results = json.loads((folder / "results.json").read_text())
        results |= {"status": "stopped", "run_dir": "run", "stages": {}, "seconds": {}}
        files.write_json(folder / "results.json", results)
        for record in (folder / "config.yaml", folder / "checkpoints" / "config.yaml"):
            record.write_text(record.read_text().replace(str(run), "run"))


if __name__ == "__main__":
    keep(HERE / (sys.argv[1] if len(sys.argv) > 1 else __version__))
