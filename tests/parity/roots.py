"""DDIM's steps with the square roots that a recording machine had."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hiperlab.model import inversion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.stack import FrozenStack


class Roots:
    """Square roots of noise levels as the recording machine's float32 had them: a last digit off the rounded ones.

    Which of them are off is read from the recorded path, whose steps hold to 1e-12 for one choice and to 1e-8 for any
    other; everything behind the path is then compared with what was found.
    """

    def __init__(self) -> None:
        self.known: dict[float, Tensor] = {}

    @staticmethod
    def near(level: Tensor) -> list[Tensor]:
        """The rounded root of a level in float32, and its two neighbours."""
        middle = level.double().sqrt().float()
        return [middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (0.0, 2.0))]

    def candidates(self, level: Tensor) -> list[Tensor]:
        known = self.known.get(float(level))
        return self.near(level) if known is None else [known]

    def learn(self, stack: FrozenStack, steps: int, states: Conditioning, path: Tensor) -> tuple[Tensor, Tensor]:
        """Find the roots of every level of a path (T+1, 1, C, H, W); returns its steps as made with them, and its own.

        Args:
            stack: in float64.
            steps: T.
            states: of the path's one row.
            path: recorded, from the picture to its noise.
        """
        made = []
        for k, timestep in enumerate(inversion.timesteps(steps, stack.num_timesteps)):
            here, below = inversion.levels(stack, timestep, steps)
            noise = inversion.predict_noise(stack, path[k], timestep, states)
            levels = [below, 1 - below, here, 1 - here]
            best = min(
                itertools.product(*map(self.candidates, levels)),
                key=lambda roots: float((step(path[k], noise, *roots) - path[k + 1]).abs().max()),
            )
            self.known |= dict(zip(map(float, levels), best, strict=True))
            made.append(step(path[k], noise, *best))
        return torch.stack(made), path[1:]

    def move(self, latents: Tensor, noise: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """`inversion.move` with these roots."""
        return step(latents, noise, *(self.known[float(level)] for level in (start, 1 - start, end, 1 - end)))


def step(latents: Tensor, noise: Tensor, start: Tensor, start_noise: Tensor, end: Tensor, end_noise: Tensor) -> Tensor:
    return end * (latents - start_noise * noise) / start + end_noise * noise
