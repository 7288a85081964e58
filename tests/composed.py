"""Methods as their yaml composes them, around a given stack; what every conformance test starts from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hiperlab.base.capability import ReadsPicture
from hiperlab.base.method import Method, Subject
from hiperlab.data.batch import Batch
from hiperlab.draws import normal
from hiperlab.model.shared_calls import together

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
SHORT = ("fit.steps=2", "fit.batch_size=2", "sampler.steps=2")  # of the suite's trainings and pictures
CLASS = {"count": 2, "folder": None, "steps": 1, "weight": 1.0}  # two class pictures of one step, kept in memory
WORDS = ("cat", "dog", "toy", "vase")
SUBJECTS = [Subject(f"my-{word}", f"<my-{word}>", word) for word in WORDS]


@functools.cache
def config(name: str, *changes: str) -> DictConfig:
    """The composed configuration of `method=<name> model=tiny`, with further overrides."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("config", overrides=[f"method={name}", "model=tiny", "hydra/launcher=basic", *changes])


def quick(name: str) -> dict[str, Any]:
    """The method's settings in a short run that keeps nothing on disk; derived, so that no method is listed here."""
    settings: Any = OmegaConf.to_container(config(name, *SHORT).method, resolve=True)
    if "prior" in settings:
        settings["prior"] |= CLASS
    return settings | {key: None for key in ("cache",) if key in settings}


def trains(name: str) -> bool:
    """Whether a method has anything to train: its published schedule has steps."""
    return bool(OmegaConf.load(ROOT / "conf" / "method" / f"{name}.yaml").fit.steps)


def build(name: str, stack: Any, subjects: list[Subject], seed: int = 0, **changes: Any) -> Method:
    """The method around `stack`, with its published settings but for `changes` and what `quick` shortens."""
    settings = OmegaConf.merge(quick(name), changes)
    method = instantiate(settings, _partial_=True)(model=stack, concepts=list(subjects), seed=seed)
    if isinstance(method, ReadsPicture):
        for index, subject in enumerate(subjects):
            method.set_reference(index, picture(subject, 0, stack.size))
    return method


def kept(name: str, stack: Any, subject: Subject, seed: int = 1, size: float = 0.05, **changes: Any) -> Method:
    """A method whose numbers are not what it starts from, as after a training."""
    method = build(name, stack, [subject], **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return method


def picture(subject: Subject, view: int, size: int) -> torch.Tensor:
    """A concept's picture (3, size, size): it depends on the class noun only, wherever the concept stands."""
    number = WORDS.index(subject.word) if subject.word in WORDS else len(WORDS)
    return normal(number, "pixels", [view], (3, size, size))[0].clamp(-1, 1)


def batch(subjects: list[Subject], samples: list[int], size: int = 128) -> Batch:
    """A micro batch as the data module would give it: rows concept-major, the same draws for every concept."""
    rows = [(number, subject, k) for number, subject in enumerate(subjects) for k in samples]
    return Batch(
        pixels=torch.stack([picture(subject, k % 3, size) for _, subject, k in rows]),
        prompts=[f"a photo of a {subject.placeholder}" for _, subject, _ in rows],
        concept=torch.tensor([number for number, _, _ in rows]),
        sample=torch.tensor([k for _, _, k in rows]),
        view=torch.tensor([k % 3 for _, _, k in rows]),
        flip=torch.zeros(len(rows), dtype=torch.bool),
    )


def train(method: Method, steps: int, micro: int = 2, clip: float | None = None) -> list[float]:
    """Plain optimizer steps through `training_step`, without a Trainer; returns the losses."""
    optimizer = method.configure_optimizers()
    method.train()
    losses = []
    for step in range(steps):
        loss = method.training_step(batch(list(method.concepts), [step * micro + row for row in range(micro)]), step)
        loss.backward()
        method.configure_gradient_clipping(optimizer, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_together(methods: Sequence[Method], steps: Sequence[int], micro: int = 2) -> list[list[float]]:
    """`train` for several methods whose U-Net calls are shared, each with so many steps; returns each one's losses."""
    optimizers = [method.train().configure_optimizers() for method in methods]
    losses: list[list[float]] = [[] for _ in methods]
    for step in range(max(steps)):
        going = [number for number, most in enumerate(steps) if step < most and not methods[number].finished]
        samples = [step * micro + row for row in range(micro)]
        works = [methods[number].training_calls(batch(list(methods[number].concepts), samples)) for number in going]
        found = together(methods[0].model, works)
        if found:
            torch.stack(found).sum().backward()
        for number, loss in zip(going, found, strict=True):
            optimizers[number].step()
            optimizers[number].zero_grad()
            losses[number].append(float(loss.detach()))
    return losses


class Asked(NamedTuple):
    """One call of the U-Net: its rows, whether it had weights of its own, whether the answer has a gradient."""

    rows: int
    changed: bool
    gradient: bool


class UNetCalls:
    """What a stack's U-Net is asked from now on."""

    def __init__(self, stack: Any, monkeypatch: Any) -> None:
        self._found: list[Asked] = []
        self._plain = stack.predict
        monkeypatch.setattr(stack, "predict", self._predict)

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Any) -> torch.Tensor:
        own = conditioning.offsets is not None and conditioning.row_offsets is None
        self._found.append(Asked(len(latents), own, torch.is_grad_enabled()))
        return self._plain(latents, timestep, conditioning)

    def taken(self) -> list[Asked]:
        """The calls since this was last asked."""
        found, self._found = self._found, []
        return found
