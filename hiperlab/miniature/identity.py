"""Stage identity: an encoder that pulls the pictures of one subject together and holds subjects apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hiperlab.metric.world import network as truth_judge
from hiperlab.miniature.fit import train
from hiperlab.miniature.keys import stream
from hiperlab.miniature.module import Fit, StageModule
from hiperlab.miniature.pictures import Pictures, soften
from hiperlab.miniature.plan import Workshop
from hiperlab.miniature.recoded import Reading


def top1(queries: Tensor, gallery: Tensor) -> float:
    """Share of queries (N, D) whose most similar row of the gallery (N, D) is their own."""
    found = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).argmax(dim=1)
    return float((found == torch.arange(len(found), device=found.device)).float().mean())


def supervised_contrastive(embeddings: Tensor, subjects: Tensor, temperature: float) -> Tensor:
    """SupCon, the mean outside the logarithm (Khosla et al. 2020, eq. 2).

    Args:
        embeddings: (B, D), any length.
        subjects: (B,) int64; rows of one subject are positives of each other. Rows without positives do not count.
        temperature: of the softmax.
    """
    z = F.normalize(embeddings, dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        logits = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    positive = (subjects[:, None] == subjects[None]) & ~itself
    log_share = (logits - logits.logsumexp(dim=1, keepdim=True)).masked_fill(~positive, 0.0)
    count = positive.sum(1)
    usable = count > 0
    return -(log_share.sum(1)[usable] / count[usable]).mean()


def choose(
    by_kind: list[Tensor], views: int, subjects: int, per_subject: int, kinds: int, generator: torch.Generator
) -> Tensor:
    """Rows of a step: few kinds, many subjects of each, so that telling kinds apart is not enough.

    Args:
        by_kind: per kind the numbers of its subjects.
        views: pictures of each subject in the set; subject s has rows s*views to s*views + views - 1.
        subjects: how many.
        per_subject: pictures of each.
        kinds: how many kinds they are drawn from.
        generator: on the CPU.

    Returns:
        (subjects * per_subject,) int64, subject-major. Fewer where the kinds have not that many subjects.
    """
    chosen = torch.randperm(len(by_kind), generator=generator)[:kinds]
    pool = torch.cat([by_kind[int(kind)] for kind in chosen])
    who = pool[torch.randperm(len(pool), generator=generator)[:subjects]]
    which = torch.rand(len(who), views, generator=generator).argsort(dim=1)[:, :per_subject]
    return (who[:, None] * views + which).flatten()


class IdentityModule(StageModule):
    """The encoder with its loss.

    Args:
        fit, seed: as in StageModule.
        judge: the network, its head is "embedding".
        pictures: the judges' set.
        views: pictures of each subject in it.
        per_subject: of them in a step.
        kinds: in a step.
        temperature: of the loss.
    """

    def __init__(
        self,
        fit: Fit,
        seed: int,
        *,
        judge: truth_judge.Judge,
        pictures: Reading,
        views: int,
        per_subject: int,
        kinds: int,
        temperature: float,
    ) -> None:
        super().__init__(fit, seed)
        self.judge, self.pictures = judge.to(memory_format=torch.channels_last), pictures
        self.views, self.per_subject, self.kinds, self.temperature = views, per_subject, kinds, temperature
        kind_of = pictures.labels["kind"][::views]
        found = [torch.nonzero(kind_of == kind).flatten() for kind in range(int(kind_of.max()) + 1)]
        self.by_kind = [subjects for subjects in found if len(subjects)]

    def loss(self, step: int) -> Tensor:
        """SupCon over the step's pictures."""
        chosen = choose(
            self.by_kind, self.views, self.fit_settings.batch // self.per_subject, self.per_subject, self.kinds,
            stream(self.seed, "identity", step),
        )  # fmt: skip
        pixels = self.pictures.batch(chosen, self.seed, "identity", step)
        pixels = soften(pixels, stream(self.seed, "identity soften", step, self.device))
        embeddings = self.judge(pixels)["embedding"]
        return supervised_contrastive(embeddings.float(), (chosen // self.views).to(self.device), self.temperature)


@torch.no_grad()
def retrieval(judge: truth_judge.Judge, first: Tensor, second: Tensor) -> float:
    """Share of subjects found again in another picture: (N, 3, H, W) twice, row i of both is one subject."""
    parts = [[judge(part)["embedding"] for part in side.split(100)] for side in (first, second)]
    return top1(torch.cat(parts[0]).float(), torch.cat(parts[1]).float())


def work(
    shop: Workshop,
    *,
    fit: dict[str, Any],
    channels: list[int],
    width: int,
    per_subject: int,
    kinds: int,
    temperature: float,
    recoded: float,
    start: str | None,
    check_subjects: int,
) -> dict[str, Any]:
    """The stage; its check is the bar: the right subject among up to 400 held-out ones, both pictures plain photos."""
    pictures = Reading(shop, ("judge",), recoded)
    views = int((pictures.labels["identity"] == 0).sum())
    torch.manual_seed(shop.seed + 3)
    shape = truth_judge.Shape(shop.reading_size, tuple(channels), {"embedding": width}, {})
    network = truth_judge.Judge(shape)
    if start is not None:
        truth_judge.begin_with(network, Path(start), f"identity.start={start}")
    module = IdentityModule(
        Fit(**fit), shop.seed, judge=network, pictures=pictures, views=views,
        per_subject=min(per_subject, views), kinds=kinds, temperature=temperature,
    )  # fmt: skip
    outcome = train(shop, "identity", module)
    truth_judge.save(module.judge, shop.weights("identity"))
    judge: Any = truth_judge.load(shop.weights("identity")).to(shop.device)
    pairs = Pictures(shop.folder("data") / "pairs", shop.device)
    count = min(len(pairs) // 2, check_subjects)
    first, second = (pairs.batch(torch.arange(count) * 2 + view, shop.reading_size) for view in (0, 1))
    return outcome | {"check": {"retrieval_top1": round(retrieval(judge, first, second), 4), "subjects": count}}
