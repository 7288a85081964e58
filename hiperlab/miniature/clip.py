"""Stage clip: text and picture towers, contrastive; the text tower becomes the U-Net's condition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as as_bytes
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from hiperlab import files
from hiperlab.miniature import tokenizer as words
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import rows
from hiperlab.miniature.module import Fit, StageModule, freeze
from hiperlab.miniature.pictures import Pictures
from hiperlab.miniature.plan import Workshop

PROJECTION = "text_projection.safetensors"
LARGEST_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5


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


def top1(queries: Tensor, gallery: Tensor) -> float:
    """Share of queries (N, D) whose most similar row of the gallery (N, D) is their own."""
    found = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).argmax(dim=1)
    return float((found == torch.arange(len(found), device=found.device)).float().mean())


def build_text(tokenizer: Any, width: int, layers: int, heads: int) -> CLIPTextModel:
    """A narrow CLIP text tower."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=words.LENGTH, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def build_vision(
    size: int, width: int, layers: int, heads: int, patch: int, space: int
) -> CLIPVisionModelWithProjection:
    """A narrow CLIP picture tower."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=size, patch_size=patch, projection_dim=space,
        )
    )  # fmt: skip


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


def trim(ids: Tensor, end: int, multiple: int = 16) -> Tensor:
    """Leave out the padding behind every text's end: attention is causal, so what is learnt stays the same.

    Args:
        ids: (B, 77), each row padded behind its first `end`.
        end: the end token.
        multiple: lengths are rounded up to it, so that a compiled network sees few shapes.
    """
    longest = int((ids == end).int().argmax(dim=1).max()) + 1
    return ids[:, : -(-longest // multiple) * multiple]


class ClipModule(StageModule):
    """Both towers with the contrastive loss.

    Args:
        fit, seed: as in StageModule.
        text, vision: the towers.
        data: what they learn from.
    """

    def __init__(
        self, fit: Fit, seed: int, text: CLIPTextModel, vision: CLIPVisionModelWithProjection, data: Captioned
    ) -> None:
        super().__init__(fit, seed)
        self.text, self.vision, self.data = text, vision, data
        self.projection = nn.Linear(text.config.hidden_size, vision.config.projection_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and token ids -> (B, D) each, any length."""
        return self.vision(pixel_values=pixels).image_embeds, self.projection(self.text(input_ids=ids).pooler_output)

    def loss(self, step: int) -> Tensor:
        """Contrast of the step's pairs."""
        pixels, ids = self.data.step(self.seed, "clip", step, self.fit_settings.batch)
        end: Any = self.text.config.eos_token_id
        images, texts = self.fast("embed", self.embed)(pixels, trim(ids, end))
        return contrastive(images.float(), texts.float(), self.log_scale)


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
    text: dict[str, int],
    vision: dict[str, int],
    space: int,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage."""
    tokenizer = words.load(shop.weights("tokenizer"))
    main = Pictures(shop.folder("data") / "main", shop.device, shop.cache_pictures)
    torch.manual_seed(shop.seed + 1)
    towers = build_text(tokenizer, **text), build_vision(shop.reading_size, **vision, space=space)
    module = ClipModule(Fit(**fit), shop.seed, *towers, Captioned(main, tokenizer, shop.reading_size))
    outcome = train(shop, "clip", module)
    freeze(module.float().to(shop.device))
    folder = shop.weights("clip")
    save(module, folder)
    held = Captioned(Pictures(shop.folder("data") / "held", shop.device), tokenizer, shop.reading_size)
    return outcome | {"check": check(module.embed, held, check_pictures)}


def save(module: ClipModule, folder: Path) -> None:
    """Both towers as transformers' folders, the text projection beside the picture tower it belongs to."""
    module.text.save_pretrained(folder / "text_encoder")
    module.vision.save_pretrained(folder / "image_encoder")
    weight = module.projection.weight.detach().cpu().contiguous()
    files.atomic_write(folder / "image_encoder" / PROJECTION, as_bytes({"weight": weight}))


def load_text(shop: Workshop) -> Any:
    """The trained text tower, frozen, on the device."""
    path = str(shop.weights("clip") / "text_encoder")
    text: Any = CLIPTextModel.from_pretrained(path, local_files_only=True)
    return freeze(text.to(shop.device))
