"""Judges without judgement: tiny encoders with random weights, so that everything around a score runs offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hiperlab.metric.edit.extractor import KeyEncoder, LpipsEncoder, lpips_network
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import ClipEncoder, Encoder, VisionEncoder
from hiperlab.metric.preprocess import Preprocess, make_transform


@dataclass(frozen=True)
class RandomClip(EncoderConfig):
    """A tiny CLIP with random weights from a seed: no files, no meaning, real plumbing."""

    hashed_as: ClassVar[str] = "TwinClip"  # its name when protocols were first hashed

    seed: int
    width: int
    preprocess: Preprocess

    def load(self, key: str) -> Encoder:
        """Build it; the same seed gives the same weights, and the global random state stays as it was."""
        import open_clip

        network = _seeded(
            self.seed,
            lambda: open_clip.CLIP(
                embed_dim=self.width,
                vision_cfg={"image_size": self.preprocess.crop, "layers": 2, "width": self.width, "head_width": 16,
                            "patch_size": self.preprocess.crop // 4},
                text_cfg={"context_length": 77, "vocab_size": 49408, "width": self.width, "heads": 2, "layers": 2},
            ),
        )  # fmt: skip
        return ClipEncoder(network, make_transform(self.preprocess), open_clip.SimpleTokenizer(context_length=77))


@dataclass(frozen=True)
class RandomVision(EncoderConfig):
    """A tiny vision transformer with random weights from a seed, in DINO's place."""

    hashed_as: ClassVar[str] = "TwinVision"  # its name when protocols were first hashed

    seed: int
    width: int
    preprocess: Preprocess

    def load(self, key: str) -> Encoder:
        """Build it; the same seed gives the same weights, and the global random state stays as it was."""
        from timm.models.vision_transformer import VisionTransformer

        crop = self.preprocess.crop
        network = _seeded(
            self.seed,
            lambda: VisionTransformer(
                img_size=crop, patch_size=crop // 4, embed_dim=self.width, depth=2, num_heads=2, num_classes=0
            ),
        )
        return VisionEncoder(network, make_transform(self.preprocess))


@dataclass(frozen=True)
class RandomKeys(RandomVision):
    """The same transformer's keys, for the structure distance."""

    hashed_as: ClassVar[str] = "TwinKeys"  # its name when protocols were first hashed

    def load(self, key: str) -> Encoder:
        """Build it."""
        loaded = super().load(key)
        assert isinstance(loaded, VisionEncoder)
        return KeyEncoder(loaded.network, loaded.transform, raw=False)


@dataclass(frozen=True)
class RandomLpips(EncoderConfig):
    """LPIPS over AlexNet with random weights from a seed; only its learnt heads are real."""

    hashed_as: ClassVar[str] = "TwinLpips"  # its name when protocols were first hashed

    seed: int

    def load(self, key: str) -> Encoder:
        """Build it; the same seed gives the same weights, and the global random state stays as it was."""
        return LpipsEncoder(_seeded(self.seed, lambda: lpips_network("alex")))


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build` under its own random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
