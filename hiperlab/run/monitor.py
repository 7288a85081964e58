"""`monitor=<score>`: what is drawn and scored while training, and which step's artifact the run ends with."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hiperlab.base import artifact
from hiperlab.base.best_score import BestScore
from hiperlab.base.capability import EditsPicture
from hiperlab.base.method import Method
from hiperlab.data.concept import Concept, fill
from hiperlab.data.prompts import load_prompts, with_class
from hiperlab.errors import UserError, near
from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.edit.scores import EditScore
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.protocol import Protocol
from hiperlab.metric.rows import ALL
from hiperlab.metric.score import score
from hiperlab.metric.table import aggregate
from hiperlab.report.monitor import ScoreMonitor, best_path
from hiperlab.run.references import edits
from hiperlab.run.resume import checkpoint_folder, log_folder
from hiperlab.run.session import Session

log = logging.getLogger(__name__)


def check_monitor(session: Session) -> None:
    """Refuse `monitor` where it cannot work, or where its pictures would be those that are reported.

    Raises:
        UserError: saying why.
    """
    cfg, wanted, members = session.cfg, session.cfg.monitor, session.protocol.members
    if wanted is None:
        return
    key = f"monitor={wanted}"
    if wanted not in members:
        raise UserError(f"{key} is no score of metric={session.protocol.name}.{near(str(wanted), members)}")
    if why := session.method_class.why_no_early_stop:
        raise UserError(f"{key}: {why}. Use monitor=null.")
    if not cfg.fit.steps:
        raise UserError(f"{key}: fit.steps=0 trains nothing that could be chosen from. Use monitor=null.")
    member, concepts = members[wanted], session.data.concepts
    if member.of_source or (isinstance(member, EditScore) and not all(concept.edit for concept in concepts)):
        raise UserError(
            f"{key} judges {'reconstructions' if member.of_source else 'edits'} only: choose another score."
        )
    session.protocol.encoders[member.encoder].fetch(f"metric.encoders.{member.encoder}")
    for concept in concepts:
        reported = {_plain(prompt) for prompt in concept.prompts}
        if shared := [prompt for prompt in held_out_prompts(session, concept) if _plain(prompt) in reported]:
            raise UserError(
                f"fit.monitor.prompts: {shared[0]!r} is an evaluation prompt of {concept.name}, too, and a step chosen "
                f"by it would look better in the table than it is. Give others, e.g. 'fit.monitor.prompts=[…]'."
            )
    if both := sorted(set(cfg.fit.monitor.seeds) & set(cfg.sample.seeds)):
        raise UserError(
            f"fit.monitor.seeds: {both[0]} is among sample.seeds, too: give others, which are not reported."
        )


def held_out_prompts(session: Session, concept: Concept) -> tuple[str, ...]:
    """The monitor's prompts, each with "{}"; the class noun follows it where it does in the evaluation prompts."""
    asked = session.cfg.fit.monitor.prompts
    prompts = load_prompts(asked if isinstance(asked, str) else list(asked), "fit.monitor.prompts")
    named = session.cfg.data.get("class_noun", "none") != "none" and not issubclass(session.method_class, EditsPicture)
    return with_class(prompts, concept.word) if named else prompts


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def give_score(session: Session, group: Sequence[int], method: Method) -> ScoreMonitor | None:
    """Give a method of one concept its score; returns what watches over it, None where nothing is monitored.

    Raises:
        UserError: the judge's weights are missing or unusable.
    """
    cfg, wanted = session.cfg, session.cfg.monitor
    if wanted is None:
        return None
    (index,) = group
    concept, how, member = session.data.concepts[index], cfg.fit.monitor, session.protocol.members[wanted]
    method.best_score = BestScore(wanted, member.lower, how.patience, how.min_delta, cfg.fit.steps, concept.name)
    seeds = list(dict.fromkeys(how.seeds))
    asked = [(prompt, seed) for prompt in held_out_prompts(session, concept) for seed in seeds]
    records = [
        {"concept": concept.name, "prompt": prompt, "text": fill(prompt, concept.placeholder),
         "placeholder": concept.placeholder, "word": concept.word, "seed": seed}
        for prompt, seed in asked
    ]  # fmt: skip
    judge = Judge(
        session.protocol, wanted, concept, records, session.device, session.judges, edits([concept], cfg.model.size)
    )
    return ScoreMonitor(
        how.every,
        judge,
        [str(record["text"]) for record in records],
        [seed for _, seed in asked],
        how={
            "steps": how.sampler_steps or session.sampler.steps, "guidance": session.sampler.guidance,
            "sampler": session.sampler, "variant": method.variants[0], "negative": session.negative,
            "batch_size": cfg.sample.batch_size,
        },
        folder=log_folder(session, list(group)) / "monitor",
        kept=checkpoint_folder(session, list(group)),
        settings=session.method_settings(),
    )  # fmt: skip


