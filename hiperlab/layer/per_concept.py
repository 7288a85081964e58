"""Layers with one set of weights per concept, stacked along the first axis. Axes: K concepts, I in, O out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab import draws


def uniform_init(seed: int, purpose: str, shape: tuple[int, ...], bound: float) -> Tensor:
    """Uniform in [-bound, bound), float32 of the given shape, a pure function of (seed, purpose)."""
    numbers = draws.generator(seed, f"init/{purpose}").random(shape, dtype="float32")
    return torch.from_numpy(numbers) * (2 * bound) - bound


class StackedLinear(nn.Module):
    """K linear maps I -> O with torch's default initialisation U(+-1/sqrt(I)), every concept from the same draw.

    Args:
        num_concepts: K.
        inputs: I.
        outputs: O.
        seed: of the initialisation.
        purpose: names this layer's draw.
    """

    def __init__(self, num_concepts: int, inputs: int, outputs: int, *, seed: int, purpose: str) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        weight = uniform_init(seed, f"{purpose}.weight", (outputs, inputs), bound)
        bias = uniform_init(seed, f"{purpose}.bias", (outputs,), bound)
        self.weight = nn.Parameter(weight.repeat(num_concepts, 1, 1))
        self.bias = nn.Parameter(bias.repeat(num_concepts, 1))

    def forward(self, x: Tensor, concept: int) -> Tensor:
        """(..., I) -> (..., O) with the weights of one concept."""
        return F.linear(x, self.weight[concept], self.bias[concept])


class StackedLayerNorm(nn.Module):
    """K affine layer norms over the last axis, eps 1e-5.

    Args:
        num_concepts: K.
        width: size of the last axis.
    """

    def __init__(self, num_concepts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_concepts, width))
        self.bias = nn.Parameter(torch.zeros(num_concepts, width))

    def forward(self, x: Tensor, concept: int) -> Tensor:
        """(..., width) -> (..., width) with the affine part of one concept."""
        return F.layer_norm(x, x.shape[-1:], self.weight[concept], self.bias[concept])
