"""Stage reader: reads kind, pose, place, style, accessory and light from a picture; the judge of prompt following."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.metric import truth_judge
from hiperlab.world.train import record
from hiperlab.world.train import vae as stage_vae
from hiperlab.world.train.draw_shard import HEADS
from hiperlab.world.train.fit import train
from hiperlab.world.train.keys import rows, stream
from hiperlab.world.train.module import Fit, StageModule
from hiperlab.world.train.pictures import Pictures, soften
from hiperlab.world.train.plan import Workshop


def heads_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Sum of the heads' cross-entropies: head -> (B, classes), head -> (B,)."""
    losses = [F.cross_entropy(output.float(), labels[name]) for name, output in outputs.items()]
    return torch.stack(losses).sum()


class ReaderModule(StageModule):
    """The reader with its loss.

    Args:
        fit, seed: as in StageModule.
        judge: the network, one head per attribute.
        pictures: the judges' set.
        coder: the autoencoder, or None.
        recoded: share of every batch that it codes and decodes before it is read: whatever the miniature draws has
            passed its decoder, and a judge must not take the decoder's blur for another kind.
    """

    def __init__(
        self,
        fit: Fit,
        seed: int,
        judge: truth_judge.Judge,
        pictures: Pictures,
        coder: Any = None,
        recoded: float = 0.0,
    ) -> None:
        super().__init__(fit, seed)
        self.judge, self.pictures = judge.to(memory_format=torch.channels_last), pictures
        self.coder, self.recoded = coder, recoded

    def frozen_parts(self) -> tuple[str, ...]:
        """The autoencoder."""
        return ("coder",)

    @torch.no_grad()
    def _recode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], its first rows as the autoencoder gives them back."""
        count = round(self.recoded * len(pixels))
        if not count:
            return pixels
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=pixels.is_cuda):
            back = self.coder.decode(self.coder.encode(pixels[:count]).latent_dist.mode()).sample
        return torch.cat([back.to(pixels.dtype).clamp(-1, 1), pixels[count:]])

    def loss(self, step: int) -> Tensor:
        """Cross-entropies of the step's pictures."""
        chosen = rows(self.seed, "reader", step, len(self.pictures), self.fit_settings.batch)
        pixels = self._recode(self.pictures.batch(chosen)).contiguous(memory_format=torch.channels_last)
        pixels = soften(pixels, stream(self.seed, "reader soften", step, self.device))
        labels = {name: self.pictures.labels[name][chosen].to(self.device) for name in self.judge.shape.heads}
        return heads_loss(self.judge(pixels), labels)


@torch.no_grad()
def accuracy(judge: truth_judge.Judge, pictures: Pictures, most: int) -> dict[str, float]:
    """Share of pictures read rightly, per attribute, over up to `most` pictures."""
    right = dict.fromkeys(judge.shape.heads, 0)
    count = min(len(pictures), most)
    for part in torch.arange(count).split(100):
        for name, output in judge(pictures.batch(part)).items():
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
        UserError: a share out of its range; no autoencoder to code with; `start` is no judge of these sizes.
    """
    if not 0 <= recoded <= 1:
        raise UserError(f"reader.recoded={recoded}: expected a share of the pictures, from 0 to 1.")
    if recoded and not any(record.done(shop.folder(stage)) for stage in ("decoder", "vae")):
        raise UserError(
            f"reader.recoded needs an autoencoder, and {shop.out} has none: stages=[vae,decoder] first, or 0."
        )
    coder = stage_vae.load_last(shop) if recoded else None
    pictures = Pictures(shop.folder("data") / "judge", shop.device, shop.cache_pictures)
    torch.manual_seed(shop.seed + 4)
    labels = {name: HEADS[name] for name in attributes}
    shape = truth_judge.Shape(shop.size, tuple(channels), {n: len(values) for n, values in labels.items()}, labels)
    network = truth_judge.Judge(shape)
    if start is not None:
        earlier = truth_judge.load(Path(start))
        if earlier.shape != shape:
            raise UserError(f"reader.start={start} holds a judge of other sizes or attributes.")
        network.load_state_dict(earlier.state_dict())
    module = ReaderModule(Fit(**fit), shop.seed, network, pictures, coder, recoded)
    outcome = train(shop, "reader", module)
    truth_judge.save(module.judge, shop.weights("reader"))
    judge: Any = truth_judge.load(shop.weights("reader")).to(shop.device)
    found = accuracy(judge, Pictures(shop.folder("data") / "held", shop.device), check_pictures)
    return outcome | {"check": {"mean_accuracy": round(sum(found.values()) / len(found), 4), "accuracy": found}}
