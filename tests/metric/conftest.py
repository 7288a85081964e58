"""Fixtures of the metric room: an encoder whose embeddings are worked out by hand, and the twin protocol."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from hiperlab.metric.compare import unit
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.protocol import Protocol

CONF = Path(__file__).parents[2] / "conf" / "metric"


class ColourEncoder(Encoder):
    """Embeds a picture as its mean colour and a text as the colour it names; black is "nothing found"."""

    weights = "colour"
    words: ClassVar = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0), "yellow": (1.0, 1.0, 0)}

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        colours = torch.stack([torch.from_numpy(np.asarray(p).copy()).float().mean((0, 1)) for p in pictures])
        return unit(colours).masked_fill(colours.sum(-1, keepdim=True) == 0, torch.nan)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return unit(torch.tensor([self.words[text.split()[-1]] for text in texts]))


def plain(colour: tuple[int, int, int], size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def noise(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] // 8, size[1] // 8)).resize(size, Image.Resampling.BICUBIC)


@functools.cache
def composed(preset: str) -> Any:
    """A preset's settings as plain containers, composed as the door does: presets inherit."""
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return OmegaConf.to_container(compose(f"metric/{preset}").metric)


def load_protocol(preset: str, /, **changes: Any) -> Protocol:
    return instantiate(OmegaConf.merge(OmegaConf.create(composed(preset)), OmegaConf.create(changes)))


@pytest.fixture(scope="session")
def twin() -> Protocol:
    return load_protocol("twin")


@pytest.fixture(scope="session")
def encoders() -> dict:
    """Loaded encoders of the twin, kept for the session."""
    return {}


@pytest.fixture
def samples(tmp_path: Path) -> tuple[list[dict], dict[str, list[Image.Image]]]:
    """Two concepts, two prompts, two seeds, on disk; three and one references."""
    records = []
    for c, concept in enumerate(("cats", "mug")):
        for p, prompt in enumerate(("A photo of {} on a beach", "A painting of {}")):
            for seed in (1, 2):
                path = f"{concept}/{p}_{seed}.png"
                (tmp_path / concept).mkdir(exist_ok=True)
                noise(100 * c + 10 * p + seed).save(tmp_path / path)
                records.append(
                    {"concept": concept, "prompt": prompt, "text": prompt.replace("{}", f"<{concept}>"), "path": path,
                     "placeholder": f"<{concept}>", "word": concept.rstrip("s"), "seed": seed, "truncation": 16}
                )  # fmt: skip
    return records, {"cats": [noise(500 + i) for i in range(3)], "mug": [noise(600)]}
