"""A toy of the contract's surface, small enough for hundreds of runs; also a program that trains in a real process.

python -m tests.report.toy RUN_DIR --steps 400 [--resume auto] [--devices 2] [--sleep 0.01] [--accumulate 2]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from hiperlab import files
from hiperlab.data.batch import Batch
from hiperlab.errors import StoppedError, UserError
from hiperlab.report import checkpoint, loggers, progress, signals
from hiperlab.report import nan_guard as guard


class Named(NamedTuple):
    name: str


class Endless(IterableDataset):
    """Batches that depend on their number only, from `first` on, as the real loader's do."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self):
        k = self.first
        while True:
            sample = torch.tensor([2 * k, 2 * k + 1])
            pixels = (sample / 100).sin().view(2, 1, 1, 1).expand(2, 3, 2, 2).clone()
            yield Batch(pixels, ["a", "b"], torch.zeros(2, dtype=torch.long), sample, sample % 3, sample > 3)
            k += 1


class Toy(pl.LightningModule):
    """Fits one weight; `bad_step` makes that step's loss NaN, `bad_gradient` only its gradient."""

    ended = False
    early_stop = None

    def __init__(self, sleep: float = 0.0, bad_step: int = -1, bad_gradient: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 3))
        self.frozen = torch.nn.Dropout(0.5)
        self.concepts = (Named("cats"),)
        self.sleep, self.bad_step, self.bad_gradient = sleep, bad_step, bad_gradient
        self.last_timesteps: torch.Tensor | None = None
        self.sampled: list[int] = []

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        if index == 0 and self.sleep:
            print("training starts", flush=True)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        time.sleep(self.sleep)
        self.last_timesteps = batch.sample * 10
        loss = ((batch.pixels.mean((2, 3)) - self.weight) ** 2).mean()
        if self.trainer.global_step == self.bad_step:
            loss = loss * float("nan")
        if self.trainer.global_step == self.bad_gradient:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        trainer = self.trainer
        first = trainer.global_step * trainer.accumulate_grad_batches
        return DataLoader(Endless(first), batch_size=None)

    def sample(self, prompts, seeds, *, steps, guidance):
        self.eval()
        self.sampled.append(self.trainer.global_step)
        return torch.full((len(prompts), 3, 8, 8), 0.5)


def build(folder, steps, every=10, callbacks=(), logger=(), stop=None, **options):
    """A Trainer as the run assembles it; options go to it. Returns it with its checkpoint and stop callbacks."""
    folder = Path(folder)
    checkpoints = checkpoint.StepCheckpoints(folder / "checkpoints", every)
    stopper = signals.StopCallback(stop or signals.StopSignals(), checkpoints, "resume me")
    options = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **options}
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=folder,
        logger=[loggers.JsonlLogger(folder), *logger],
        callbacks=[
            stopper, guard.FiniteGuard(checkpoints), loggers.RewindLogs(), progress.StepProgress(1e9),
            *callbacks, checkpoints,
        ],
        plugins=[checkpoint.AtomicCheckpointIO(), *options.pop("plugins", ())],
        **options,
    )  # fmt: skip
    return trainer, checkpoints, stopper


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--resume")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--bad-rank", type=int, default=-1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    toy = Toy(arguments.sleep, bad_step=5 if int(os.environ.get("LOCAL_RANK", 0)) == arguments.bad_rank else -1)
    try:
        with signals.StopSignals() as stop, files.RunLock(arguments.folder):
            strategy: str | pl.strategies.Strategy = "auto"
            if arguments.devices > 1:
                strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
            trainer, checkpoints, stopper = build(
                arguments.folder, arguments.steps, arguments.every, stop=stop, devices=arguments.devices,
                strategy=strategy, accumulate_grad_batches=arguments.accumulate,
            )  # fmt: skip
            path = checkpoint.resume_path(arguments.resume, checkpoints.folder)
            trainer.fit(toy, ckpt_path=path, weights_only=True)
            stopper.raise_if_stopped()
            if trainer.is_global_zero:
                weights = toy.weight.tolist()
                files.write_json(arguments.folder / "done.json", weights)
                print(json.dumps(weights))
    except StoppedError as error:
        print(error, file=sys.stderr)
        return error.code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
