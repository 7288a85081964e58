"""A CLIP picture tower as methods read it: pooled class token, patch tokens, the class token of every second layer.

Axes: B pictures, P patches, D vision width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
CACHE_BYTES = 1_000_000_000  # of one process; ViT-H-14 sees 1.3 MB in a picture, the miniature's tower 26 kB


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


def preprocess(
    pixels: Tensor,
    size: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    align_corners: bool = True,
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalised as CLIP's unless told otherwise.

    Bicubic without antialiasing, the aspect ratio is not kept, nothing is clamped. With aligned corners as the public
    E4T reimplementation (e4t/encoder.py, preprocess), without as StyleDiffusion (stylediffusion.py, Trainer).
    """
    small = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=align_corners)
    middle, spread = (pixels.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((small + 1) / 2 - middle) / spread


def clip_pixels(pixels: Tensor, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Square pictures (B, 3, S, S) in [-1, 1] -> (B, 3, size, size) as transformers' CLIPImageProcessor makes them.

    In 8 bits, bicubic with antialiasing, normalised. Of a square nothing is cut.
    """
    levels = ((pixels.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    small = [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in levels]
    found = torch.stack([torch.from_numpy(np.array(each)) for each in small]).permute(0, 3, 1, 2).to(pixels) / 255
    middle, spread = (found.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (found - middle) / spread


class VisionTower(nn.Module):
    """Reads pictures with transformers' CLIPVisionModel (OpenCLIP's towers convert to it, `formats.open_clip`).

    Args:
        network: the model.
        size: side it reads, in pixels.
        mean, std: of the pictures it was trained on, in [0, 1], per channel.
    """

    def __init__(self, network: nn.Module, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.mean, self.std = tuple(mean), tuple(std)

    @property
    def width(self) -> int:
        """D."""
        return int(self._inner.post_layernorm.weight.shape[0])

    @property
    def patches(self) -> int:
        """P."""
        return len(self._inner.embeddings.position_embedding.weight) - 1

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return len(self._inner.encoder.layers)

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """(8,) norms of weights from the first to the last layer, by which a tower is told from another."""
        weights = [layer.mlp.fc1.weight for layer in self._inner.encoder.layers]
        chosen = [self._inner.embeddings.patch_embedding.weight, *weights]
        picked = [chosen[number * (len(chosen) - 1) // 7] for number in range(8)]
        return torch.stack([weight.double().norm() for weight in picked]).float().cpu()

    @property
    def _inner(self) -> Any:
        return getattr(self.network, "vision_model", self.network)  # transformers before and after 5.6

    def forward(self, pixels: Tensor) -> Seen:
        """What the tower makes of pictures (B, 3, H, W) in [-1, 1], of any size."""
        network: Any = self.network
        found = network(pixel_values=preprocess(pixels, self.size, self.mean, self.std), output_hidden_states=True)
        layers, norm = found.hidden_states, self._inner.post_layernorm  # the first are embeddings, not a layer
        classes = torch.stack([norm(layer[:, 0]) for layer in layers[2::2]], dim=1)
        return Seen(norm(layers[-1][:, 0]), layers[-1][:, 1:], classes)

    @torch.no_grad()
    def projected(self, pixels: Tensor) -> Tensor:
        """CLIP's embedding of pictures (B, width of the common space); the network must have its projection.

        Args:
            pixels: as `clip_pixels` gives them.
        """
        network: Any = self.network
        found: Tensor = network(pixel_values=pixels).image_embeds
        return found

    @torch.no_grad()
    def last_but_one(self, pixels: Tensor) -> Tensor:
        """Class and patch tokens (B, P + 1, D) before the last layer, without a norm; pixels as `projected`."""
        network: Any = self.network
        found: Tensor = network(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return found

    @torch.no_grad()
    def all_tokens(self, pixels: Tensor) -> Tensor:
        """Class and patch tokens (B, P + 1, D) after the last norm, unprojected: E(x) of StyleDiffusion's clip_util.py.

        Args:
            pixels: square pictures (B, 3, H, H) in [-1, 1].
        """
        network: Any = self.network
        small = preprocess(pixels, self.size, self.mean, self.std, align_corners=False)
        found: Tensor = self._inner.post_layernorm(network(pixel_values=small).last_hidden_state)
        return found


class SeenCache:
    """What a frozen tower makes of pictures, kept for the next time; a picture is known by its pixels.

    The tower is kept out of the module tree: it is frozen, stays float32 and goes into no checkpoint.

    Args:
        tower: reads the pictures.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower.eval().requires_grad_(False)
        self.kept: OrderedDict[bytes, Seen] = OrderedDict()
        self.bytes = 0

    def clear(self) -> None:
        """Forget everything, for a tower whose weights were replaced."""
        self.kept.clear()
        self.bytes = 0

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Seen:
        """What the tower makes of pictures (B, 3, H, W) in [-1, 1]; each is read alone, so batches change nothing."""
        found = []
        for picture in pixels.float():
            key = hashlib.blake2b(picture.cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
            if key not in self.kept:
                seen = self.tower.to(picture.device)(picture[None])
                # All patch tokens are kept, though E4T's encoder reads every second one only: that choice is its own.
                self.kept[key] = Seen(*(each[0] for each in seen))
                self.bytes += _size(self.kept[key])
                while self.bytes > CACHE_BYTES and len(self.kept) > 1:
                    self.bytes -= _size(self.kept.popitem(last=False)[1])
            found.append(Seen(*(each.to(pixels.device) for each in self.kept[key])))
        return Seen(*(torch.stack(each) for each in zip(*found, strict=True)))


def _size(seen: Seen) -> int:
    return sum(each.numel() * each.element_size() for each in seen)
