"""Stage scorer: a CLIP in open_clip's form with its own pictures and start; it judges and never conditions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as as_bytes
from torch import Tensor

from hiperlab import files
from hiperlab.miniature import parts
from hiperlab.miniature.fit import train
from hiperlab.miniature.identity import top1
from hiperlab.miniature.keys import rows
from hiperlab.miniature.module import Fit, StageModule
from hiperlab.miniature.pictures import Pictures
from hiperlab.miniature.plan import Workshop

LARGEST_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def contrastive(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over all pairs of a batch (CLIP, Radford et al. 2021, figure 3).

    Args:
        images: (B, D), any length.
        texts: (B, D), any length; row i of both belongs together.
        log_scale: logarithm of the inverse temperature, held at 100 at most.
    """
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would round logits of 100 to whole numbers
        pairs = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    logits = log_scale.clamp(max=LARGEST_SCALE).exp() * pairs
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class Captioned:
    """Pictures with token ids, as contrastive stages draw them."""

    def __init__(self, pictures: Pictures, tokenizer: Any, size: int) -> None:
        self.pictures, self.ids, self.size = pictures, pictures.tokens(tokenizer), size

    def step(self, seed: int, purpose: str, step: int, batch: int) -> tuple[Tensor, Tensor]:
        """The step's pictures (B, 3, H, W) and one wording's token ids (B, 77) of each."""
        chosen = rows(seed, purpose, step, len(self.pictures), batch)
        which = rows(seed, f"{purpose} wording", step, self.ids.shape[1], batch)
        ids = self.ids[chosen.to(self.ids.device), which.to(self.ids.device)]
        return self.pictures.batch(chosen, self.size), ids.long()


def config(size: int, tokens: int, space: int, vision: dict[str, int], text: dict[str, int]) -> dict[str, Any]:
    """What open_clip_config.json says: the network and how pictures are prepared."""
    return {
        "model_cfg": {
            "embed_dim": space,
            "vision_cfg": {"image_size": size, **vision},
            "text_cfg": {"context_length": parts.LENGTH, "vocab_size": tokens, **text},
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


@torch.no_grad()
def check(embed: Any, data: Captioned, most: int) -> dict[str, Any]:
    """Retrieval among up to `most` held-out pictures: picture -> its caption."""
    parts = []
    for part in torch.arange(min(len(data.pictures), most)).split(50):
        parts.append(embed(data.pictures.batch(part, data.size), data.ids[part.to(data.ids.device), 0].long()))
    images, texts = (torch.cat(side).float() for side in zip(*parts))
    return {"retrieval_top1": round(top1(images, texts), 4), "pictures": len(images)}


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

    tokenizer = parts.load_tokenizer(shop.base)
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
    parts.freeze(module.float().to(shop.device))
    save(module.network, described, tokenizer, shop.weights("scorer"))
    held = Captioned(Pictures(shop.folder("data") / "held", shop.device), tokenizer, shop.reading_size)
    return outcome | {"check": check(module.embed, held, check_pictures)}
