"""The fit stage: train, resume, keep. Everything Lightning needs is put together here."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from torch import Tensor

from hiperlab import files
from hiperlab.base import artifact
from hiperlab.base.capability import Exportable, ReadsPicture
from hiperlab.base.method import Method, Subject
from hiperlab.base.rare_token_method import RareTokenMethod
from hiperlab.data.concept import Concept, fill
from hiperlab.data.dataset import DataSet
from hiperlab.data.images import to_pixels
from hiperlab.data.module import ConceptData
from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.report.checkpoint import AtomicCheckpointIO, StepCheckpoints
from hiperlab.report.environment import command, peak_memory
from hiperlab.report.exports import CadencedExports
from hiperlab.report.finish import EndWhenFinished
from hiperlab.report.loggers import JsonlLogger, RewindLogs
from hiperlab.report.nan_guard import FiniteGuard
from hiperlab.report.precision import ScaledPrecision
from hiperlab.report.progress import StepProgress
from hiperlab.report.samples import TrainingSamples
from hiperlab.report.signals import StopCallback, StopSignals
from hiperlab.run.disk_space import check_space
from hiperlab.run.resume import checkpoint_folder, log_folder, remember, starting_point
from hiperlab.run.session import Session

log = logging.getLogger(__name__)


def check_trainer(session: Session) -> None:
    """Set up Lightning's Trainer once, before the model loads: it refuses devices that are not there.

    Raises:
        UserError: what it says.
    """
    cfg = session.cfg.trainer
    if cfg.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here. Use trainer=cpu, or mend the driver.")
    try:
        settings = instantiate(cfg, _convert_="all")
        pl.Trainer(**settings, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except Exception as error:  # Lightning raises its own, TypeError and ValueError, and strategies raise theirs
        raise UserError(f"trainer cannot be set up: {first_line(error)}.") from error


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


def fit(session: Session, signals: StopSignals, resume_command: str) -> None:
    """Train every concept and write its artifact.

    Raises:
        StoppedError: told to stop (everything is saved), or a loss was not finite.
        UserError: out of memory with nothing left to halve.
    """
    with session.stage("fit") as found:
        try:
            rows = [_fit_group(session, group, signals, resume_command) for group in session.groups]
        except _NoRoomError:
            if len(session.groups[0]) == 1:
                raise
            rows = []
        if not rows:  # out here: the exception, and with it the failed attempt's tensors, is gone
            torch.cuda.empty_cache()
            log.warning("out of memory with %d concepts in a pass: they go one by one.", len(session.groups[0]))
            session.groups = [[index] for index in session.groups[0]]
            rows = [_fit_group(session, group, signals, resume_command) for group in session.groups]
        if files.is_rank_zero():
            _write_card(session, rows)
        found |= {key: rows[0][key] for key in ("steps", "world_size", "micro_batch_size", "accumulate")}
        found["finished"] = all(row["finished"] for row in rows)
        found["trainable_parameters"] = sum(row["trainable_parameters"] for row in rows)
        found["train_seconds"] = round(sum(row["train_seconds"] for row in rows), 2)
        found["loss"] = rows[-1]["loss"]
        found["artifact_bytes"] = sum(
            file.stat().st_size for file in (session.folder / "artifacts").glob("*.safetensors")
        )
        found["peak_memory"] = peak_memory()
        session.update(steps=found["steps"], trainable_parameters=found["trainable_parameters"])


class _NoRoomError(UserError):
    """Out of memory with one image of each concept at a time."""


def _fit_group(session: Session, group: list[int], signals: StopSignals, resume_command: str) -> dict[str, Any]:
    """Train the concepts of one group, with a smaller micro batch if memory runs out."""
    cfg, micro = session.cfg, session.cfg.fit.micro_batch_size
    resume = cfg.resume
    while True:
        try:
            return _train(session, group, signals, resume_command, micro, resume)
        except torch.OutOfMemoryError:
            micro, resume = _smaller(session), "auto"
        torch.cuda.empty_cache()  # out here: the exception, and with it the failed attempt's tensors, is gone


def _smaller(session: Session) -> int:
    """Half the micro batch that did not fit.

    Raises:
        UserError: nothing is left to halve (`_NoRoomError`), or several processes would have to agree on it.
    """
    used, world = session.results["micro_batch_size"], session.results["world_size"]
    if used == 1 or world > 1:
        lower = f"fit.micro_batch_size={used // 2}, " if used > 1 else ""
        kind = _NoRoomError if world == 1 else UserError
        raise kind(
            f"out of memory with {used} images at a time. Use {lower}model.optimise.gradient_checkpointing=true, "
            "precision=bf16, or a smaller model.size; then resume=auto goes on."
        )
    log.warning("out of memory: micro batch %d -> %d; the batch per step stays the same.", used, used // 2)
    return used // 2


def _train(
    session: Session, group: list[int], signals: StopSignals, resume_command: str, micro: int | None, resume: str | None
) -> dict[str, Any]:
    cfg = session.cfg
    folder = checkpoint_folder(session, group)
    method = session.build_method(group)
    per_concept = sum(p.numel() for p in method.parameters() if p.requires_grad) // len(group)
    check_space(session, method)
    checkpoints = StepCheckpoints(folder, cfg.fit.checkpoint_every, keep_all=bool(cfg.fit.keep_checkpoints))
    stop = StopCallback(signals, checkpoints, resume_command)
    trainer = _trainer(session, method, group, checkpoints, stop)
    rows, accumulate = split_batch(cfg.fit.batch_size, micro, trainer.world_size)
    trainer.accumulate_grad_batches = accumulate
    session.update(micro_batch_size=rows, world_size=trainer.world_size)
    concepts = tuple(session.data.concepts[index] for index in group)
    subset = replace(as_published(session.data, method), concepts=concepts)
    if isinstance(method, ReadsPicture):
        subset = first_pictures(subset) if method.one_picture else subset
        for number, concept in enumerate(concepts):
            method.set_reference(number, first_pixels(subset, concept, cfg.model.size))
    if isinstance(method, RareTokenMethod) and method.template is not None and any(each.captions for each in concepts):
        log.warning(
            "method.template=%r is trained instead of the captions; method.template=null takes them.", method.template
        )
    data = ConceptData(subset, cfg.seed, cfg.model.size, rows, accumulate)
    start_from = starting_point(folder, resume, cfg.fit.steps)
    remember(session, fresh=start_from is None)
    if start_from is not None:
        log.info("resuming from %s of %d steps", start_from.stem, cfg.fit.steps)
    log.info(
        "%s: %s trainable parameters per concept, %d steps of %d images (%d at a time, %d process%s)",
        type(method).__name__, f"{per_concept:,}", cfg.fit.steps, cfg.fit.batch_size, rows, trainer.world_size,
        "" if trainer.world_size == 1 else "es",
    )  # fmt: skip
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*Found .* module.* in eval mode.*")  # the frozen stack: as it should be
        if not method.finished:
            trainer.fit(method, datamodule=data, ckpt_path=start_from, weights_only=True)
    stop.raise_if_stopped()
    seconds = time.monotonic() - start
    written = write_artifacts(session, method, trainer.global_step) if trainer.is_global_zero else []
    trainer.strategy.barrier()
    return {
        "written": written,
        "steps": trainer.global_step,
        "finished": method.finished,
        "world_size": trainer.world_size,
        "micro_batch_size": rows,
        "accumulate": accumulate,
        "trainable_parameters": per_concept * len(group),
        "train_seconds": seconds,
        "loss": _last_loss(trainer),
    }


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


def _last_loss(trainer: pl.Trainer) -> float | None:
    value = trainer.callback_metrics.get("loss")
    return None if value is None else float(value)


def _trainer(
    session: Session, method: Method, group: list[int], checkpoints: StepCheckpoints, stop: StopCallback
) -> pl.Trainer:
    cfg = session.cfg
    chosen = [session.data.concepts[index] for index in group]
    prompts = [
        (fill(prompt, concept.placeholder), number)
        for number, concept in enumerate(chosen)
        for prompt in concept.prompts[: cfg.fit.sample_prompts]
    ]
    folder = log_folder(session, group)
    samples = TrainingSamples(
        folder / "grids",
        cfg.fit.sample_every,
        [prompt for prompt, _ in prompts],
        list(range(len(prompts))),
        steps=session.sampler.steps,
        guidance=session.sampler.guidance,
        options={"concepts": [number for _, number in prompts], "sampler": session.sampler},
    )
    settings = instantiate(cfg.trainer, _convert_="all")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if cfg.precision.grad_scaler:
        plugins.append(ScaledPrecision("cpu" if settings["accelerator"] == "cpu" else session.device.type))
    return pl.Trainer(
        **settings,
        max_steps=cfg.fit.steps,
        max_epochs=-1,
        gradient_clip_val=cfg.fit.gradient_clip,
        callbacks=[
            stop,
            FiniteGuard(checkpoints),
            samples,
            EndWhenFinished(),
            checkpoints,
            CadencedExports(session.folder / "artifacts"),
            RewindLogs(),
            StepProgress(),
        ],
        plugins=plugins,
        logger=[JsonlLogger(folder), session.wandb],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=session.folder,
    )


def write_artifacts(session: Session, method: Method, steps: int) -> list[tuple[Subject, list[str]]]:
    """One safetensors per concept, and its files for other tools; returns the latter's names."""
    folder = session.folder / "artifacts"
    written = []
    for index, subject in enumerate(method.concepts):
        path = folder / f"{subject.name}.safetensors"
        artifact.write(path, method, index, session.method_settings(), steps, half=session.cfg.fit.half_artifacts)
        other = folder / subject.name
        other.mkdir(parents=True, exist_ok=True)
        exported = method.export(index, other, steps) if isinstance(method, Exportable) else []
        names = [path.relative_to(folder).as_posix() for path in exported]
        if not names:
            other.rmdir()
        written.append((subject, names))
    return written


