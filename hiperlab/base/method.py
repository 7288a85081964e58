"""The contract: what the run, the report and the tests may ask of every personalisation method.

What only some of them can do stands in `hiperlab.base.capability`.
Axes: R rows of a micro batch (concept-major), L cross-attention layers, N tokens, D text width, C latent channels.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab import draws
from hiperlab.base.best_score import KEY as BEST_SCORE
from hiperlab.base.best_score import BestScore
from hiperlab.base.early_stop import KEY as EARLY_STOP
from hiperlab.base.early_stop import EarlyStop, FixedInputs
from hiperlab.data.batch import Batch
from hiperlab.data.concept import EditSettings, check_name
from hiperlab.data.images import Crop
from hiperlab.errors import UserError
from hiperlab.loss.diffusion import denoising_loss, per_concept, weighted
from hiperlab.model import noise as diffusion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler, ddim, generation_calls
from hiperlab.model.shared_calls import Call, Calls, alone, within
from hiperlab.model.stack import FrozenStack
from hiperlab.model.state import misfits
from hiperlab.model.text import check_placeholder
from hiperlab.optim.fused import fused

Own = TypeVar("Own", bound="Method")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Subject:
    """What a method may know of a concept before it sees pictures.

    Args:
        name: names its artifact.
        placeholder: the word that stands for it in prompts, e.g. "<cats>".
        word: the class noun or super category, one token, e.g. "cat".
        source: what its picture shows, in plain words ("a standing dog"); None where nobody said.
        targets: the plain texts it will be edited to; empty where there are none.
        edit_settings: how the data's authors drew its edits; None where nobody said. Artifacts do not keep it.

    Raises:
        UserError: the name cannot be a file name.
    """

    name: str
    placeholder: str
    word: str
    source: str | None = None
    targets: tuple[str, ...] = ()
    edit_settings: EditSettings | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    def with_class_noun(self, prompt: str) -> str:
        """The prompt with the class noun in the placeholder's place: the text as a person would write it."""
        return prompt.replace(self.placeholder, self.word)

    def with_words(self, prompt: str, words: str) -> str:
        """The prompt with `words`, which end in the class noun, for the placeholder and a noun right behind it.

        "a <rex> on a sofa" and "a <rex> dog on a sofa" both become "a sks dog on a sofa" for `words` "sks dog".
        """
        return re.sub(rf"{re.escape(self.placeholder)}(?: {re.escape(self.word)}\b)?", lambda _: words, prompt)


@dataclass(frozen=True)
class Step:
    """What is known at one denoising step; each method reads what it needs and the signature never grows.

    Args:
        prompts: R texts with placeholders in place.
        concept: (R,) int64, which concept each row is about.
        timestep: (R,) int64 in [0, 1000).
        latents: z_t (R, C, H, W) as the U-Net reads it; None where only text is encoded, and in pictures that are
            drawn by methods that do not say `reads_latents`.
        samples: (R,) global sample numbers, the key of random draws; None when sampling (nothing random then).
        images: reference pictures (R, 3, H, W) in [-1, 1], or None.
        reference: what the frozen model predicts (R, C, H, W), in training by methods that ask it
            (`reference_condition`); else None.
        variant: which way of using the trained concept, one of `Method.variants`.
    """

    prompts: Sequence[str]
    concept: Tensor
    timestep: Tensor
    latents: Tensor | None = None
    samples: Tensor | None = None
    images: Tensor | None = None
    variant: str = ""
    reference: Tensor | None = None


def in_evaluation(
    make: Callable[Concatenate[Own, Arguments], Calls[Result]],
) -> Callable[Concatenate[Own, Arguments], Calls[Result]]:
    """Decorates a method's `_calls` that run in evaluation mode, which is left while they wait."""

    @functools.wraps(make)
    def made(self: Own, *args: Arguments.args, **how: Arguments.kwargs) -> Calls[Result]:
        return within(self._evaluating, make(self, *args, **how))

    return made


