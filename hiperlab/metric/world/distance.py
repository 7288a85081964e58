"""How far a sample is from the picture the world draws for its prompt, the camera being nobody's fault.

A prompt leaves the camera open (and the pose, where it names none), so the truth is drawn under a small fixed grid of
cameras, and the nearest one counts. Textures of a place are chance and cost everybody the same.

Axes: G truths (cameras, and poses where the prompt names none), B samples, H = W = size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.metric.pixel_distance import blur, edge_distance
from hiperlab.metric.torchmetric import Similarity
from hiperlab.world.caption import parse, true_identity, true_scene
from hiperlab.world.draw import render
from hiperlab.world.identity import Identity
from hiperlab.world.vocabulary import POSES

SEED = 0  # of the textures
BINS = 6  # of a colour channel, for telling the subject from its ground
PARTS = ("pixel", "subject", "structure", "mask")


class Truths(NamedTuple):
    """What a prompt's picture may look like.

    Attributes:
        pictures: (G, 3, H, W) in [0, 1].
        masks: of the subject, float (G, H, W), 0 or 1.
        whole: whether the prompt names the place; if not, only the subject is compared.
    """

    pictures: Tensor
    masks: Tensor
    whole: bool


def truths(
    who: Identity, prompt: str, placeholder: str | None, size: int, shifts: Sequence[float], zooms: Sequence[float]
) -> Truths:
    """Draw the truth of a prompt under every camera of the grid, and in every pose where the prompt names none."""
    said = parse(prompt, placeholder)
    subject, base = true_identity(who, prompt, placeholder), true_scene(prompt, SEED, placeholder)
    poses = [base.pose] if "pose" in said else list(POSES)
    scenes = [
        replace(base, pose=pose, x=x, y=0.0, zoom=zoom, rotation=0.0, mirror=mirror)
        for pose in poses for x in shifts for zoom in zooms for mirror in (False, True)
    ]  # fmt: skip
    drawn = [render(subject, now, size) for now in scenes]
    pictures = torch.from_numpy(np.stack([p.rgb for p in drawn])).permute(0, 3, 1, 2).float() / 255
    return Truths(pictures, torch.from_numpy(np.stack([p.mask for p in drawn])).float(), "place" in said)


def distances(sample: Tensor, true: Truths) -> dict[str, Tensor]:
    """Distances of one sample (3, H, W) in [0, 1] to G truths, each (G,).

    pixel: mean absolute difference after a 3x3 blur, in [0, 1]; over the subject's mask only where the prompt names no
        place.
    subject: the same inside the subject's mask.
    structure: 1 - cosine of the edge maps, the mean over three sizes, in [0, 1].
    mask: 1 - intersection over union of the truth's mask and the sample's, which is guessed from colours.
    """
    picture = sample[None].expand_as(true.pictures)
    difference = (blur(picture) - blur(true.pictures)).abs().mean(1)
    region = torch.ones_like(true.masks) if true.whole else true.masks
    return {
        "pixel": _inside(difference, region),
        "subject": _inside(difference, true.masks),
        "structure": edge_distance(picture, true.pictures, region),
        "mask": 1 - overlap(guess_masks(picture, true), true.masks),
    }


def nearest(sample: Tensor, true: Truths) -> dict[str, Tensor]:
    """The distances to the one truth whose sum is least: each a number; "total" is their mean."""
    found = distances(sample, true)
    total = torch.stack([found[name] for name in PARTS]).mean(0)
    best = int(total.argmin())
    return {name: found[name][best] for name in PARTS} | {"total": total[best]}


def guess_masks(pictures: Tensor, true: Truths) -> Tensor:
    """Where the subject is in samples, judged by the colours of each truth's subject and ground: (G, H, W), 0 or 1.

    A pixel belongs to the subject if its colour is likelier inside the truth's mask than outside, near the mask (one
    eighth of the side around it). Colours that both have, or that the truth lacks, decide by nearness alone.
    """
    side = true.masks.shape[-1]
    reach = side // 16 * 2 + 1
    near = F.avg_pool2d(F.max_pool2d(true.masks[:, None], reach, 1, reach // 2), 3, 1, 1)[:, 0]
    inside, outside = _histogram(true.pictures, true.masks), _histogram(true.pictures, 1 - true.masks)
    colour = _bins(pictures).flatten(1)
    p, q = (table.gather(1, colour).view_as(true.masks) for table in (inside, outside))
    soft = F.avg_pool2d((near * p / (p + q))[:, None], 3, 1, 1)[:, 0]
    return (soft > 0.5).float()


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (G, H, W): (G,); two empty masks agree."""
    union = torch.maximum(a, b).sum((1, 2))
    return torch.where(union > 0, (a * b).sum((1, 2)) / union.clamp(min=1), torch.ones_like(union))


def _inside(values: Tensor, region: Tensor) -> Tensor:
    return (values * region).sum((1, 2)) / region.sum((1, 2)).clamp(min=1)


def _bins(pictures: Tensor) -> Tensor:
    """Colour bin of every pixel: (G, 3, H, W) in [0, 1] -> (G, H, W) int64 in [0, BINS**3)."""
    r, g, b = (pictures * BINS).long().clamp(0, BINS - 1).unbind(1)
    return (r * BINS + g) * BINS + b


def _histogram(pictures: Tensor, weights: Tensor) -> Tensor:
    """Share of each colour (G, BINS**3), with a little added so that unseen colours decide nothing."""
    out = torch.zeros(len(pictures), BINS**3, device=pictures.device)
    out.scatter_add_(1, _bins(pictures).flatten(1), weights.flatten(1))
    return (out + 0.5) / (out.sum(1, keepdim=True) + 0.5 * BINS**3)


def pack(true: Truths) -> Tensor:
    """Truths as one vector: side, `whole`, then pictures and masks."""
    head = torch.tensor([true.masks.shape[-1], float(true.whole)])
    return torch.cat([head, torch.cat([true.pictures.flatten(1), true.masks.flatten(1)], 1).flatten()])


def unpack(row: Tensor) -> Truths | None:
    """`pack` undone; NaN at the end is padding, and nothing but NaN is no truth."""
    row = row[: int((~row.isnan()).sum())]
    if not len(row):
        return None
    side, whole = int(row[0]), bool(row[1])
    table = row[2:].view(-1, 4 * side * side)
    cut = 3 * side * side
    return Truths(table[:, :cut].view(-1, 3, side, side), table[:, cut:].view(-1, side, side), whole)


class TruthDistance(Similarity):
    """The distance as a protocol's score; a prompt without a subject of the world has none.

    Args:
        encoder: `extractor.TruthEncoder`.
        scale: "cosine" leaves distances as they are.
    """

    higher_is_better = False

    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """Pixels (B, 3 H W), packed truths (B, M) -> (B,)."""
        values = []
        for sample, row in zip(embeddings, targets):
            true = unpack(row)
            nothing = sample.new_full((), torch.nan)
            side = 0 if true is None else true.masks.shape[-1]
            values.append(nothing if true is None else nearest(sample.view(3, side, side), true)["total"])
        return torch.stack(values) * (100 if self.scale == "percent" else 1)

    def embed(self, targets: Sequence[str]) -> Tensor:
        """B prompts -> (B, M)."""
        return self.encoder.texts(targets)
