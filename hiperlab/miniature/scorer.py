"""Stage scorer: a CLIP in open_clip's form with its own pictures and start; it judges and never conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as as_bytes
from torch import Tensor

from hiperlab import files
from hiperlab.miniature import tokenizer as words
from hiperlab.miniature.clip import Captioned, check, contrastive
from hiperlab.miniature.fit import train
from hiperlab.miniature.module import Fit, StageModule, freeze
from hiperlab.miniature.pictures import Pictures
from hiperlab.miniature.plan import Workshop

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def config(size: int, tokens: int, space: int, vision: dict[str, int], text: dict[str, int]) -> dict[str, Any]:
    """What open_clip_config.json says: the network and how pictures are prepared."""
    return {
        "model_cfg": {
            "embed_dim": space,
            "vision_cfg": {"image_size": size, **vision},
            "text_cfg": {"context_length": words.LENGTH, "vocab_size": tokens, **text},
        },
        "preprocess_cfg": {
            "size": size,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


class ScorerModule(StageModule):
    """An open_clip network with the contrastive loss.

    Args:
        fit, seed: as in StageModule.
        network: open_clip's CLIP.
        data: the judges' pictures and captions.
    """

    def __init__(self, fit: Fit, seed: int, network: Any, data: Captioned) -> None:
        super().__init__(fit, seed)
        self.network, self.data = network, data

    def embed(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and token ids -> (B, D) each."""
        return self.network.encode_image(pixels), self.network.encode_text(ids)

    def loss(self, step: int) -> Tensor:
        """Contrast of the step's pairs."""
        images, texts = self.embed(*self.data.step(self.seed, "scorer", step, self.fit_settings.batch))
        return contrastive(images.float(), texts.float(), self.network.logit_scale)


def save(network: Any, described: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Write the folder `hiperlab.metric.encoder.FolderClip` and open_clip read, in half precision."""
    tensors = {key: value.detach().half().cpu().contiguous() for key, value in network.state_dict().items()}
    tokenizer.save_pretrained(folder)
    files.atomic_write(folder / WEIGHTS, as_bytes(tensors))
    files.atomic_write(folder / CONFIG, json.dumps(described, indent=2) + "\n")


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    space: int,
    vision: dict[str, int],
    text: dict[str, int],
    check_pictures: int,
) -> dict[str, Any]:
    """The stage."""
    import open_clip

    tokenizer = words.load(shop.weights("tokenizer"))
    pictures = Pictures(shop.folder("data") / "judge", shop.device, shop.cache_pictures)
    described = config(shop.reading_size, len(tokenizer), space, vision, text)
    torch.manual_seed(shop.seed + 5)
    module = ScorerModule(
        Fit(**fit),
        shop.seed,
        open_clip.CLIP(**described["model_cfg"]),
        Captioned(pictures, tokenizer, shop.reading_size),
    )
    outcome = train(shop, "scorer", module)
    freeze(module.float().to(shop.device))
    save(module.network, described, tokenizer, shop.weights("scorer"))
    held = Captioned(Pictures(shop.folder("data") / "held", shop.device), tokenizer, shop.reading_size)
    return outcome | {"check": check(module.embed, held, check_pictures)}
