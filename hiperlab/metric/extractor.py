"""Frozen encoders at work: PIL pictures or texts in, unit vectors out. Always float32, never a gradient."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hiperlab.errors import UserError
from hiperlab.metric.compare import unit


class Encoder(nn.Module):
    """What a metric may ask of an encoder; any embedder becomes a judge by subclassing it and its `EncoderConfig`.

    Attributes:
        weights: 12 hex digits naming the weights by content: the same tensors give the same digits whatever file held
            them, so that scores of different weights are never averaged.
    """

    weights: str

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embed B RGB pictures: unit rows (B, D) float32, or a row of NaN where there is nothing to embed."""
        raise NotImplementedError

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts into the pictures' space: unit rows (B, D) float32."""
        raise UserError(f"{type(self).__name__} has no text tower: give the text score a CLIP encoder.")

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B pictures as pixels of one size: (B, 3, H, W) in [0, 1]."""
        raise UserError(f"{type(self).__name__} gives no pixels: give the score the pixel encoder.")

    def patches(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Deep features of B pictures' patches: (B, N, D)."""
        raise UserError(f"{type(self).__name__} gives no patches: give the structure score such an encoder.")

    def perceptual(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        """Perceptual distance of pairs of pictures: (B,)."""
        raise UserError(f"{type(self).__name__} gives no perceptual distance: give the score an LPIPS encoder.")

    def perceptual_raw(self, fed: Tensor, others: Tensor) -> Tensor:
        """Perceptual distance (B,) of (B, 3, H, W) and (1 or B, 3, H, W), fed to the network as they are."""
        raise UserError(f"{type(self).__name__} gives no perceptual distance: give the score an LPIPS encoder.")


class VisionEncoder(Encoder):
    """A network with pictures only, such as DINO.

    Args:
        network: takes (B, 3, H, W), returns (B, D).
        transform: RGB picture -> (3, H, W).
    """

    def __init__(self, network: nn.Module, transform: Callable[[Image.Image], Tensor]) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.transform = transform
        self.weights = content(network, repr(transform))

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embed B RGB pictures (B, D)."""
        with exact():
            return unit(self._encode(torch.stack([self.transform(picture) for picture in pictures]).to(self._device())))

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), any length."""
        return self.network(pixels)

    def _device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device


class ClipEncoder(VisionEncoder):
    """A CLIP in open_clip's form: two towers, one space.

    Args:
        network: has encode_image and encode_text.
        transform: RGB picture -> (3, H, W).
        tokenizer: texts -> token ids (B, N); cuts at the context length.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
    ) -> None:
        super().__init__(network, transform)
        self.tokenizer = tokenizer

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts (B, D)."""
        with exact():
            return unit(self.network.encode_text(self.tokenizer(list(texts)).to(self._device())))  # type: ignore[operator]

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), any length."""
        return self.network.encode_image(pixels)  # type: ignore[operator]


def content(network: nn.Module, extra: str = "") -> str:
    """12 hex digits of a sha256 over all tensors (name, type, shape, bytes) and `extra` settings."""
    digest = hashlib.sha256(extra.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No gradient, no autocast, no TF32: a run's precision must not move its scores.

    Per backend, because torch's global getter raises as soon as anybody has used the per-backend switches.
    """
    backends: Any = torch.backends  # its submodules' switches are made at run time, type checkers miss them
    precisions = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    before = [each.fp32_precision for each in precisions]
    for each in precisions:
        each.fp32_precision = "ieee"
    try:
        with (
            torch.no_grad(),  # not inference mode: its tensors cannot be kept in a metric's state
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for each, value in zip(precisions, before):
            each.fp32_precision = value
