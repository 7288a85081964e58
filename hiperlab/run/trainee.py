"""One method of one run on its way through training: its data, its checkpoints, and what watches over it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from torch import Tensor

from hiperlab.base.capability import ReadsPicture
from hiperlab.base.early_stop import EarlyStop, fixed_inputs
from hiperlab.base.method import Method
from hiperlab.base.rare_token_method import RareTokenMethod
from hiperlab.data.concept import Concept, fill
from hiperlab.data.dataset import DataSet
from hiperlab.data.images import to_pixels
from hiperlab.data.module import ConceptData, MicroBatches
from hiperlab.errors import UserError
from hiperlab.report.checkpoint import AtomicCheckpointIO, StepCheckpoints
from hiperlab.report.exports import CadencedExports
from hiperlab.report.finish import EndWhenFinished
from hiperlab.report.loggers import JsonlLogger, RewindLogs
from hiperlab.report.monitor import ScoreMonitor
from hiperlab.report.nan_guard import FiniteGuard
from hiperlab.report.precision import ScaledPrecision
from hiperlab.report.samples import TrainingSamples
from hiperlab.report.tracker import Trackers
from hiperlab.run.disk_space import check_space
from hiperlab.run.monitor import give_score
from hiperlab.run.resume import checkpoint_folder, log_folder, remember, starting_point
from hiperlab.run.session import Session, speaks_for

log = logging.getLogger(__name__)


@dataclass
class Trainee:
    """One method of one run, ready to be trained.

    Args:
        session: its run.
        group: numbers of its concepts among the run's.
        method: untrained.
        checkpoints: writes and keeps its checkpoints.
        start: the checkpoint it goes on from, None for a fresh start.
        monitor: scores it while it trains, if it is asked for.
    """

    session: Session
    group: list[int]
    method: Method
    checkpoints: StepCheckpoints
    start: Path | None
    monitor: ScoreMonitor | None

    @property
    def parameters_per_concept(self) -> int:
        """How many numbers one concept trains."""
        return sum(p.numel() for p in self.method.parameters() if p.requires_grad) // len(self.group)

    @property
    def seconds_aside(self) -> float:
        """What drawing and scoring between its steps took in this process; no training."""
        return self.samples.seconds + (self.monitor.seconds if self.monitor else 0.0)

    def data(self, rows: int, accumulate: int) -> ConceptData:
        """Its batches; also gives the method its reference pictures.

        Args:
            rows: images of a concept per rank and micro batch.
            accumulate: micro batches per optimizer step.
        """
        session, cfg, method = self.session, self.session.cfg, self.method
        concepts = tuple(session.data.concepts[index] for index in self.group)
        subset = replace(as_published(session.data, method), concepts=concepts)
        if isinstance(method, ReadsPicture):
            subset = first_pictures(subset) if method.one_picture else subset
            for number, concept in enumerate(concepts):
                method.set_reference(number, first_pixels(subset, concept, cfg.model.size))
        if isinstance(method, RareTokenMethod) and method.template and any(each.captions for each in concepts):
            log.warning(
                "method.template=%r is trained instead of the captions; method.template=null takes them.",
                method.template,
            )
        if cfg.fit.stop == "dvar":
            method.early_stop = self._early_stop(subset)
        return ConceptData(subset, cfg.seed, cfg.model.size, rows, accumulate)

    def _early_stop(self, data: DataSet) -> EarlyStop:
        """The criterion of its one concept."""
        cfg, stack, how = self.session.cfg, self.method.model, self.session.cfg.fit.dvar
        batch = MicroBatches(data, cfg.seed, cfg.model.size, how.rows, 0, 1).in_turn(how.rows)
        inputs = fixed_inputs(batch, cfg.seed, how.parts, stack.latent_shape, stack.num_timesteps)
        return EarlyStop(inputs, how.window, how.threshold, how.every, cfg.fit.steps, self.method.concepts[0].name)

    def loggers(self) -> list[Logger]:
        """Where its metrics and samples go."""
        trackers: Trackers | _Named = self.session.trackers
        if len(self.session.groups) > 1:  # one run of a service for all of them
            trackers = _Named(self.session.trackers, self.method.concepts[0].name)
        return [JsonlLogger(log_folder(self.session, self.group)), trackers]

    def watchers(self) -> list[Callback]:
        """What watches over it alone, in the order in which they are asked."""
        return [
            RewindLogs(),
            FiniteGuard(self.checkpoints),
            *([self.monitor] if self.monitor else []),
            self.samples,
            EndWhenFinished(),
            self.checkpoints,
            CadencedExports(self.session.folder / "artifacts"),
        ]

    @cached_property
    def samples(self) -> TrainingSamples:
        """Draws while it trains."""
        session, cfg = self.session, self.session.cfg
        chosen = [session.data.concepts[index] for index in self.group]
        prompts = [
            (fill(prompt, concept.placeholder), number)
            for number, concept in enumerate(chosen)
            for prompt in concept.prompts[: cfg.fit.sample_prompts]
        ]
        return TrainingSamples(
            log_folder(session, self.group) / "grids",
            cfg.fit.sample_every,
            [prompt for prompt, _ in prompts],
            list(range(len(prompts))),
            steps=session.sampler.steps,
            guidance=session.sampler.guidance,
            options={"concepts": [number for _, number in prompts], "sampler": session.sampler},
        )


class _Named(Logger):
    """A logger of several concepts, each with names of its own there: loss/<concept>, as stacked ones are called.

    Args:
        shared: the logger.
        concept: name of the concept.
    """

    def __init__(self, shared: Trackers, concept: str) -> None:
        super().__init__()
        self.shared, self.concept = shared, concept

    @property
    def name(self) -> str:
        """As the shared one's."""
        return self.shared.name

    @property
    def version(self) -> str:
        """As the shared one's."""
        return self.shared.version

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: they are the run's."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """loss/latent becomes loss/<concept>/latent."""
        own = {"/".join([*name.split("/")[:1], self.concept, *name.split("/")[1:]]): v for name, v in metrics.items()}
        self.shared.log_metrics(own, step)

    def log_images(self, key: str, images: Sequence[Any], captions: Sequence[str], step: int | None = None) -> None:
        """Pictures under <key>/<concept>."""
        self.shared.log_images(f"{key}/{self.concept}", images, captions, step)


