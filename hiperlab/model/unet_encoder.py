"""The first half of the U-Net, down to its middle block, which E4T's encoder reads.

As `return_encoder_outputs` in e4t/models/unet_2d_condition.py (mkshing/e4t-diffusion).
Axes: B rows, C_i channels of map i and H_i, W_i its sides, N tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class UNetEncoder(nn.Module):
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
            timestep: (B,) int64 in [0, 1000).
            states: what cross-attention reads, (B, N, D).
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


def encoder_features(
    unet: nn.Module, latents: Tensor, timestep: Tensor, states: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The maps of `UNetEncoder` with other weights by the U-Net's names, in the U-Net's type.

    Args:
        unet: diffusers' U-Net.
        latents: z_t (B, C, H, W).
        timestep: (B,) int64 in [0, 1000).
        states: text states (B, N, D).
        weights: used instead of the U-Net's own, same shapes; empty for none.
    """
    dtype = next(unet.parameters()).dtype
    named = {f"unet.{name}": weight for name, weight in weights.items()}
    return functional_call(UNetEncoder(unet), named, (latents.to(dtype), timestep, states.to(dtype)))


def map_channels(unet: nn.Module) -> tuple[list[int], list[int]]:
    """Channels C_i of all maps, and which of them are the down blocks' outputs (3, 6, 9, 11 of SD's 13)."""
    net: Any = unet
    channels, ends = [net.conv_in.out_channels], []
    for block in net.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [layer.out_channels for layer in block.downsamplers or ()]
        ends.append(len(channels) - 1)
    return [*channels, net.mid_block.resnets[-1].out_channels], ends
