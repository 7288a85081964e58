"""Methods that follow one picture's path to its noise and fit something at each of its steps.

The order of updates, their learning rates and the early stop are those of null_text_w_ptp.ipynb
(google/prompt-to-prompt, NullInversion.null_optimization), which StyleDiffusion's stylediffusion.py shares.
Symbols: T (steps), i (sampling step, 0 is the noisiest), t_i (its timestep), N_i (updates at it).
Axes: C latent channels, H, W latent sides, N tokens, D text width. There is one concept: K is 1.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.artifact import RENAMED
from hiperlab.base.editing_method import EditingMethod, EditingSettings
from hiperlab.data.batch import Batch
from hiperlab.errors import UserError
from hiperlab.model.inversion import noise_calls, previous
from hiperlab.model.shared_calls import Calls

log = logging.getLogger(__name__)


class PathSettings(EditingSettings):
    """What every method that follows a path is built with; see `TrajectoryMethod`."""

    guidance: float


class TrajectoryMethod(EditingMethod):
    """Fits something at every step of the path so that guided denoising stays on it.

    One optimizer step is one inner update. A sampling step i is left at the START of the training step after its last
    update, so that a checkpoint, written after an optimizer step, always holds a consistent state, also half-way.

    Args:
        guidance: w that the path is followed with.
        settings: as in `EditingMethod`.
    """

    why_no_early_stop = "every step of the path ends by a loss of its own"

    path_step: Tensor  # i, the sampling step that is being fitted
    num_updates: Tensor  # updates made at it
    last_loss: Tensor  # of its last update, before that update
    latents: Tensor  # z at i (C, H, W)
    progress: ClassVar[tuple[str, ...]] = ("num_updates", "last_loss", "latents")  # of checkpoints, not of artifacts

    def __init__(self, guidance: float, **settings: Unpack[EditingSettings]) -> None:
        super().__init__(**settings)
        self.guidance = float(guidance)
        self.register_buffer("path_step", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_loss", torch.full((), torch.inf))
        self.register_buffer("latents", torch.zeros(self.model.latent_shape))
        self._running: Optimizer | None = None
        self._rates: list[float] = []
        self._memory: dict[Hashable, Tensor] = {}
        self._above = 0

    # ---- what a method of this kind writes ---------------------------------------------------------------------------

    @abstractmethod
    def inner_loss_calls(self, step: int, latents: Tensor) -> Calls[dict[str, Tensor]]:
        """What an update at sampling step i lowers: the sum of these 0-d terms, logged as loss/<name>.

        Args:
            step: i.
            latents: z (1, C, H, W) at t_i.

        Returns:
            The terms by name, 0-d each.
        """

    @abstractmethod
    def guided_calls(self, step: int, latents: Tensor) -> Calls[Tensor]:
        """The guided noise (1, C, H, W) of latents z (1, C, H, W) at step i, with the parameters as they are."""

    @abstractmethod
    def inner_steps(self, step: int) -> int:
        """N_i, the most updates at step i."""

    def stop_below(self, step: int) -> float:
        """The loss below which step i is done; it is that before the update, which is made all the same."""
        return 1e-5 + 2e-5 * step

    def rate(self, step: int) -> float:
        """Factor of the learning rate at step i: 1 - i / 100 (null_text_w_ptp.ipynb, null_optimization)."""
        return 1 - step / 100

    def begin(self, step: int) -> None:
        """Called before the first update of step i > 0, to start from what the step before has found."""

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last step of the path is done."""
        return int(self.path_step) == self.steps - 1 and self._done()

    def reached(self, step: int) -> int:
        """The fitted step whose parameters serve step i: itself, or the last one that training came to."""
        return min(step, int(self.path_step))

    def prepare_calls(self) -> Calls[None]:
        """Invert the picture; training starts from its noise."""
        yield from super().prepare_calls()
        if int(self.path_step) == 0 and int(self.num_updates) == 0:
            self.latents.copy_(self.noise)

    def remembered_calls(self, name: Hashable, make: Callable[[], Calls[Tensor]]) -> Calls[Tensor]:
        """What the work of `make` gives, done once per sampling step: the latents are the same in all its updates."""
        if name not in self._memory:
            self._memory[name] = yield from make()
        return self._memory[name]

    def on_fit_start(self) -> None:
        """Refuse what would make an optimizer step something else than one update.

        Raises:
            UserError: several processes, or accumulated batches.
        """
        if self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"{type(self).__name__} makes one update per optimizer step: set trainer.devices=1 and "
                "fit.batch_size=1."
            )

    def training_calls(self, batch: Batch) -> Calls[Tensor]:
        """One inner update's loss, 0-d; the batch is not read, everything follows from the picture's path."""
        yield from self.prepare_calls()
        assert not self.finished, "the path has ended"
        if self._done():
            yield from self._advance_calls()
        step = int(self.path_step)
        losses = yield from self.inner_loss_calls(step, self.latents[None])
        total = torch.stack(list(losses.values())).sum()
        self.num_updates += 1
        self.last_loss.copy_(total.detach())
        self.last_timesteps = torch.tensor([self.timesteps[step]])
        self._note_losses({"": total[None], **{name: value[None] for name, value in losses.items() if len(losses) > 1}})
        return total

    def _done(self) -> bool:
        step = int(self.path_step)
        return int(self.num_updates) >= self.inner_steps(step) or float(self.last_loss) < self.stop_below(step)

    @torch.no_grad()
    def _advance_calls(self) -> Calls[None]:
        """One step of denoising with what was found; the next step starts there with a new optimizer."""
        step = int(self.path_step)
        if float(self.last_loss) >= self.stop_below(step):
            self._above += 1
        log.debug("step %d: %d updates, loss %.3g", step, int(self.num_updates), float(self.last_loss))
        noise = yield from self.guided_calls(step, self.latents[None])
        self.latents.copy_(previous(self.model, self.latents[None], noise, self.timesteps[step], self.steps)[0])
        self._memory.clear()
        self.path_step += 1
        self.num_updates.zero_()
        self.last_loss.fill_(torch.inf)
        self.begin(step + 1)
        if self._running is not None:
            self._running.state.clear()
            self._set_rates()

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer with step i's learning rate; its state is dropped at every step of the path."""
        self._running = super().configure_optimizers()
        self._rates = [group["lr"] for group in self._running.param_groups]
        self._set_rates()
        return self._running

    def _set_rates(self) -> None:
        assert self._running is not None
        for group, rate in zip(self._running.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.rate(int(self.path_step))

    def on_fit_end(self) -> None:
        """Say how far and how well the path was followed."""
        name = self.concepts[0].name
        if int(self.path_step) < self.steps - 1:
            log.warning(
                "%s: training ended at step %d of the path's %d: those behind take what it found. fit.steps=%d would "
                "do.", name, int(self.path_step), self.steps, sum(self.inner_steps(step) for step in range(self.steps)),
            )  # fmt: skip
        if self._above:
            log.warning(
                "%s: %d of %d steps of the path ended above the loss at which they count as followed: the "
                "reconstruction may differ from the picture.", name, self._above, self.steps,
            )  # fmt: skip

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Own tensors by name, (1, ...) each, without those that only a resumed training needs (`progress`)."""
        return {name: value for name, value in super().trainable_state().items() if name not in self.progress}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read checkpoints of format 1, too, whose buffers had other names."""
        states = checkpoint["state_dict"]
        checkpoint["state_dict"] = {RENAMED.get(name, name): value for name, value in states.items()}
        super().on_load_checkpoint(checkpoint)

    @torch.no_grad()
    def plain_noise_calls(self, text: str, step: int, latents: Tensor) -> Calls[Tensor]:
        """The frozen model's noise (1, C, H, W) for a plain text at step i, without a gradient."""
        states = self.encode.condition([text])
        return (yield from noise_calls(self.model, latents, self.timesteps[step], states))
