"""Direct Consistency Optimization (Lee et al. 2024): the tuned model is to predict better than the frozen one, no more.

Follows kyungmnlee/dco (customize.py). Letters: p (tuned prediction), q (frozen), y (target), beta (pull's strength).
Axes: R rows, K concepts, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.loss.diffusion import per_concept


@dataclass(frozen=True)
class DCO:
    """Settings of the loss.

    Args:
        beta: above 0; 1000 to 2000 as published.
        snr_gamma: gamma of min-SNR weights (Hang et al. 2023, section 3.4) on both models' errors, None for none.
        offset_noise: o of the noise n_1 + o n_2 that training adds, n_2 the same in all of a channel's cells; 0 for
            none, 0.1 as published for styles.

    Raises:
        UserError: one is out of its range.
    """

    beta: float
    snr_gamma: float | None
    offset_noise: float

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"method.dco.beta={self.beta} is out of range. Choose above 0; the authors use 1000.")
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            raise UserError(f"method.dco.snr_gamma={self.snr_gamma} is out of range. Choose above 0 (5), or null.")
        if not 0 <= self.offset_noise < math.inf:
            raise UserError(f"method.dco.offset_noise={self.offset_noise} is out of range. Choose 0 or more (0.1).")


def min_snr(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weights min(snr, gamma) / snr (R,) of noise errors, / (snr + 1) of velocities (Hang et al. 2023, section 3.4).

    Args:
        alpha_bar: share of signal variance left at each row's timestep, (R,) in (0, 1); snr is alpha / (1 - alpha).
        gamma: above 0.
        prediction_type: "epsilon" or "v_prediction".
    """
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr + (prediction_type == "v_prediction"))


def advantage(prediction: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Each row's mean of (p - y)^2 - (q - y)^2, as the mean of (p - q)(p + q - 2 y): (R,), float32 or more precise.

    The product keeps digits that the difference of two almost equal means loses, which beta would then enlarge.

    Args:
        prediction: p (R, C, H, W).
        reference: q, same shape.
        target: y, same shape.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    p, q, y = (each.to(dtype) for each in (prediction, reference, target))
    return ((p - q) * (p + q - 2 * y)).flatten(1).mean(1)


def consistency_loss(advantages: Tensor, concept: Tensor, num_concepts: int, beta: float) -> Tensor:
    """-log sigmoid(-beta d) for the mean d of each concept's rows, the same number for all of them: (R,).

    One sigmoid of the batch's mean, as in the authors' code; a micro batch has its own.

    Args:
        advantages: (R,) of `advantage`, weighted where they are to be.
        concept: (R,) int64 in [0, K).
        num_concepts: K.
        beta: above 0.
    """
    return F.softplus(beta * per_concept(advantages, concept, num_concepts))[concept]
