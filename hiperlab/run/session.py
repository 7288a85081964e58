"""One run: its folder, its settings, and what the stages share."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from hiperlab import files
from hiperlab.base import artifact
from hiperlab.base.artifact import Artifact
from hiperlab.base.capability import EditsPicture
from hiperlab.base.method import Method, Subject
from hiperlab.data.concept import SLOT
from hiperlab.data.dataset import DataSet
from hiperlab.data.edit import as_edits, at_most, one_per_target
from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.protocol import Protocol
from hiperlab.metric.rows import table_row
from hiperlab.model.stack import FrozenStack
from hiperlab.report.environment import environment
from hiperlab.report.tracker import Trackers
from hiperlab.report.trackers import make_trackers

log = logging.getLogger(__name__)


@dataclass
class Session:
    """What the stages of one run share.

    Args:
        cfg: the composed configuration.
        folder: the run folder.
        results: content of results.json, written after every change.
    """

    cfg: DictConfig
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    judges: dict[EncoderConfig, Encoder] = field(default_factory=dict)  # that score while it trains, loaded

    # ---- parts, built when first asked for ---------------------------------------------------------------------------

    @cached_property
    def data(self) -> DataSet:
        """The concepts as the method takes them; bad pictures stop the run here, before any model loads."""
        data = _built(self.cfg.data, "data")
        if self.kept:
            return _references(data, [each.subject.name for each in self.kept])
        method = get_class(self.cfg.method._target_)
        if not issubclass(method, EditsPicture):
            _warn_of_plain_prompts(data)
            return data
        data = as_edits(data)
        if method.per_target:
            data = one_per_target(at_most(data, self.cfg.sample.prompts))
            log.info("%s is fitted to one target text at a time: %d fits", method.__name__, len(data.concepts))
        return data

    @cached_property
    def protocol(self) -> Protocol:
        """The scores' protocol."""
        return _built(self.cfg.metric, "metric")

    @cached_property
    def stack(self) -> FrozenStack:
        """The frozen model in its precision, on the CPU."""
        settings = _plain(self.cfg.model)
        switches = settings.pop("optimise", None)
        start = time.monotonic()
        if not isinstance(switches, dict | None):
            raise UserError(f"model.optimise={switches}: expected a table of switches, or null.")
        stack: FrozenStack = _built(settings, "model")
        precision = self.cfg.precision
        for part in ("unet", "vae", "text"):
            # Module's own `to`: diffusers' override warns about parts that must stay float32, SD has none.
            torch.nn.Module.to(getattr(stack, part), getattr(torch, precision[part]))
        torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = bool(precision.tf32)
        if switches:
            stack.optimise(**switches)
        log.info("model %s loaded in %.1f s", stack.name, time.monotonic() - start)
        if stack.note:
            log.warning("%s", stack.note)
        return stack

    def use_stack(self, stack: FrozenStack) -> None:
        """Take a loaded model, of another run that asks for the same one."""
        self.__dict__["stack"] = stack

    @cached_property
    def sampler(self) -> Any:
        """The scheduler that pictures are drawn with."""
        return _built(self.cfg.sampler, "sampler")

    @property
    def negative(self) -> str | None:
        """Text of guidance's unconditional branch; None for an absent one, which SDXL tells from an empty one."""
        given = self.cfg.sample.negative
        return None if given is None else str(given)

    def drawing(self, count: int) -> dict[str, Any]:
        """How so many pictures are drawn together: named values of `Method.sample` and `Composition.sample`."""
        return {
            "steps": self.sampler.steps, "guidance": self.sampler.guidance, "sampler": self.sampler,
            "negative": self.negative, "batch_size": count,
        }  # fmt: skip

    @cached_property
    def device(self) -> Any:
        """Where pictures are drawn and scored when no trainer decides."""
        wants_cpu = self.cfg.trainer.accelerator == "cpu"
        return torch.device("cpu" if wants_cpu or not torch.cuda.is_available() else "cuda")

    @cached_property
    def subjects(self) -> list[Subject]:
        """What methods may know of the concepts."""
        return [
            Subject(
                concept.name, concept.placeholder, concept.word,
                edit.source if edit else None, edit.targets if edit else (), edit.settings if edit else None,
            )
            for concept in self.data.concepts
            for edit in [concept.edit]
        ]  # fmt: skip

    @cached_property
    def groups(self) -> list[list[int]]:
        """Concept numbers of each method: all of one, or one each where a method does not stack them.

        Also where an earlier version had not stacked them when this run began, and where each ends, or is chosen, by
        its own loss or score.
        """
        everything = list(range(len(self.data.concepts)))
        method = self.method_class
        begun = [c.name for c in self.data.concepts if (self.folder / "checkpoints" / c.name).is_dir()]
        if method.stacks_concepts and not begun and self.cfg.fit.stop is None and self.cfg.monitor is None:
            return [everything]
        if len(everything) > 1 and method.why_alone:
            log.warning("%s: %s. The concepts go one by one.", method.__name__, method.why_alone)
        return [[index] for index in everything]

    @cached_property
    def kept(self) -> list[Artifact]:
        """The concepts named by `artifacts=`, which are drawn together; empty in an ordinary run."""
        return [artifact.read(Path(path)) for path in self.cfg.artifacts or []]

    @property
    def identity(self) -> dict[str, Any]:
        """What tables call this run: method, data and model as chosen, its concepts."""
        groups = {group: self.choices.get(group) for group in ("method", "data", "model")}
        if not self.kept:
            return {**groups, "concepts": [concept.name for concept in self.data.concepts]}
        methods = [str(each.settings["_target_"]).split(".")[-2] for each in self.kept]
        return {**groups, "method": "+".join(methods), "concepts": [each.subject.name for each in self.kept]}

    @property
    def given_artifacts(self) -> list[Path]:
        """The files named by `artifact=`, one per concept; empty for the run's own."""
        given = self.cfg.artifact
        return [Path(path) for path in ([given] if isinstance(given, str) else given or [])]

    @property
    def method_class(self) -> type[Method]:
        """The method's class, which `check_method` has looked at."""
        found: type[Method] = get_class(self.cfg.method._target_)
        return found

    def build_method(self, group: list[int]) -> Method:
        """A fresh method for some of the concepts, untrained, on the CPU."""
        # Partial: Hydra would turn our dataclasses into configs if they went through its hands.
        factory = _built(self.cfg.method, "method", _partial_=True)
        return factory(model=self.stack, concepts=[self.subjects[index] for index in group], seed=self.cfg.seed)

    def method_settings(self) -> dict[str, Any]:
        """The method's composed configuration as plain containers."""
        return _plain(self.cfg.method)

    @property
    def notes(self) -> list[str]:
        """What every reader of the results must know: random weights, untrained judges, drawn pictures."""
        notes = [self.results.get("model_note", "")]
        if not self.protocol.trained:
            notes.append(
                f"metric={self.protocol.name} is UNTRAINED: its scores check the plumbing and measure nothing."
            )
        notes += [f"{concept.name}: {concept.note}" for concept in self.data.concepts if concept.note]
        return [note for note in dict.fromkeys(notes) if note]

    @cached_property
    def trackers(self) -> Trackers:
        """The tracking services, the same for all stages."""
        choices = {**self.choices, **self.identity}
        names = [str(choices.get(group)) for group in ("method", "data", "model", "metric", "precision")]
        name = f"{names[0]}_{names[1]}_{self.cfg.seed}"
        return make_trackers(self.folder, _plain(self.cfg.logger), name, names, _plain(self.cfg))

    @cached_property
    def choices(self) -> dict[str, Any]:
        """Hydra's group choices of this job, such as {"method": "neti"}."""
        return dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}

    # ---- results -----------------------------------------------------------------------------------------------------

    def update(self, **values: Any) -> None:
        """Change results.json, whole or not at all; only rank 0 writes."""
        self.results.update(values)
        if files.is_rank_zero():
            files.write_json(self.folder / "results.json", self.results)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and record what it found."""
        log.info("stage %s", name)
        start = time.monotonic()
        found: dict[str, Any] = {}
        yield found
        self.end_stage(name, found, time.monotonic() - start)

    def end_stage(self, name: str, found: dict[str, Any], seconds: float) -> None:
        """Record what a stage found and how long it took."""
        found["seconds"] = round(seconds, 2)
        stages = {**self.results.get("stages", {}), name: found}
        self.update(stages=stages, seconds={key: value["seconds"] for key, value in stages.items()})
        log.info("stage %s took %.1f s", name, found["seconds"])


def check_method(settings: Mapping[str, Any]) -> None:
    """A method's class must exist, be whole, and take exactly the settings of its yaml.

    Raises:
        UserError: one of these is not so.
    """
    target = str(settings["_target_"])
    module, _, name = target.rpartition(".")
    try:
        method = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a module of the user's may raise anything
        raise UserError(f"method._target_={target} cannot be loaded: {first_line(error)}.") from error
    if lacking := sorted(getattr(method, "__abstractmethods__", ())):
        raise UserError(f"{target} does not write {', '.join(lacking)}, which its bases ask of it.")
    given, wanted = {key for key in settings if not key.startswith("_")}, set()
    for key, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # the shared ones of a base, as one typed value
            (shared,) = get_args(get_type_hints(method.__init__)[key])
            wanted |= set(get_type_hints(shared))
        else:
            wanted.add(key)
    wanted -= {"model", "concepts", "seed"}  # the run's own
    missing = sorted(wanted - given)
    if missing or given - wanted:
        said = [f"the yaml lacks {', '.join(missing)}"] * bool(missing)
        said += [f"the class takes no {', '.join(sorted(given - wanted))}"] * bool(given - wanted)
        raise UserError(f"method: {' and '.join(said)}: {target} and its yaml must name the same settings.")


def _warn_of_plain_prompts(data: DataSet) -> None:
    """Say which texts of an edit name no subject: a concept method draws them without what it has learnt."""
    for concept in data.concepts:
        if plain := [prompt for prompt in concept.prompts if SLOT not in prompt]:
            log.warning(
                "%s: %s without the noun %r, so this method draws it unpersonalised: %s",
                concept.name, "a text" if len(plain) == 1 else f"{len(plain)} texts", concept.word, "; ".join(plain),
            )  # fmt: skip


def _references(data: DataSet, names: list[str]) -> DataSet:
    """The data's concepts that are drawn together: their pictures are what the drawn ones are compared with."""
    there = [concept for concept in data.concepts if concept.name in names]
    if missing := sorted(set(names) - {concept.name for concept in there}):
        log.warning(
            "%s: no such concept in the data, so it is drawn but not scored. Name it, e.g. data.concepts=[%s].",
            ", ".join(missing), ",".join(names),
        )  # fmt: skip
    return replace(data, concepts=tuple(there)) if there else data


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """A config node as plain containers, resolved."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _built(node: Any, key: str, **how: Any) -> Any:
    """What a part of the config describes.

    Raises:
        UserError: a setting is of a kind that it cannot be built from.
    """
    try:
        return instantiate(node, **how)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, TypeError | ValueError | None) or isinstance(cause, UserError):
            raise
        where = re.search(r"full_key: (\S+)", str(error))
        raise UserError(f"{where[1] if where else key} cannot be built: {first_line(cause or error)}.") from error


def open_session(cfg: DictConfig) -> Session:
    """Read an earlier run's results, if any, and make the folder ready."""
    folder = Path(cfg.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"nothing can be written in {folder} ({error.strerror}): choose another outputs_dir."
        ) from error
    path = folder / "results.json"
    results = {}
    if path.is_file():
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(results, dict):
                raise ValueError(f"expected a table, found {type(results).__name__}")
            if "scores" in results:
                results["scores"] = [table_row(row) for row in results["scores"]]
            if "stages" in results:
                results["stages"] = {name: dict(values) for name, values in results["stages"].items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}). Delete it; the checkpoints stay.") from None
    return Session(cfg, folder, results)


