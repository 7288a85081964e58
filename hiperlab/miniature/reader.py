"""Stage reader: reads kind, pose, place, style, accessory and light from a picture; the judge of prompt following."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.metric.world import network as truth_judge
from hiperlab.miniature.draw_shard import HEADS, JUDGING
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import rows, stream
from hiperlab.miniature.module import Fit, StageModule
from hiperlab.miniature.pictures import Pictures, soften
from hiperlab.miniature.plan import Workshop
from hiperlab.miniature.recoded import Reading


def heads_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Sum of the heads' cross-entropies: head -> (B, classes), head -> (B,)."""
    losses = [F.cross_entropy(output.float(), labels[name]) for name, output in outputs.items()]
    return torch.stack(losses).sum()


class ReaderModule(StageModule):
    """The reader with its loss.

    Args:
        fit, seed: as in StageModule.
        judge: the network, one head per attribute.
        pictures: the judges' sets.
    """

    def __init__(
        self,
        fit: Fit,
        seed: int,
        judge: truth_judge.Judge,
        pictures: Reading,
    ) -> None:
        super().__init__(fit, seed)
        self.judge, self.pictures = judge.to(memory_format=torch.channels_last), pictures

    def loss(self, step: int) -> Tensor:
        """Cross-entropies of the step's pictures."""
        chosen = rows(self.seed, "reader", step, len(self.pictures), self.fit_settings.batch)
        pixels = self.pictures.batch(chosen, self.seed, "reader", step)
        pixels = soften(pixels, stream(self.seed, "reader soften", step, self.device))
        labels = {name: self.pictures.labels[name][chosen].to(self.device) for name in self.judge.shape.heads}
        return heads_loss(self.judge(pixels), labels)


@torch.no_grad()
def accuracy(judge: truth_judge.Judge, pictures: Pictures, most: int) -> dict[str, float]:
    """Share of pictures read rightly, per attribute, over up to `most` pictures."""
    right = dict.fromkeys(judge.shape.heads, 0)
    count = min(len(pictures), most)
    for part in torch.arange(count).split(100):
        for name, output in judge(pictures.batch(part, judge.shape.size)).items():
            right[name] += int((output.argmax(1).cpu() == pictures.labels[name][part]).sum())
    return {name: round(found / count, 4) for name, found in right.items()}


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    channels: list[int],
    attributes: list[str],
    recoded: float,
    start: str | None,
    check_pictures: int,
) -> dict[str, Any]:
    """The stage; its check is the bar: mean accuracy on held-out pictures.

    Raises:
        UserError: a share out of its range; stage recoded is missing; `start` is no judge of these sizes.
    """
    pictures = Reading(shop, JUDGING, recoded)
    torch.manual_seed(shop.seed + 4)
    labels = {name: HEADS[name] for name in attributes}
    shape = truth_judge.Shape(
        shop.reading_size, tuple(channels), {n: len(values) for n, values in labels.items()}, labels
    )
    network = truth_judge.Judge(shape)
    if start is not None:
        truth_judge.begin_with(network, Path(start), f"reader.start={start}")
    module = ReaderModule(Fit(**fit), shop.seed, network, pictures)
    outcome = train(shop, "reader", module)
    truth_judge.save(module.judge, shop.weights("reader"))
    judge: Any = truth_judge.load(shop.weights("reader")).to(shop.device)
    found = accuracy(judge, Pictures(shop.folder("data") / "held", shop.device), check_pictures)
    return outcome | {"check": {"mean_accuracy": round(sum(found.values()) / len(found), 4), "accuracy": found}}
