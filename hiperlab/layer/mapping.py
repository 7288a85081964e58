"""StyleDiffusion's mapping networks: from a picture's CLIP tokens to what the value projections read.

As Trainer in the authors' stylediffusion.py. Tokens are the channels, features the axis that is normalised.
Axes: T timesteps, B pictures, P picture tokens, N text tokens, D text width (= token width), O rows of a network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab.errors import UserError
from hiperlab.layer.per_concept import uniform_init

VALUE_FORMS = ("affine", "direct")


def value_rows(form: str, text_tokens: int) -> int:
    """O, the rows a network gives: scale and shift of every text token ("affine"), or the states themselves ("direct").

    Raises:
        UserError: there is no such form.
    """
    if form not in VALUE_FORMS:
        raise UserError(f"method.value_form={form!r} is unknown. Choose {' or '.join(VALUE_FORMS)}.")
    return 2 * text_tokens if form == "affine" else text_tokens


def value_states(text: Tensor, mapped: Tensor, form: str) -> Tensor:
    """v(c) = c * S + B with [S; B] = M(E(x)) (Trainer.forward_embed in stylediffusion.py); "direct": M(E(x)) itself.

    Args:
        text: c (B, N, D).
        mapped: M(E(x)), (B or 1, 2N, D) for "affine", (B or 1, N, D) for "direct".
        form: one of `VALUE_FORMS`.

    Returns:
        (B, N, D).
    """
    if form == "direct":
        return mapped.expand_as(text)
    scale, shift = mapped.chunk(2, dim=1)
    return text * scale + shift


class _Rows(nn.Module):
    """T linear maps across tokens, I -> O; every timestep starts from the same draw, torch's default for a conv."""

    def __init__(self, steps: int, inputs: int, outputs: int, seed: int, purpose: str) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(
            uniform_init(seed, f"{purpose}.weight", (outputs, inputs), bound).repeat(steps, 1, 1)
        )
        self.bias = nn.Parameter(uniform_init(seed, f"{purpose}.bias", (outputs,), bound).repeat(steps, 1))

    def forward(self, x: Tensor, step: int) -> Tensor:
        """(B, I, D) -> (B, O, D)."""
        return self.weight[step] @ x + self.bias[step][:, None]


class _Norm(nn.Module):
    """T affine parts behind a normalisation of every row over its features, biased variance, eps 1e-5.

    The authors' batch norm stays in training mode for ever; for one picture this is the same, and several in a batch
    do not mix.
    """

    def __init__(self, steps: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(steps, rows))
        self.bias = nn.Parameter(torch.zeros(steps, rows))

    def forward(self, x: Tensor, step: int) -> Tensor:
        """(B, O, D) -> (B, O, D)."""
        return F.layer_norm(x, x.shape[-1:]) * self.weight[step][:, None] + self.bias[step][:, None]


class MappingNetworks(nn.Module):
    """T independent networks of three maps across tokens, the middle one with norm and leaky ReLU (slope 0.01).

    As `embedding` of Trainer in stylediffusion.py.

    Args:
        steps: T.
        tokens: P.
        rows: O, see `value_rows`.
        seed: of the initialisation.
    """

    def __init__(self, steps: int, tokens: int, rows: int, seed: int) -> None:
        super().__init__()
        self.steps = steps
        self.conv_start = _Rows(steps, tokens, rows, seed, "mapping.conv_start")
        self.conv_block = _Rows(steps, rows, rows, seed, "mapping.conv_block")
        self.norm = _Norm(steps, rows)
        self.conv_end = _Rows(steps, rows, rows, seed, "mapping.conv_end")

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        """M_step(E(x)): tokens (B, P, D) -> (B, O, D)."""
        hidden = self.norm(self.conv_block(self.conv_start(tokens, step), step), step)
        return self.conv_end(F.leaky_relu(hidden), step)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Give one timestep's network the numbers of another."""
        for parameter in self.parameters():
            parameter[target].copy_(parameter[source])