def write_settings(session: Session, overrides: list[str]) -> None:
    """config.yaml (composed, resolved), overrides.yaml (what was asked) and environment.json."""
    if not files.is_rank_zero():
        return
    files.atomic_write(session.folder / "config.yaml", OmegaConf.to_yaml(session.cfg, resolve=True))
    files.atomic_write(session.folder / "overrides.yaml", yaml.safe_dump(overrides, allow_unicode=True))
    files.write_json(session.folder / "environment.json", environment())


_SPEAKER: ContextVar[Path | None] = ContextVar("the run that a log line is about", default=None)


@contextmanager
def speaks_for(folder: Path) -> Iterator[None]:
    """Inside, log lines are about one of the runs of this process: no other's run.log has them."""
    token = _SPEAKER.set(folder)
    try:
        yield
    finally:
        _SPEAKER.reset(token)


def parts(amounts: Sequence[float]) -> list[float]:
    """Each amount's part of their sum, equal ones where all are zero."""
    total = sum(amounts)
    return [amount / total if total else 1 / len(amounts) for amount in amounts]


def configure_logging(*folders: Path) -> None:
    """Our lines to the terminal and to each run folder's run.log; libraries only when they warn.

    With several runs, the terminal names the one that a line is about (`speaks_for`).
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)

    def shown(record: logging.LogRecord) -> bool:
        about = _SPEAKER.get()
        record.about = f"{about.name}: " if about is not None and len(folders) > 1 else ""
        return record.name.startswith("hiperlab") or record.levelno >= logging.WARNING

    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(asctime)s %(about)s%(message)s", "%H:%M:%S"))
    terminal.addFilter(shown)
    root.addHandler(terminal)
    for folder in folders if files.is_rank_zero() else ():
        file = logging.FileHandler(folder / files.LOG_NAME, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        file.addFilter(partial(_is_about, folder))
        root.addHandler(file)
    root.setLevel(logging.WARNING)
    logging.getLogger("hiperlab").setLevel(logging.INFO if files.is_rank_zero() else logging.WARNING)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", ".*LeafSpec.*", module="pytorch_lightning.*")  # torch's news for Lightning


def _is_about(folder: Path, record: logging.LogRecord) -> bool:
    """Whether a line belongs into a run's log: it is about that run, or about all."""
    return _SPEAKER.get() in (None, folder)