def enrol(session: Session, group: list[int], resume: str | None) -> Trainee:
    """Build the method of a group and find where its training goes on.

    Raises:
        UserError: see `starting_point`, `check_space`, `give_score`.
    """
    cfg, folder = session.cfg, checkpoint_folder(session, group)
    method = session.build_method(group)
    check_space(session, method)
    start = starting_point(folder, resume, cfg.fit.steps)
    checkpoints = StepCheckpoints(folder, cfg.fit.checkpoint_every, keep_all=bool(cfg.fit.keep_checkpoints))
    return Trainee(session, group, method, checkpoints, start, give_score(session, group, method))


def begin(trainees: Sequence[Trainee], rows: int, world: int) -> None:
    """Keep what these trainings are asked, and say what begins."""
    said: dict[str, list[Path]] = {}
    for trainee in trainees:
        session, cfg = trainee.session, trainee.session.cfg
        lines = []
        session.update(micro_batch_size=rows, world_size=world)
        remember(session, fresh=trainee.start is None)
        if trainee.start is not None:
            lines.append(f"resuming from {trainee.start.stem} of {cfg.fit.steps} steps")
        lines.append(
            f"{type(trainee.method).__name__}: {trainee.parameters_per_concept:,} trainable parameters per concept, "
            f"{cfg.fit.steps} steps of {cfg.fit.batch_size} images ({rows} at a time, {world} "
            f"process{'' if world == 1 else 'es'})"
        )
        for line in lines:
            said.setdefault(line, []).append(session.folder)
    for line, folders in said.items():
        for folder in dict.fromkeys(folders):  # once a run, whatever the number of its trainings
            with speaks_for(folder):
                log.info("%s", line)


def make_trainer(session: Session, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> pl.Trainer:
    """Lightning's Trainer as the run's settings ask for it."""
    cfg = session.cfg
    settings = instantiate(cfg.trainer, _convert_="all")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if cfg.precision.grad_scaler:
        plugins.append(ScaledPrecision("cpu" if settings["accelerator"] == "cpu" else session.device.type))
    return pl.Trainer(
        **settings,
        max_steps=cfg.fit.steps,
        max_epochs=-1,
        gradient_clip_val=cfg.fit.gradient_clip,
        callbacks=list(callbacks),
        plugins=plugins,
        logger=list(loggers) or False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=session.folder,
    )


def split_batch(batch_size: int, micro: int | None, world: int) -> tuple[int, int]:
    """Rows per concept, rank and micro batch, and micro batches per optimizer step.

    Args:
        batch_size: images of one concept per optimizer step, over all ranks.
        micro: most rows at a time; None for as many as there are.
        world: ranks.

    Raises:
        UserError: the batch cannot be shared evenly by the ranks.
    """
    if batch_size % world:
        raise UserError(
            f"fit.batch_size={batch_size} cannot be shared by {world} processes. "
            f"Choose a multiple of {world}, or fewer devices."
        )
    share = batch_size // world
    most = min(micro or share, share)
    rows = next(rows for rows in range(most, 0, -1) if share % rows == 0)
    return rows, share // rows


def as_published(data: DataSet, method: Method) -> DataSet:
    """The data with the method's published crop and flip where its settings leave them open."""
    return replace(
        data,
        crop=method.published_crop if data.crop is None else data.crop,
        flip=method.published_flip if data.flip is None else data.flip,
    )


def first_pictures(data: DataSet) -> DataSet:
    """Every concept with its first picture alone, the same each time: what a method of one picture trains on."""
    concepts = tuple(
        replace(each, views=each.views[:1], sources=each.sources[:1], captions=each.captions[:1], masks=each.masks[:1])
        for each in data.concepts
    )
    return replace(data, concepts=concepts, flip=0.0, crop="middle" if data.crop == "random" else data.crop)


def first_pixels(data: DataSet, concept: Concept, size: int) -> Tensor:
    """A concept's first picture (3, size, size) in [-1, 1], as training sees it; the crop of `data` is settled."""
    assert data.crop is not None, "see as_published"
    return to_pixels(concept.views[0], size, data.crop, flip=False)
