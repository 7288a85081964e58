"""DDIM there and back (Song et al. 2021, eq. 12 with eta = 0): one picture's latents as the path its noise would take.

As NullInversion in null_text_w_ptp.ipynb (google/prompt-to-prompt) and VaeInversion in StyleDiffusion's
stylediffusion.py. Symbols: z (latents), a (alpha_bar), T (steps), tau_k (the k-th timestep, ascending).
Axes: T steps, B pictures, C latent channels, H, W latent sides, S image positions, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.model.attention_control import Layer, Record
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.shared_calls import Call, Calls, answered
from hiperlab.model.stack import FrozenStack


def timesteps(steps: int, length: int = 1000) -> list[int]:
    """tau_0 .. tau_{T-1}, ascending: 1 + k floor(length / T), the "leading" spacing with an offset of 1.

    Raises:
        UserError: no step at all, or so many that the last one is beyond the schedule.
    """
    if not 1 <= steps < length:
        raise UserError(f"sampler.steps={steps} cannot be inverted. Choose 1 to {length - 1}; published are 30 and 50.")
    return [1 + k * (length // steps) for k in range(steps)]


def move(latents: Tensor, noise: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """From one noise level to another with the same clean latents and noise (Song et al. 2021, eq. 12, eta = 0).

    Args:
        latents: z (B, C, H, W) at the level `start`.
        noise: predicted noise, same shape.
        start: alpha_bar of the level that `latents` are at, 0-d, in (0, 1).
        end: alpha_bar of the level to go to, 0-d, in (0, 1).

    Returns:
        z (B, C, H, W) at the level `end`.
    """
    clean = (latents - (1 - start).sqrt() * noise) / start.sqrt()
    return end.sqrt() * clean + (1 - end).sqrt() * noise


def levels(stack: FrozenStack, timestep: int, steps: int) -> tuple[Tensor, Tensor]:
    """alpha_bar, 0-d each, at `timestep` and one of T = `steps` steps below it, at the least that of timestep 0."""
    below = timestep - stack.num_timesteps // steps
    return stack.alpha_bar[timestep], stack.alpha_bar[max(below, 0)]


def previous(stack: FrozenStack, latents: Tensor, noise: Tensor, timestep: int, steps: int) -> Tensor:
    """One step of denoising (B, C, H, W), from `timestep` to the level below (`prev_step` in the authors' notebook).

    Args:
        stack: the frozen model.
        latents: z (B, C, H, W) at `timestep`.
        noise: predicted noise, same shape.
        timestep: in [0, 1000).
        steps: T.
    """
    here, below = levels(stack, timestep, steps)
    return move(latents, noise, here, below)


def following(stack: FrozenStack, latents: Tensor, noise: Tensor, timestep: int, steps: int) -> Tensor:
    """One step of inversion (B, C, H, W), from the level below up to `timestep` (`next_step` in the authors' notebook).

    Args:
        stack: the frozen model.
        latents: z (B, C, H, W) one step below `timestep`.
        noise: predicted noise, same shape.
        timestep: in [0, 1000).
        steps: T.
    """
    here, below = levels(stack, timestep, steps)
    return move(latents, noise, below, here)


def noise_calls(
    stack: FrozenStack,
    latents: Tensor,
    timestep: int,
    conditioning: Conditioning,
    level: Tensor | None = None,
    apart: bool = False,
) -> Calls[Tensor]:
    """The noise (B, C, H, W) that the U-Net sees in z at `timestep`; a predicted velocity is converted.

    With v = sqrt(a) eps - sqrt(1 - a) z_0 (Salimans & Ho 2022, section 4), eps = sqrt(a) v + sqrt(1 - a) z.

    Args:
        stack: the frozen model.
        latents: z (B, C, H, W).
        timestep: what the U-Net is told, in [0, 1000).
        conditioning: of B rows.
        level: alpha_bar that z is at, 0-d, where that is not the timestep's: DDIM inversion asks about z at the level
            below, and converts with that level as diffusers' DDIMInverseScheduler.step does.
        apart: see `Call`.
    """
    when = torch.full((len(latents),), timestep, device=latents.device)
    found = yield Call(latents, when, conditioning, apart=apart)
    if stack.prediction_type != "v_prediction":
        return found
    here = stack.alpha_bar[timestep] if level is None else level
    return here.sqrt() * found + (1 - here).sqrt() * latents


predict_noise = answered(noise_calls)


@dataclass(frozen=True)
class Inversion:
    """The pivot of an inversion, and the attention maps seen on the way.

    Attributes:
        latents: (T+1, B, C, H, W), from the picture (0) to its noise (T).
        maps: by layer (T, B, heads, S, N), entry k recorded while the noise of `latents[k]` was predicted at tau_k;
            empty unless asked for.
    """

    latents: Tensor
    maps: dict[Layer, Tensor]


@torch.no_grad()
def inversion_calls(
    stack: FrozenStack,
    latents: Tensor,
    conditioning: Conditioning,
    steps: int,
    wanted: Callable[[Layer, int], bool] | None = None,
    unconditional: Conditioning | None = None,
    guidance: float = 1.0,
) -> Calls[Inversion]:
    """Run DDIM backwards, by default with the conditional prediction alone: guidance 1 (NullInversion.ddim_loop).

    The noise of z at the level of tau_{k-1} is predicted with the upper timestep tau_k, as all public code does.

    Args:
        stack: the frozen model.
        latents: z_0 (B, C, H, W), scaled.
        conditioning: of B rows: the source texts.
        steps: T.
        wanted: which attention maps to keep, of the conditional prediction.
        unconditional: of guidance's other branch, B rows; None for guidance 1.
        guidance: w in e_u + w (e_c - e_u), where `unconditional` is given.
    """
    pivot, kept = [latents], []
    for timestep in timesteps(steps, stack.num_timesteps):
        record = Record(wanted) if wanted else None
        _, below = levels(stack, timestep, steps)
        noise = yield from noise_calls(stack, pivot[-1], timestep, conditioning.controlled(record), below)
        if unconditional is not None:  # a call of its own: `record` then keeps the conditional rows' maps alone
            without = yield from noise_calls(stack, pivot[-1], timestep, unconditional, below)
            noise = without + guidance * (noise - without)
        pivot.append(following(stack, pivot[-1], noise, timestep, steps))
        kept.append(record.maps if record else {})
    return Inversion(torch.stack(pivot), {layer: torch.stack([maps[layer] for maps in kept]) for layer in kept[0]})


invert = answered(inversion_calls)
