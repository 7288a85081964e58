"""The U-Net's first half alone: what it makes of a noisy picture before it starts to draw. B rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FirstHalf(nn.Module):
    """conv_in, the down blocks and the mid block of diffusers' U-Net, as its own forward pass calls them.

    Args:
        unet: the whole U-Net; it stays `unet` in parameter names, so changed weights can stand in (functional_call).
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(self, latents: Tensor, timestep: Tensor, states: Any) -> tuple[Tensor, ...]:
        """All maps that the second half would read, then the mid block's: 13 for SD, each (B, C_i, H_i, W_i).

        Args:
            latents: z_t (B, C, H, W).
            timestep: (B,) int64.
            states: what cross-attention reads.
        """
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timestep))
        sample = unet.conv_in(latents)
        maps = (sample,)
        for block in unet.down_blocks:
            more = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
            sample, found = block(hidden_states=sample, temb=embedding, **more)
            maps += tuple(found)
        return *maps, unet.mid_block(sample, embedding, encoder_hidden_states=states)