class Judge:
    """Scores pictures of one concept by one score of a protocol.

    Args:
        protocol: with the score among its members.
        wanted: the score's name.
        concept: whose references they are compared with.
        records: of the pictures, without their paths.
        device: where the encoder runs.
        loaded: keeps encoders between calls, and between judges.
        edits: what edits are judged against.

    Raises:
        UserError: the encoder cannot be loaded.
    """

    def __init__(
        self,
        protocol: Protocol,
        wanted: str,
        concept: Concept,
        records: Sequence[Mapping[str, Any]],
        device: torch.device,
        loaded: MutableMapping[EncoderConfig, Encoder],
        edits: Mapping[str, EditReference],
    ) -> None:
        member = protocol.members[wanted]
        encoder = protocol.encoders[member.encoder]
        self.protocol = replace(protocol, members={wanted: member}, encoders={member.encoder: encoder})
        self.concept, self.records, self.device, self.loaded, self.edits = concept, records, device, loaded, edits
        if encoder not in loaded:
            with torch.random.fork_rng(devices=[]):  # some networks draw their start before the weights come
                loaded[encoder] = protocol.load(member.encoder)

    def __call__(self, pictures: Sequence[Image.Image]) -> float:
        """Mean score of the pictures, in the records' order; NaN where the judge found nothing in any."""
        with tempfile.TemporaryDirectory() as folder:
            records = [{**record, "path": f"{number}.png"} for number, record in enumerate(self.records)]
            for record, picture in zip(records, pictures, strict=True):
                picture.save(Path(folder) / str(record["path"]))
            found = score(
                records, {self.concept.name: self.concept.views}, self.protocol, root=folder, device=self.device,
                loaded=self.loaded, edits=self.edits,
            )  # fmt: skip
        means = [row["mean"] for row in aggregate(found.rows) if row["kind"] == ALL]
        return float("nan") if not means or means[0] is None else float(means[0])


def keep_best(session: Session, group: Sequence[int], method: Method, steps: int) -> int:
    """Put the best artifact so far into a trained method, if the run keeps that; returns the step it is of.

    Args:
        session: its run.
        group: its one concept.
        method: after its training.
        steps: optimizer steps it has made.

    Raises:
        UserError: the artifact is missing or damaged.
    """
    scores = method.best_score
    if scores is None or session.cfg.fit.monitor.keep == "last":
        return steps
    if scores.best is None:
        log.warning("%s: monitor=%s found nothing at all: the last step is kept.", scores.name, scores.score)
        return steps
    step = scores.best.step
    if step != steps:
        artifact.load_into(method, 0, best_path(checkpoint_folder(session, list(group)), step))
        log.info("%s: the artifact is that of step %d, %s %.4g", scores.name, step, scores.score, scores.best.score)
    return step


def told(method: Method, kept: int, seconds: float) -> dict[str, Any] | None:
    """What results.json says of a concept's scores, which took so many seconds; None where nothing was monitored."""
    scores = method.best_score
    if scores is None:
        return None
    best = scores.best
    return {
        "best": best and best.score, "best_step": best and best.step, "artifact_step": kept,
        "evaluations": len(scores.seen), "seconds": round(seconds, 2),
    }  # fmt: skip
