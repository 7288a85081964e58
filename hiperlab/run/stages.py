"""What one run does: fit, sample, score, summary; each also alone on an earlier run's folder."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from hiperlab import files
from hiperlab.cli.hydra_job import resume_command, task_overrides
from hiperlab.errors import DiskFullError, StoppedError, UserError
from hiperlab.metric.rows import ALL
from hiperlab.model.kind import config_is_sdxl
from hiperlab.report.environment import command
from hiperlab.report.signals import StopSignals
from hiperlab.run import fit, sample, sample_composed, score
from hiperlab.run.monitor import check_monitor
from hiperlab.run.resume import check_resume
from hiperlab.run.sample_composed import check_artifacts_together
from hiperlab.run.session import Session, check_method, configure_logging, open_session, write_settings
from hiperlab.run.unrelated import check_unrelated

log = logging.getLogger(__name__)
WEIGHTS = re.compile(r"\([^()]+:\s*\d*\.?\d+\)|\[[^\[\]]+\]")  # as the web UIs write them


def main(cfg: DictConfig) -> float | None:
    """Run the stages in `cfg.stages`; the composed config is checked already.

    Returns:
        The objective, for optimisers, or None.

    Raises:
        UserError: a mistake in what was asked.
        StoppedError: told to stop; everything worth keeping is saved.
    """
    session = open_session(cfg)
    with files.RunLock(session.folder):
        if begin(session):
            with recorded(session), StopSignals() as signals:
                session.update(model_note=session.stack.note)
                if "fit" in cfg.stages:
                    fit.fit(session, signals, resume_command(session.folder))
                draw(session)
                judge(session)
            end(session)
    return session.results.get("objective")


def begin(session: Session) -> bool:
    """Check what is asked and mark the run as running; False where there is nothing to do.

    Raises:
        UserError: a mistake in what was asked.
    """
    if _finished(session):
        print(f"hiperlab: {session.folder} is finished; nothing to do (more pictures: stages=[sample])")
        return False
    configure_logging(session.folder)
    _check(session)  # before anything in the folder changes: a mistaken command must not mark a good run
    write_settings(session, task_overrides())
    session.update(
        status="running",
        **session.identity,
        seed=session.cfg.seed,
        command=command(),
        run_dir=str(session.folder),
    )
    return True


@contextlib.contextmanager
def recorded(session: Session) -> Iterator[None]:
    """Whatever ends the run in here is written into its results, and raised again.

    Raises:
        StoppedError: told to stop, with the command that goes on.
    """
    try:
        yield
    except BaseException as error:
        stopped = error if isinstance(error, StoppedError) and error.code != 1 else None
        with contextlib.suppress(DiskFullError):  # then the error itself says so
            session.update(status="stopped" if stopped else "failed", error=" ".join(str(error).split())[:500])
        if not stopped and "trackers" in vars(session):  # begun: services would take it for a run that ended well
            session.trackers.finish(exit_code=1)
        if stopped and "resume with" not in str(stopped):  # outside training: pictures drawn so far are kept
            raise StoppedError(f"{stopped}; resume with: {resume_command(session.folder)}", stopped.code) from error
        raise


def end(session: Session) -> None:
    """Mark the run as finished, or as partial where a stage that it was once asked for is missing."""
    session.results.pop("error", None)
    session.update(status="finished" if _complete(session) else "partial")
    _say_where(session)


def _finished(session: Session) -> bool:
    """A finished run that is resumed is left as it is, unless it is asked for more steps."""
    fitted = session.results.get("stages", {}).get("fit", {})
    cfg = session.cfg
    asked = cfg.resume == "auto" and "fit" in cfg.stages and session.results.get("status") == "finished"
    early = fitted.get("ended_early", fitted.get("finished"))  # the name in folders of 0.1.0
    return asked and (fitted.get("steps") == cfg.fit.steps or bool(early))


def _complete(session: Session) -> bool:
    """Whether every stage that this run was ever asked for has ended."""
    return set(session.cfg.stages) <= set(session.results.get("stages", {}))


def check_artifacts(session: Session) -> None:
    """Files named by `artifact=` and `artifacts=` must exist, and are for sampling, not for training.

    Raises:
        UserError: they do not, or the stages include fit.
    """
    for path in session.given_artifacts:
        if path.is_dir():
            inside = sorted(each.name for each in path.iterdir() if each.suffix in (".safetensors", ".bin", ".pt"))
            raise UserError(f"artifact={path} is a folder: name a file in it{', e.g. ' + inside[0] if inside else ''}.")
        if not path.is_file():
            raise UserError(f"artifact={path} does not exist. Give the file of a trained concept.")
    if session.given_artifacts and "fit" in session.cfg.stages:
        raise UserError("artifact=… samples a concept that is trained already: add stages=[sample,score,summary].")
    check_artifacts_together(session)


def check_base(session: Session) -> None:
    """A method that says why it does not run on SDXL is not given such a model.

    Raises:
        UserError: it would be; only the names of the model's parts have been read.
    """
    method, model = session.method_class, session.cfg.model
    if method.why_not_sdxl and config_is_sdxl(model):
        method.check_sdxl(str(model.name))


def check_texts(session: Session) -> None:
    """Texts that would be read as letters where more is meant.

    Raises:
        UserError: a learnt word in the negative text, which the frozen text encoder reads.
    """
    negative = session.negative or ""
    for subject in [*session.subjects, *(each.subject for each in session.kept)]:
        if subject.placeholder in negative:
            raise UserError(
                f"sample.negative={negative!r} names the placeholder {subject.placeholder}, but the negative text is "
                f"plain text and no learnt word reaches it: leave it out, or write {subject.word!r}."
            )
    prompts = [prompt for concept in session.data.concepts for prompt in concept.prompts]
    if weighted := [text for text in [*prompts, negative] if WEIGHTS.search(text)]:
        log.warning("weights such as (word:1.4) and [word] are read as letters: %s", weighted[0])


def _check(session: Session) -> None:
    """Everything that can be wrong with a command, cheapest first, before gigabytes are loaded.

    Raises:
        UserError: bad pictures or settings, missing files, or a folder that cannot be trained in.
    """
    check_method(session.method_settings())
    check_base(session)
    check_artifacts(session)
    data, protocol = session.data, session.protocol
    check_texts(session)
    check_unrelated(session)
    score.check_objective(session)
    session.trackers  # noqa: B018 - unknown settings and packages that are not installed stop it here
    log.info("%s: %d pictures", ", ".join(c.name for c in data.concepts), sum(len(c.views) for c in data.concepts))
    if "sample" in session.cfg.stages:
        log.debug("%s", session.sampler.scheduler)  # built here: one that cannot draw is refused before a night's fit
    if "fit" in session.cfg.stages:
        fit.check_stop(session)
        check_monitor(session)
        fit.check_trainer(session)
        check_resume(session)
    if "score" in session.cfg.stages:
        for message in protocol.fetch():
            log.warning("%s", message)


def draw(session: Session) -> None:
    """The sample stage, if it is asked for."""
    if "sample" in session.cfg.stages:
        (sample_composed if session.kept else sample).sample(session)


def judge(session: Session) -> None:
    """The stages behind the pictures that are asked for."""
    if not files.is_rank_zero():
        return
    if "score" in session.cfg.stages:
        score.score(session)
    if "summary" in session.cfg.stages:
        score.summary(session)


def _say_where(session: Session) -> None:
    """The few lines a person reads at the end."""
    if not files.is_rank_zero():
        return
    table: list[dict[str, Any]] = session.results.get("scores", [])
    for row in table:
        if row["kind"] == ALL:
            variant = f" [{row['variant']}]" if row.get("variant") else ""
            spread = "" if row["low"] is None else f" (95 %: {row['low']:.3f} to {row['high']:.3f})"
            mean = "-" if row["mean"] is None else f"{row['mean']:.3f}"
            log.info("%-12s%s %s%s, %d pictures", row["metric"], variant, mean, spread, row["n"])
    for note in session.results.get("notes", []):
        log.warning("%s", note)
    for name in ("report.html", "artifacts", "grids"):
        if (session.folder / name).exists():
            log.info("%s", session.folder / name)
