"""Null-text inversion (Mokady et al. 2023), with text-embedding and negative-prompt inversion (Miyake et al. 2023).

Follows the authors' null_text_w_ptp.ipynb (google/prompt-to-prompt, NullInversion.null_optimization); text-embedding
inversion follows p2plus/text_inv_w_p2plus.py (sen-mao/StyleDiffusion).
Symbols: u_i (fitted embedding of step i), w (guidance).
Axes: T steps, R rows, N text tokens, D text width, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab.base.capability import Exportable
from hiperlab.base.editing_method import Conditions
from hiperlab.base.trajectory_method import PathSettings, TrajectoryMethod
from hiperlab.errors import UserError, near
from hiperlab.formats import null_text as files
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.inversion import noise_calls, previous
from hiperlab.model.shared_calls import Calls

FILES = {None: "null_text_embeddings.pt", "text": "text_embeddings.pt", "negative_prompt": "null_text_embeddings.pt"}


class NullText(TrajectoryMethod, Exportable):
    """One text embedding per step of the path, fitted so that guided denoising walks back along it.

    By default the unconditional text is fitted, starting from the empty one, and given to all rows. "text" fits the
    source text and gives it to the source row. "negative_prompt" fits nothing: the source text is the unconditional
    one.

    Args:
        optimise: None (also written "null"), "text" or "negative_prompt".
        inner_steps: most updates at a step of the path.
        epsilon: a step is done when a loss is below epsilon + 2e-5 i.
        path: as in `TrajectoryMethod`.
    """

    fixed_settings = ("optimise",)
    progress = (*TrajectoryMethod.progress, "path_step")  # `artifact` gives every step its embedding

    def __init__(self, optimise: str | None, inner_steps: int, epsilon: float, **path: Unpack[PathSettings]) -> None:
        super().__init__(**path)
        optimise = None if optimise == "null" else optimise  # what a command line makes of an unquoted null
        if optimise not in FILES:
            raise UserError(f"method.optimise={optimise!r} is unknown.{near(str(optimise), map(str, FILES))}")
        self.optimise, self.updates, self.epsilon = optimise, inner_steps, float(epsilon)
        self.start = "" if optimise is None else self.source  # not zeros: of those all rows have the same gradient
        first = self.encode([self.start])
        self.embeddings = nn.Parameter(first.float().repeat(self.steps, 1, 1))  # (T, N, D)

    # ---- the fit -----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the last step of the path is done; true from the start where nothing is fitted."""
        return self.optimise == "negative_prompt" or super().finished

    def inner_steps(self, step: int) -> int:
        """The most updates at a step of the path, the same for all."""
        return self.updates

    def stop_below(self, step: int) -> float:
        """The loss below which a step is done: epsilon, and 2e-5 more at every step (null_optimization)."""
        return self.epsilon + 2e-5 * step

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Copy the embedding of the step before, from which this step starts."""
        self.embeddings[step].copy_(self.embeddings[step - 1])

    def inner_loss_calls(self, step: int, latents: Tensor) -> Calls[dict[str, Tensor]]:
        """Mean squared distance, 0-d, of the guided step from latents (1, C, H, W) to the recorded path."""
        noise = yield from self._guided_calls(step, latents)
        found = previous(self.model, latents, noise, self.timesteps[step], self.steps)
        return {"latent": F.mse_loss(found[0], self.pivot[self.steps - 1 - step])}

    @torch.no_grad()
    def guided_calls(self, step: int, latents: Tensor) -> Calls[Tensor]:
        """The guided noise (1, C, H, W) for latents of that shape, with the embedding as it is."""
        return (yield from self._guided_calls(step, latents))

    def _guided_calls(self, step: int, latents: Tensor) -> Calls[Tensor]:
        text = "" if self.optimise == "text" else self.source
        # Before the call with a gradient, which other pictures' can then share.
        fixed = yield from self.remembered_calls("fixed", lambda: self.plain_noise_calls(text, step, latents))
        states = self._fitted(step)
        fitted = yield from noise_calls(self.model, latents, self.timesteps[step], states)
        without, within = (fixed, fitted) if self.optimise == "text" else (fitted, fixed)
        return without + self.guidance * (within - without)

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def _fitted(self, step: int) -> Conditioning:
        """u_i (1, 1, N, D); a pooled row is that of the text it starts from."""
        return self.encode.condition([self.start]).reading(self.embeddings[step : step + 1][None])

    def edit_conditions(self, texts: Sequence[str], negative: str | None) -> tuple[Conditions, Conditions]:
        """u_i as the unconditional text of all rows, or as the source row's text.

        Raises:
            UserError: another unconditional text is asked for where it is what was fitted.
        """
        plain, empty = super().edit_conditions(texts, negative)
        if self.optimise == "text":
            states = self.encode.condition(texts)

            def conditional(step: int) -> Conditioning:
                first = self._fitted(self.reached(step)).to(states.keys.dtype)
                return concatenate([first, states.rows(range(1, len(texts)))])

            return conditional, empty
        if negative:
            raise UserError(f"sample.negative={negative!r}: this method fits the unconditional text itself. Leave it.")

        def unconditional(step: int) -> Conditioning:
            return self._fitted(self.reached(step)).rows([0] * len(texts))

        return plain, unconditional

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def artifact(self, index: int) -> dict[str, Tensor]:
        """Noise (C, H, W) and embeddings (T, N, D); steps that training did not reach get the last fitted one."""
        found = super().artifact(index)
        return {**found, "embeddings": found["embeddings"][[self.reached(step) for step in range(self.steps)]]}

    def load_artifact(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put noise (C, H, W) and embeddings (T, N, D) in place; nothing is left to fit then."""
        super().load_artifact(index, tensors)
        self.path_step.fill_(self.steps - 1)

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """The embeddings as the public notebooks hold them, see `formats.null_text`."""
        return [files.write(folder / FILES[self.optimise], self.artifact(index)["embeddings"])]

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """A list of embeddings, one per step of the path."""
        rows = files.read(path)
        if rows.shape != self.embeddings.shape:
            raise UserError(
                f"{path.name} holds embeddings {tuple(rows.shape)}, this run reads {tuple(self.embeddings.shape)}: set "
                f"sampler.steps={len(rows)} and the base model they were made for."
            )
        self.embeddings.copy_(rows)
        self.path_step.fill_(self.steps - 1)