class Method(pl.LightningModule, ABC):
    """A personalisation method: a LightningModule around the frozen stack, which trains only its own parameters.

    Parameters are stacked per concept along their first axis, so that one run personalises several concepts at once;
    loss, randomness and clipping are per concept, hence a concept's result does not depend on its neighbours.

    Args:
        model: the frozen stack.
        concepts: what is personalised, one slice of every parameter each.
        optimizer: parameters -> optimizer.
        seed: of initialisation and of every draw during training.
    """

    stacks_concepts: ClassVar[bool] = True  # False: one object has room for one concept
    why_alone: ClassVar[str] = ""  # why no U-Net call of its training can be shared with others', for people to read
    why_apart: ClassVar[str] = ""  # the same of its pictures, of those of an edit's source at the least
    why_not_sdxl: ClassVar[str] = ""  # why it does not run where the U-Net reads a pooled row beside the text (SDXL)
    why_no_early_stop: ClassVar[str] = ""  # why neither a flat loss nor a score may end its training or choose a step
    time_dependent: ClassVar[bool] = False  # True: conditioning changes along the sampling schedule
    reads_latents: ClassVar[bool] = False  # True: it depends on z_t too, so every picture has its own at every step
    fixed_settings: ClassVar[tuple[str, ...]] = ()  # kept as attributes; a concept only works with the same values
    sampling_settings: ClassVar[tuple[str, ...]] = ()  # only drawing reads them: a resumed training may change them
    training_settings: ClassVar[tuple[str, ...]] = ("optimizer",)  # drawing does not read them: no picture is redrawn
    variant_settings: ClassVar[tuple[str, ...]] = ()  # every variant names their value: others' pictures stay
    published_crop: ClassVar[Crop] = "squeeze"  # how its authors' code makes pictures square (data.center_crop=null)
    published_flip: ClassVar[float] = 0.5  # how often its authors' code mirrors a picture (data.flip=null)
    consistency: float | None = None  # strength of guidance from the frozen model to the tuned one; None: the plain way
    variants: tuple[str, ...] = ("",)  # ways to sample one trained concept; "" is the plain one

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
    ) -> None:
        super().__init__()
        if model.pools:
            self.check_sdxl(model.name)
        if not self.stacks_concepts and len(concepts) > 1:
            raise UserError(f"{type(self).__name__} trains one concept at a time, {len(concepts)} were given.")
        for field in ("name", "placeholder"):
            given = [getattr(concept, field) for concept in concepts]
            if len(set(given)) < len(given):
                raise UserError(f"concepts need different {field}s, got {', '.join(given)}.")
        for concept in concepts:
            check_placeholder(model.tokenizer, concept.placeholder)
        self.model = model
        self.concepts = tuple(concepts)
        self.seed = seed
        self._optimizer = optimizer
        self._moments: dict[tuple[int, int, bool, int], Tensor] = {}
        self._losses: list[Tensor] = []
        self.last_timesteps: Tensor | None = None
        self.early_stop: EarlyStop | None = None  # given by who trains it, as the next
        self.best_score: BestScore | None = None

    def said_elsewhere(self, index: int) -> str:
        """What the prompts of other tools say where ours have a concept's placeholder: that, unless a method says."""
        return self.concepts[index].placeholder

    @classmethod
    def check_sdxl(cls, model: str) -> None:
        """Refuse a model of SDXL's kind where the method says why it does not run there.

        Raises:
            UserError: it says so.
        """
        if cls.why_not_sdxl:
            raise UserError(
                f"{cls.__name__} does not run on SDXL (model={model}): {cls.why_not_sdxl}. Choose a model of Stable "
                "Diffusion 1.x or 2.x, e.g. model=sd15."
            )

    # ---- what a method writes --------------------------------------------------------------------------------------

    @abstractmethod
    def condition(self, step: Step) -> Conditioning:
        """Conditioning (L or 1, R, N, D) for the step's R rows: the one thing every method writes."""

    def reference_condition(self, step: Step) -> Conditioning | None:
        """What the frozen model is asked beside the tuned one, (1, R, N, D): in training for `Step.reference`.

        In pictures it is asked where `consistency` is a number. None, the default, does not ask.
        """
        return None

    @property
    def finished(self) -> bool:
        """Whether training has nothing left to do, however many steps were asked."""
        return False

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; by default all that requires grad."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def prepare_batch(self, batch: Batch) -> Batch:
        """What a step trains on: the batch's rows, then any more; by default the batch as it comes."""
        return batch

    def losses(self, step: Step, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The denoising losses by name, one number per row of the batch as it came; "" is the method's own.

        Args:
            step: of all rows that `prepare_batch` gave.
            prediction: the U-Net's output for them (R', C, H, W).
            target: what it is compared with, noise or velocity, same shape.
        """
        return {"": denoising_loss(prediction, target)}

    def extra_losses(self, step: Step, z0: Tensor) -> dict[str, Tensor]:
        """Further losses by name, one number per row (R,); logged as loss/<name>, then added.

        Args:
            step: what `condition` was given.
            z0: clean latents (R, C, H, W), scaled.
        """
        return {}

    def posterior_noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Unit normals (R, *shape) of the VAE's posterior; by default fresh ones for every sample."""
        return draws.normal(self.seed, "posterior", batch.sample, shape)

    def training_noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """The noise (R, *shape) that training adds; by default unit normals, fresh ones for every sample."""
        return draws.normal(self.seed, "noise", batch.sample, shape)

    def moments(self, batch: Batch) -> Tensor:
        """The VAE's posterior (R, 2C, H, W), mean and log-variance, of each row's picture; it runs once a picture."""
        found = []
        offset = torch.zeros_like(batch.view) if batch.offset is None else batch.offset
        columns = (batch.concept, batch.view, batch.flip, offset)
        for row, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            if key not in self._moments:
                # One picture at a time: the numbers must not depend on which pictures happen to be missing.
                self._moments[key] = self.model.encode_moments(batch.pixels[row : row + 1])[0]
            found.append(self._moments[key])
        return torch.stack(found)

    def negative_condition(self, text: str, variant: str, concepts: Sequence[int]) -> Conditioning:
        """All that guidance's unconditional branch reads, of one row or one for each of `concepts`.

        By default what the frozen text encoders make of the text, the same for all.

        Args:
            text: the negative text.
            variant: one of `variants`.
            concepts: number of each picture's concept.
        """
        return self.model.condition_text([text])

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """One micro batch: the sum, 0-d, over concepts of each concept's mean loss (Ho et al. 2020, algorithm 1)."""
        return alone(self.model, self.step_calls(batch))

    @property
    def ended(self) -> bool:
        """Whether training makes no further step: it has finished, or `early_stop` or `best_score` says so."""
        return self.finished or any(each.ended for each in (self.early_stop, self.best_score) if each is not None)

    def step_calls(self, batch: Batch) -> Calls[Tensor]:
        """`training_calls`; before the first of an optimizer step, `early_stop` sees the loss on its fixed inputs."""
        stop = self.early_stop
        if stop is not None and not self._losses and stop.is_due():
            if stop.latents is None:
                stop.inputs, stop.latents = self._prepared(stop.inputs)
            stop.see(float((yield from self.fixed_loss_calls(stop.inputs, stop.latents))))
        return (yield from self.training_calls(batch))

    @torch.no_grad()
    def fixed_loss_calls(self, inputs: FixedInputs, z0: Tensor) -> Calls[Tensor]:
        """The plain denoising loss on fixed inputs, 0-d float64: no regulariser, no class pictures.

        Args:
            inputs: as `_prepared` gives them.
            z0: their clean latents (B, C, H, W), scaled.
        """
        rows, noise = inputs.batch, inputs.noise.to(z0)
        losses = []
        for part in inputs.timesteps.to(z0.device):
            z_t = self.model.add_noise(z0, noise, part)
            step = Step(rows.prompts, rows.concept, part, z_t, rows.sample, rows.pixels)
            prediction = yield Call(z_t, part, self.condition(step).sized(rows.sizes))
            losses.append(denoising_loss(prediction.double(), self.model.target(z0, noise, part).double()))
        return torch.cat(losses).mean()

    @torch.no_grad()
    def _prepared(self, inputs: FixedInputs) -> tuple[FixedInputs, Tensor]:
        """The inputs as this method trains on them, without rows of class pictures, and their z0 (B, C, H, W)."""
        batch: Batch = self.transfer_batch_to_device(inputs.batch, self.device, 0)
        rows = self.prepare_batch(batch).before(len(batch.prompts))
        moments = self.moments(rows)
        z0 = self.model.scale(diffusion.sample_posterior(moments, inputs.posterior.to(moments)))
        return replace(inputs, batch=rows), z0

    def training_calls(self, batch: Batch) -> Calls[Tensor]:
        """One micro batch's loss, 0-d, as U-Net calls that other methods' may share."""
        rows = self.prepare_batch(batch)
        z0 = self.clean_latents(rows)
        noise = self.training_noise(rows, z0.shape[1:]).to(z0)
        t = draws.integers(self.seed, "timestep", rows.sample, self.model.num_timesteps).to(z0.device)
        self.last_timesteps = t[: len(batch.concept)]
        z_t = self.model.add_noise(z0, noise, t)
        step = Step(rows.prompts, rows.concept, t, z_t, rows.sample, rows.pixels)
        if (frozen := self.reference_condition(step)) is not None:
            step = replace(step, reference=(yield Call(z_t, t, frozen.sized(rows.sizes), gradient=False)))
        prediction = yield Call(z_t, t, self.condition(step).sized(rows.sizes))
        target = self.model.target(z0, noise, t)
        if rows.mask is not None:
            if step.reference is not None:
                step = replace(step, reference=weighted(step.reference, target, rows.mask)[0])
            prediction, target = weighted(prediction, target, rows.mask)
        found = self.losses(step, prediction, target) | self.extra_losses(step, z0)
        losses = {name: per_concept(value, batch.concept, len(self.concepts)) for name, value in found.items()}
        self._note_losses(losses)
        return torch.stack(list(losses.values())).sum()

    def clean_latents(self, batch: Batch) -> Tensor:
        """z0 (R, C, H, W), scaled: a posterior sample of each row's VAE moments."""
        moments = self.moments(batch)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = self.posterior_noise(batch, shape).to(moments)
        return self.model.scale(diffusion.sample_posterior(moments, noise))

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer over `param_groups`."""
        return fused(self._optimizer(self.param_groups()))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each concept's gradient by its own norm, so that a neighbour's large gradient changes nothing."""
        if not gradient_clip_val:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])  # (parameters, K)
        factor = (gradient_clip_val / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))

    def _note_losses(self, losses: dict[str, Tensor]) -> None:
        """Keep what `on_before_optimizer_step` averages over the accumulated micro batches."""
        named = {"/".join(filter(None, ("loss", name))): value.sum() for name, value in losses.items()}
        if len(self.concepts) > 1:
            total = torch.stack(list(losses.values())).sum(0)
            named |= {f"loss/{concept.name}": value for concept, value in zip(self.concepts, total, strict=True)}
        self._loss_names = list(named)
        self._losses.append(torch.stack(list(named.values())).detach())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the step's losses, averaged over its micro batches and ranks."""
        for name, value in self.step_metrics().items():
            self.log(name, value, prog_bar=name == "loss", sync_dist=self.trainer.world_size > 1, batch_size=1)

    def step_metrics(self) -> dict[str, Tensor]:
        """The losses (0-d) of an optimizer step by name, averaged over its micro batches; they are forgotten then."""
        means = torch.stack(self._losses).mean(0)
        self._losses.clear()
        found = dict(zip(self._loss_names, means, strict=True))
        return found if self.early_stop is None else found | self.early_stop.metrics(means.device)

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Trained parameters and persistent buffers by name, (K, ...) each for K concepts; never the stack's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def artifact(self, index: int) -> dict[str, Tensor]:
        """What is worth keeping of concept `index`: its slice (...,) of each of `trainable_state`, on the CPU."""
        return {name: value[index].detach().cpu().clone() for name, value in self.trainable_state().items()}

    @torch.no_grad()
    def load_artifact(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put a kept concept, tensors (...,) as `artifact` gave them, in place `index`.

        Raises:
            UserError: a tensor is missing, superfluous or of another shape.
        """
        own = self.trainable_state()
        if wrong := misfits({name: value[index] for name, value in own.items()}, tensors):
            raise UserError(f"the artifact does not fit {type(self).__name__}: {', '.join(wrong[:5])} differ.")
        for name, value in own.items():
            value[index].copy_(tensors[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the stack out: it is gigabytes and never changes."""
        states = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in states.items() if not name.startswith("model.")}
        if self.early_stop is not None:
            checkpoint[EARLY_STOP] = self.early_stop.state()
        if self.best_score is not None:
            checkpoint[BEST_SCORE] = self.best_score.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the stack's own tensors back so that loading stays strict.

        Raises:
            UserError: a trained tensor is missing, superfluous or of another shape.
        """
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}
        if wrong := misfits(own, checkpoint["state_dict"]):
            raise UserError(
                f"the checkpoint is not of this {type(self).__name__}: {', '.join(wrong[:3])} differ. Resume with the "
                "method, its settings and the base model that it was written with."
            )
        states = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        checkpoint["state_dict"] = {**states, **checkpoint["state_dict"]}
        if self.early_stop is not None:
            self.early_stop.load(checkpoint.get(EARLY_STOP), int(checkpoint["global_step"]))
        if self.best_score is not None:
            self.best_score.load(checkpoint.get(BEST_SCORE), int(checkpoint["global_step"]))

    # ---- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        concepts: Sequence[int] | None = None,
        images: Tensor | None = None,
        sampler: Sampler | None = None,
        variant: str = "",
        negative: str | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Draw one picture per (prompt, seed) with guidance (Ho & Salimans 2022, eq. 6), independent of the others.

        Args:
            prompts: B texts with placeholders in place.
            seeds: B seeds of the start noise.
            steps: denoising steps.
            guidance: classifier-free guidance scale s; 1 or less means none.
            concepts: (B,) which concept each prompt is about; None means the first.
            images: reference pictures (B, 3, H, W) in [-1, 1] for methods that read them.
            sampler: scheduler to use; None means DDIM.
            variant: one of `variants`.
            negative: text of the unconditional branch; None for an absent one: an empty text, in SDXL zeros.
            batch_size: pictures per U-Net call; a matter of memory only.

        Returns:
            (B, 3, H, W) in [0, 1], on the CPU.
        """
        work = self.sample_calls(
            prompts,
            seeds,
            steps=steps,
            guidance=guidance,
            concepts=concepts,
            images=images,
            sampler=sampler,
            variant=variant,
            negative=negative,
            batch_size=batch_size,
        )
        return alone(self.model, work)

    @in_evaluation
    @torch.no_grad()
    def sample_calls(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        concepts: Sequence[int] | None = None,
        images: Tensor | None = None,
        sampler: Sampler | None = None,
        variant: str = "",
        negative: str | None = None,
        batch_size: int = 8,
    ) -> Calls[Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] as U-Net calls that other drawings may share; arguments as `sample`."""

        def step(rows: list[int], t: Tensor, latents: Tensor | None = None) -> Step:
            which = torch.tensor([concepts[row] if concepts else 0 for row in rows], device=self.device)
            pictures = None if images is None else images[rows].to(self.device)
            texts, when = [prompts[row] for row in rows], t.expand(len(rows))
            return Step(texts, which, when, latents, images=pictures, variant=variant)

        def condition(rows: list[int], t: Tensor, latents: Tensor | None = None) -> Conditioning:
            return self.condition(step(rows, t, latents))

        def frozen(rows: list[int], t: Tensor) -> Conditioning:
            found = self.reference_condition(step(rows, t))
            assert found is not None, "a method with consistency guidance says what the frozen model is asked"
            return found

        same = [(prompt, concepts[row] if concepts else 0) for row, prompt in enumerate(prompts)]
        if self.consistency is None:
            negatives = self.negative_condition(negative or "", variant, [number for _, number in same])
            negatives = self.model.as_negative(negative, negatives)
        else:  # guidance is the frozen model's own then
            negatives = self.model.condition_negative(negative)
        return (
            yield from generation_calls(
                self.model,
                condition,
                keys=same if images is None else list(range(len(prompts))),
                seeds=seeds,
                steps=steps,
                guidance=guidance,
                sampler=sampler or ddim(steps, guidance),
                negative=negatives,
                batch_size=batch_size,
                time_dependent=self.time_dependent,
                reads_latents=self.reads_latents,
                frozen=None if self.consistency is None else frozen,
                consistency=self.consistency or 0.0,
            )
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Own modules in evaluation mode, then each as it was; the stack is always in it, and large to walk."""
        parts = [module for child in self.children() if child is not self.model for module in child.modules()]
        training = [module for module in (self, *parts) if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