def _write_card(session: Session, rows: list[dict[str, Any]]) -> None:
    written = [each for row in rows for each in row["written"]]
    name, stack = session.cfg.method._target_.rsplit(".", 1)[-1], session.stack
    text = artifact.card(name, stack.base, stack.note, rows[0]["steps"], command(), written)
    files.atomic_write(session.folder / "artifacts" / "README.md", text)


def load_artifacts(session: Session, group: list[int]) -> Method:
    """A method with trained concepts: the files named by `artifact=`, else those of the run folder.

    Raises:
        UserError: a file is missing or does not fit.
    """
    method = session.build_method(group)
    paths = session.given_artifacts
    if paths and len(paths) != len(session.data.concepts):
        raise UserError(f"artifact names {len(paths)} files for {len(session.data.concepts)} concepts: give one each.")
    for number, index in enumerate(group):
        name = session.data.concepts[index].name
        path = paths[index] if paths else session.folder / "artifacts" / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} does not exist: train first (stages=[fit,sample]), or give artifact=<file>.")
        if isinstance(method, ReadsPicture):  # ours brings its picture along; other tools' files may need the data's
            data = as_published(session.data, method)
            method.set_reference(number, first_pixels(data, data.concepts[index], session.stack.size))
        artifact.load_into(method, number, path)
    return method
