"""`artifacts=[…]`: kept concepts drawn together, each by the method and the settings that its file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from PIL import Image

from hiperlab import files
from hiperlab.base import artifact
from hiperlab.base.composition import Composition
from hiperlab.base.method import Method
from hiperlab.cli.process import config_dir
from hiperlab.cli.targets import check_targets
from hiperlab.errors import UserError
from hiperlab.report.grid import grid, save_png
from hiperlab.run.picture_key import concept_inputs, model_inputs, picture_key, sampler_inputs
from hiperlab.run.sample import MANIFEST, draw_missing, seeds_of
from hiperlab.run.session import Session

APART = ("optimizer", "cache")  # settings that drawing kept concepts does not take from their files


def check_artifacts_together(session: Session) -> None:
    """What can be wrong with `artifacts=` and `sample.texts=` before the model loads.

    Raises:
        UserError: no such file, another tool's file, no texts, or settings that do not go together.
    """
    cfg = session.cfg
    if not cfg.artifacts:
        if cfg.sample.texts:
            raise UserError("sample.texts goes with artifacts=[…]; an ordinary run's texts are data.prompts.")
        return
    if isinstance(cfg.artifacts, str):
        raise UserError(f"artifacts={cfg.artifacts} is one file: give a list, artifacts=[a.safetensors,b.safetensors].")
    if session.given_artifacts or "fit" in cfg.stages:
        raise UserError("artifacts=… draws kept concepts: leave artifact= away, add stages=[sample,score,summary].")
    for path in map(Path, cfg.artifacts):
        if not path.is_file():
            raise UserError(f"artifacts=[{path}] does not exist. Give the files of trained concepts.")
        if not artifact.is_own(path):
            raise UserError(f"{path} is another tool's and does not name its method: draw it alone with artifact=.")
    if not cfg.sample.texts or isinstance(cfg.sample.texts, str):
        words = " next to ".join(each.subject.placeholder for each in session.kept)
        raise UserError(f"sample.texts must be a list of what to draw, e.g. 'sample.texts=[\"a photo of {words}\"]'.")


def compose(session: Session) -> Composition:
    """The kept concepts, each in its method, on the run's device.

    Raises:
        UserError: a file of another base, of no method, or one that others cannot be drawn with.
    """
    methods = [
        _method(session, path, each) for path, each in zip(map(Path, session.cfg.artifacts), session.kept, strict=True)
    ]
    return Composition(methods)


def _method(session: Session, path: Path, kept: artifact.Artifact) -> Method:
    session.stack.base.check(kept.base, str(path))
    settings = {key: value for key, value in kept.settings.items() if key not in APART}
    check_targets(settings, session.cfg.allowed_targets, "method")  # the file may come from anywhere
    target = str(kept.settings.get("_target_"))
    try:
        known = issubclass(get_class(target), Method)
    except (ImportError, ValueError):
        known = False
    if not known:
        raise UserError(f"{path} was learnt by {target}, which is no method here.")
    settings = {**later_settings(target), **settings}
    # Drawing needs no optimizer; where something is kept on disk is not the file's to say.
    own = {"optimizer": None, "cache": None}
    factory = instantiate(settings, _partial_=True, **{key: own[key] for key in own if key in kept.settings})
    method: Method = factory(model=session.stack, concepts=[kept.subject], seed=session.cfg.seed)
    artifact.load_into(method, 0, path)
    return method.to(session.device)


def later_settings(target: str) -> dict[str, Any]:
    """A method's settings by its yaml, for a file that was kept before some of them were there.

    What an earlier version did is what their defaults do; references to other settings are left out.

    Args:
        target: the method's dotted name.
    """
    for path in sorted((config_dir() / "method").glob("*.yaml")):
        loaded: Any = OmegaConf.load(path)
        table = loaded.get("method", {})
        if table.get("_target_") == target:
            plain: dict[str, Any] = OmegaConf.to_container(table, resolve=False)  # type: ignore[assignment]
            return {key: value for key, value in plain.items() if key not in APART and "${" not in str(value)}
    return {}


def sample(session: Session) -> None:
    """Draw what is missing, write samples/samples.jsonl and one grid.

    The manifest names a picture once for every concept it shows: each is compared with its own references.
    """
    with session.stage("sample") as found:
        composition = compose(session)
        pictures = _plan(session, composition)

        def paint(batch: list[dict[str, Any]]) -> torch.Tensor:
            return composition.sample(
                [record["text"] for record in batch],
                [record["seed"] for record in batch],
                **session.drawing(len(batch)),
            )

        draw_missing(session.folder, pictures, paint, session.cfg.sample.batch_size, found)
        if files.is_rank_zero():
            files.write_jsonl(session.folder / "samples" / MANIFEST, _manifest(composition, pictures))
            _write_grid(session, composition, pictures)
        found["pictures"] = len(pictures)


def _plan(session: Session, composition: Composition) -> list[dict[str, Any]]:
    """One record per text and seed.

    Raises:
        UserError: a text without any placeholder.
    """
    inputs = {
        "model": model_inputs(session.stack, session.cfg.precision),
        "sampler": sampler_inputs(session.sampler, session.negative, session.stack),
        "concepts": [
            concept_inputs(type(method), kept.settings, kept.subject, method.artifact(0))
            for method, kept in zip(composition.methods, session.kept, strict=True)
        ],
    }
    folder = "-".join(subject.name for subject in composition.subjects)
    records = []
    for number, text in enumerate(map(str, session.cfg.sample.texts)):
        if not composition.shown(text):
            words = ", ".join(subject.placeholder for subject in composition.subjects)
            raise UserError(f"sample.texts: {text!r} names none of {words}.")
        records += [
            {
                "concept": folder, "text": text, "seed": seed, "variant": "",
                "path": f"samples/{folder}/{number:02d}_{seed}.png",
                "key": picture_key(**inputs, text=text, seed=seed, variant=""),
            }
            for seed in seeds_of(session.cfg.sample.seeds)
        ]  # fmt: skip
    return records


def _manifest(composition: Composition, pictures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    words = {
        "placeholder": [subject.placeholder for subject in composition.subjects],
        "word": [subject.word for subject in composition.subjects],
    }
    return [
        {**picture, "concept": subject.name, "prompt": picture["text"], **words}
        for picture in pictures
        for subject in composition.shown(picture["text"])
    ]


def _write_grid(session: Session, composition: Composition, pictures: list[dict[str, Any]]) -> None:
    """Each concept's reference pictures, then a row per text, a column per seed."""
    size = session.stack.size
    known = {concept.name: concept for concept in session.data.concepts}
    rows: dict[str, list[Image.Image | None]] = {}
    for subject in composition.subjects:
        if concept := known.get(subject.name):
            views = [view.resize((size, size), Image.Resampling.BICUBIC) for view in concept.views[:5]]
            rows[f"{subject.placeholder}: references"] = list(views)
    for record in pictures:
        with Image.open(session.folder / record["path"]) as picture:
            rows.setdefault(record["text"], []).append(picture.convert("RGB"))
    title = f"{session.identity['method']} on {session.stack.name}"
    name = "-".join(subject.name for subject in composition.subjects)
    save_png(grid(list(rows.values()), rows=list(rows), title=title), session.folder / "grids" / f"{name}.png")
