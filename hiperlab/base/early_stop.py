"""Training that ends when its loss on fixed inputs stops moving, for every method that trains by steps.

The place in the step and the fixed draws are those of DVAR (Voronov et al. 2023; yandex-research/DVAR,
textual_inversion.py): evaluation k comes before update k, all parts share pictures, posterior draw and noise, and only
their timesteps differ.
Axes: B rows, A parts, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hiperlab import draws
from hiperlab.data.batch import Batch
from hiperlab.errors import UserError
from hiperlab.loss.dvar import Dvar

log = logging.getLogger(__name__)
KEY = "early_stop"  # of a checkpoint


@dataclass(frozen=True)
class FixedInputs:
    """What the loss is asked for again and again.

    Attributes:
        batch: B rows of one concept.
        posterior: unit normals (B, C, H, W) of the VAE's posterior.
        noise: unit normals (B, C, H, W).
        timesteps: (A, B) int64, all different.
    """

    batch: Batch
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


def fixed_inputs(batch: Batch, seed: int, parts: int, shape: Sequence[int], num_timesteps: int) -> FixedInputs:
    """The draws for a batch, from the seed and the rows' numbers alone: a resumed training has the same.

    Args:
        batch: B rows.
        seed: the run's.
        parts: A.
        shape: of one row's latents, (C, H, W).
        num_timesteps: of the model.

    Raises:
        UserError: A B timesteps cannot all be different.
    """
    rows = len(batch.prompts)
    if parts * rows > num_timesteps:
        raise UserError(
            f"fit.dvar.parts={parts} of {rows} rows ask for {parts * rows} different timesteps, {num_timesteps} exist."
        )
    order = draws.generator(seed, "dvar timestep").permutation(num_timesteps)[: parts * rows]
    return FixedInputs(
        batch,
        draws.normal(seed, "dvar posterior", range(rows), shape),
        draws.normal(seed, "dvar noise", range(rows), shape),
        torch.from_numpy(order).long().view(parts, rows),
    )


class EarlyStop:
    """Counts a training's steps, keeps the losses on its fixed inputs and knows when it has ended.

    Args:
        inputs: see `fixed_inputs`.
        window: n, in evaluations.
        threshold: epsilon.
        every: optimizer steps from one evaluation to the next, 1 or more.
        most: steps that the training makes without it, for messages.
        name: of the concept, for messages.
    """

    def __init__(self, inputs: FixedInputs, window: int, threshold: float, every: int, most: int, name: str) -> None:
        self.inputs, self.every, self.most, self.name = inputs, every, most, name
        self.latents: Tensor | None = None  # of the inputs, once a method has prepared them
        self.dvar = Dvar(window, threshold)
        self.steps = 0  # whose turn has come

    @property
    def ended(self) -> bool:
        """Whether the update that comes next is the last."""
        return self.dvar.ended_at is not None

    def is_due(self) -> bool:
        """Count a step; whether the loss is asked for before its update."""
        self.steps += 1
        return (self.steps - 1) % self.every == 0

    def see(self, loss: float) -> None:
        """Take the loss of an evaluation."""
        was = self.ended
        self.dvar.see(loss)
        if self.ended and not was:
            log.info(
                "%s: the loss on fixed inputs is flat (ratio %.3g, below fit.dvar.threshold=%g): training ends after "
                "step %d, %d steps are saved.",
                self.name, self.dvar.ratio, self.dvar.threshold, self.steps, self.most - self.steps,
            )  # fmt: skip
        if math.isnan(self.dvar.ratio) and len(self.dvar.losses) == self.dvar.window:
            log.warning("%s: the loss on fixed inputs does not change at all: is anything trained?", self.name)

    def metrics(self, device: torch.device) -> dict[str, Tensor]:
        """What to log once there was an evaluation: the newest loss and ratio, 0-d."""
        found = {"dvar/loss": self.dvar.losses[-1], "dvar/ratio": self.dvar.ratio} if self.dvar.losses else {}
        return {name: torch.tensor(value, device=device) for name, value in found.items()}

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"steps": self.steps, "losses": list(self.dvar.losses)}

    def load(self, state: Mapping[str, Any] | None, steps: int) -> None:
        """Go on from a checkpoint's values; without any the losses before it count as never asked for.

        Args:
            state: of `state`, None where the checkpoint's training had no such end.
            steps: the checkpoint's optimizer steps.
        """
        self.dvar = Dvar(self.dvar.window, self.dvar.threshold)
        if state is None:
            log.warning("%s: no losses on fixed inputs in the checkpoint: they begin at step %d.", self.name, steps)
            self.steps = steps
            return
        self.steps = int(state["steps"])
        for loss in state["losses"]:
            self.dvar.see(float(loss))
