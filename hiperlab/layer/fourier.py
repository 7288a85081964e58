"""NeTI's positional encoding of (timestep, layer), as the authors' models/positional_encoding.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hiperlab import draws


def frequencies(seed: int, num_w: int, sigma_t: float, sigma_l: float) -> Tensor:
    """Frozen random frequencies w (num_w, 2): column 0 for time, column 1 for the layer; no factor 2 pi.

    Args:
        seed: of the draw.
        num_w: F.
        sigma_t: deviation of column 0, per timestep.
        sigma_l: deviation of column 1, per layer.
    """
    w = draws.normal(seed, "init/frequencies", [0], (num_w, 2))[0]
    return w * torch.tensor([sigma_t, sigma_l])


def encode(t: Tensor, layer: Tensor, w: Tensor) -> Tensor:
    """f(t, l) = [sin(phase); cos(phase)] / ||.||_2 with phase = w [t, l]^T (NeTIPositionalEncoding.encode).

    Args:
        t: timesteps in [0, 1000), shape (...,); not normalised.
        layer: cross-attention layers in [0, 16), same shape.
        w: frequencies (F, 2).

    Returns:
        (..., 2F) in w's type. Sums instead of a matrix product: phases reach 100 rad, which TF32 would ruin.
    """
    phase = t[..., None].to(w) * w[:, 0] + layer[..., None].to(w) * w[:, 1]
    code = torch.cat([phase.sin(), phase.cos()], dim=-1)
    return code / code.norm(dim=-1, keepdim=True)


def anchors(w: Tensor, num_time_anchors: int, num_layers: int, num_timesteps: int) -> Tensor:
    """Codes of t = 0, s, 2s, ... and, inner loop, every layer: what the mapper's first layer starts from.

    As NeTIPositionalEncoding.init_layer in models/positional_encoding.py.

    Args:
        w: frequencies (F, 2).
        num_time_anchors: must divide `num_timesteps`; s = num_timesteps / num_time_anchors.
        num_layers: L.
        num_timesteps: T (1000).

    Returns:
        (num_time_anchors * L, 2F).
    """
    times = torch.arange(0, num_timesteps, num_timesteps // num_time_anchors)
    t, layer = torch.cartesian_prod(times, torch.arange(num_layers)).unbind(1)
    return encode(t, layer, w)


def normalised_pair(t: Tensor, layer: Tensor, num_timesteps: int, num_layers: int) -> Tensor:
    """The variant without encoding: (2 t/(T-1) - 1, 2 l/(L-1) - 1), shape (..., 2), float32 (their BasicEncoder)."""
    return torch.stack([2 * t.float() / (num_timesteps - 1) - 1, 2 * layer.float() / (num_layers - 1) - 1], dim=-1)
