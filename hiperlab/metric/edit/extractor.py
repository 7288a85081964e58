"""Encoders that compare an edit with its source place by place: pixels, keys of a vision transformer, LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from hiperlab.metric.extractor import Encoder, content, exact


class PixelEncoder(Encoder):
    """Pictures as they are, brought to one size.

    Args:
        size: side in pixels; the middle of a picture that is not square is kept.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weights = f"pixels-{size}"

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B pictures -> (B, 3, size, size) in [0, 1]; one of this size already is not touched."""
        return torch.stack([self._one(picture) for picture in pictures])

    def _one(self, picture: Image.Image) -> Tensor:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        if side != self.size:
            square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


class KeyEncoder(Encoder):
    """Keys of a vision transformer's last block, all heads side by side, the class token first (Splice's reading).

    Args:
        network: timm's vision transformer.
        transform: RGB picture -> (3, H, W); its last step normalises.
        raw: normalise values of 0 to 255 instead of 0 to 1, as PIE-Bench's evaluator does.
    """

    def __init__(self, network: nn.Module, transform: Callable[[Image.Image], Tensor], raw: bool) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.transform, self.raw = transform, raw
        self.weights = content(network, f"{transform!r} raw={raw}")

    def patches(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B pictures -> (B, N, D)."""
        network: Any = self.network
        seen: list[Tensor] = []
        handle = network.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            with exact():
                device = next(self.network.parameters()).device
                network(torch.stack([self._pixels(picture) for picture in pictures]).to(device))
        finally:
            handle.remove()
        return seen[0].chunk(3, dim=-1)[1]  # query, key, value

    def _pixels(self, picture: Image.Image) -> Tensor:
        """What the network is fed, (3, H, W)."""
        if not self.raw:
            return self.transform(picture)
        *before, normalise = self.transform.transforms  # type: ignore[attr-defined]
        values: Any = picture
        for step in before:
            values = step(values)
        return normalise(255 * values)


def lpips_network(net: str) -> Any:
    """LPIPS v0.1 over "squeeze", "alex" or "vgg": its own learnt weights, the backbone's random until they are loaded.

    A private class of torchmetrics, hence its upper bound in pyproject.toml: the public one cannot be built without
    fetching a backbone, and ours comes from a file that the user may name.
    """
    return _NoTrainLpips(net=net, pnet_rand=True)  # type: ignore[arg-type]


class LpipsEncoder(Encoder):
    """LPIPS v0.1 with its learnt weights.

    Args:
        network: from `lpips_network`, backbone weights loaded.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.weights = content(network)

    def perceptual(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        """LPIPS of pairs of one size (B,); the one of `others` counts for all pictures."""
        a, b = (
            torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in each])
            for each in (pictures, others)
        )
        return self.perceptual_raw(a, b)

    def perceptual_raw(self, fed: Tensor, others: Tensor) -> Tensor:
        """LPIPS of pixels as they are (B,): the network was made for [-1, 1]."""
        device = next(self.network.parameters()).device
        with exact():
            return self.network(fed.to(device), others.expand_as(fed).to(device)).reshape(len(fed)).cpu()
