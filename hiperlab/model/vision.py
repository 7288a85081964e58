"""A CLIP picture tower as methods read it: pooled class token, patch tokens, the class token of every second layer.

Axes: B pictures, P patches, D vision width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class Seen(NamedTuple):
    """What a tower makes of pictures.

    Attributes:
        pooled: (B, D), the class token after the last norm.
        tokens: (B, P, D), patch tokens of the last layer before that norm.
        classes: (B, layers // 2, D), the class token of layers 2, 4, ... (counted from 1) after that norm.
    """

    pooled: Tensor
    tokens: Tensor
    classes: Tensor


def preprocess(pixels: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalised as CLIP's.

    As the public E4T reimplementation does it (methods/e4t.md, section 5.1): bicubic with aligned corners and without
    antialiasing, the aspect ratio is not kept, nothing is clamped.
    """
    small = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(3, 1, 1) for values in (MEAN, STD))
    return ((small + 1) / 2 - mean) / std


class VisionTower(nn.Module):
    """Reads pictures with transformers' CLIPVisionModel (OpenCLIP's towers convert to it, `formats.open_clip`).

    Args:
        network: the model.
        size: side it reads, in pixels.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    @property
    def width(self) -> int:
        """D."""
        return int(self._inner.post_layernorm.weight.shape[0])

    @property
    def _inner(self) -> Any:
        return getattr(self.network, "vision_model", self.network)  # transformers before and after 5.6

    def forward(self, pixels: Tensor) -> Seen:
        """Pictures (B, 3, H, W) in [-1, 1] of any size."""
        network: Any = self.network
        found = network(pixel_values=preprocess(pixels, self.size), output_hidden_states=True)
        layers, norm = found.hidden_states, self._inner.post_layernorm  # the first are embeddings, not a layer
        classes = torch.stack([norm(layer[:, 0]) for layer in layers[2::2]], dim=1)
        return Seen(norm(layers[-1][:, 0]), layers[-1][:, 1:], classes)
