"""From noise to latents: one loop for all methods, one seed per picture.

Axes: B pictures, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from hiperlab.errors import UserError, near
from hiperlab.hub import first_line
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.noise import SCHEDULE
from hiperlab.model.shared_calls import Call, Calls, alone, answered
from hiperlab.model.stack import FrozenStack


class Sampler:
    """A diffusers scheduler with fixed options, made anew for each batch because schedulers keep state.

    Args:
        scheduler: class name in diffusers, e.g. "DDIMScheduler"; noise that it adds must come from generators it is
            given, so that a picture follows from its seed alone.
        steps: number of denoising steps, 1 .. 1000.
        guidance: classifier-free guidance scale s in e_u + s (e_c - e_u); 1 or less means no guidance.
        options: overrides of the model's stored scheduler config.

    Raises:
        UserError: diffusers has no such scheduler, it does not know an option or cannot draw here, or steps is out of
            range.
    """

    def __init__(self, scheduler: str, steps: int, guidance: float, options: Mapping[str, Any]) -> None:
        known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
        if scheduler not in known:
            raise UserError(f"sampler.scheduler={scheduler!r} is not in diffusers.{near(str(scheduler), known)}")
        if not 1 <= steps <= 1000:
            raise UserError(f"sampler.steps={steps} is out of range. Choose 1 to 1000.")
        self.scheduler, self.steps, self.guidance = scheduler, steps, guidance
        self.options = dict(options)
        self.adds_noise = False  # whether its steps draw from the generators; `check` finds out
        self._checked: list[tuple[Mapping[str, Any], int]] = []
        self._check_options()
        self.check(SCHEDULE, steps)

    def _check_options(self) -> None:
        """Diffusers passes over what a scheduler does not know, with a warning that nobody reads."""
        names = list(inspect.signature(getattr(diffusers, self.scheduler).__init__).parameters)[1:]
        if "kwargs" in names:  # a stand-in for a class whose library is missing: `check` says which
            return
        for name in self.options:
            if name not in names:
                raise UserError(f"sampler.options.{name} is no option of {self.scheduler}.{near(name, names)}")

    def check(self, schedule: Mapping[str, Any], steps: int) -> None:
        """Walk the schedule with made-up predictions: it must run, and a picture must follow from its seed alone.

        Args:
            schedule: a model's scheduler config.
            steps: of denoising.

        Raises:
            UserError: one line with the scheduler's own reason, or that its noise does not follow from seeds.
        """
        if (schedule, steps) in self._checked:
            return
        with torch.random.fork_rng(devices=[]):
            try:
                both, again = self._walk(schedule, steps, [1, 2]), self._walk(schedule, steps, [2])
            except Exception as error:  # any of a hundred classes, each with reasons of its own
                raise UserError(
                    f"sampler.scheduler={self.scheduler} cannot draw with this model in {steps} steps "
                    f"({first_line(error)}). Choose another, e.g. DDIMScheduler."
                ) from error
        if not torch.allclose(both[1:], again, rtol=1e-4, atol=1e-4):
            raise UserError(
                f"sampler.scheduler={self.scheduler} draws noise that does not follow from a picture's seed: the same "
                "command would give other pictures. Choose another, e.g. EulerAncestralDiscreteScheduler."
            )
        self._checked.append((schedule, steps))

    def _walk(self, schedule: Mapping[str, Any], steps: int, seeds: Sequence[int]) -> Tensor:
        """Latents (B, 4, 2, 2) after all steps of a model that predicts a part of what it reads."""
        scheduler, generators = self._scheduler(schedule, steps), private(seeds)
        latents = draw(generators, (4, 2, 2)) * scheduler.init_noise_sigma
        before = generators[0].get_state()
        for t in scheduler.timesteps:
            prediction = scheduler.scale_model_input(latents, t) / 2
            latents = step_with(scheduler, prediction, t, latents, generators)
        self.adds_noise = not torch.equal(generators[0].get_state(), before)
        return latents

    def _scheduler(self, schedule: Mapping[str, Any], steps: int, device: torch.device | str = "cpu") -> Any:
        scheduler = getattr(diffusers, self.scheduler).from_config(dict(schedule), **self.options)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def build(self, stack: FrozenStack, steps: int) -> Any:
        """A fresh scheduler with its timesteps set, on the stack's device.

        Raises:
            UserError: see `check`.
        """
        self.check(stack.scheduler_config, steps)
        return self._scheduler(stack.scheduler_config, steps, stack.device)


@functools.cache  # making one walks the schedule
def ddim(steps: int, guidance: float) -> Sampler:
    """DDIM (Song et al. 2021) with eta = 0, as Stable Diffusion ships it."""
    return Sampler("DDIMScheduler", steps, guidance, {})


def private(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per picture, on the CPU: the numbers are the same on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Unit normals (B, C, H, W), row i from generator i."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Start latents (B, C, H, W), one private CPU generator per picture.

    The same numbers as diffusers' pipelines draw from `torch.Generator("cpu").manual_seed(seed)`, so that an exported
    artifact gives the same picture there.
    """
    return draw(private(seeds), shape)


@functools.cache
def _takes_generator(scheduler: type) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters  # type: ignore[attr-defined]


def step_with(
    scheduler: Any, prediction: Tensor, t: Tensor, latents: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Latents (B, C, H, W) of the next timestep; noise, where a scheduler adds any, is row i's from generator i.

    Args:
        scheduler: with its timesteps set.
        prediction: the model's (B, C, H, W).
        t: timestep (0-d tensor).
        latents: (B, C, H, W).
        generators: one per row, those the start noise came from, as diffusers' pipelines use them.
    """
    named = {"generator": list(generators)} if _takes_generator(scheduler.__class__) else {}
    following: Tensor = scheduler.step(prediction, t, latents, return_dict=False, **named)[0]
    return following


def denoise(
    stack: FrozenStack,
    latents: Tensor,
    scheduler: Any,
    condition: Callable[..., Conditioning],
    unconditional: Conditioning,
    guidance: float,
    watch: Callable[[int, Tensor], None] | None = None,
    reads_latents: bool = False,
) -> Tensor:
    """Clean latents (B, C, H, W), scaled, in calls of their own; arguments as `denoising_calls`."""
    return alone(
        stack,
        denoising_calls(latents, scheduler, condition, unconditional, guidance, watch, reads_latents),
    )


@torch.no_grad()
def denoising_calls(
    latents: Tensor,
    scheduler: Any,
    condition: Callable[..., Conditioning],
    unconditional: Conditioning,
    guidance: float,
    watch: Callable[[int, Tensor], None] | None = None,
    reads_latents: bool = False,
    generators: Sequence[torch.Generator] = (),
    apart: bool = False,
    frozen: Callable[[Tensor], Conditioning] | None = None,
    consistency: float = 0.0,
) -> Calls[Tensor]:
    """Run the whole schedule with classifier-free guidance (Ho & Salimans 2022, eq. 6; s = w + 1).

    Args:
        latents: unit normal start (B, C, H, W).
        scheduler: with its timesteps set.
        condition: timestep (0-d tensor) -> conditioning of the B rows; with `reads_latents` (timestep, z_t), the
            latter as the U-Net reads it.
        unconditional: conditioning of the B rows without the prompt.
        guidance: s; at 1 or below the unconditional pass is left out.
        watch: called with (step number, latents) after each step.
        reads_latents: whether `condition` is given z_t.
        generators: one per row, for schedulers that add noise; those that add none need none.
        apart: whether no call is shared with others.
        frozen: timestep -> what the frozen model is asked for the B rows; guidance s is then its own, between
            `unconditional` and this, and the tuned model's difference to it is a direction of its own (Lee et al. 2024;
            reward_guidance.py, RGPipe.my_gen, in kyungmnlee/dco). None for none.
        consistency: w_c, the factor of that direction.

    Returns:
        Clean latents (B, C, H, W), scaled.
    """
    latents = latents * scheduler.init_noise_sigma
    for number, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, t)
        states = condition(t, model_input) if reads_latents else condition(t)
        guided = states if frozen is None else frozen(t)
        if guidance > 1:
            both = torch.cat([model_input, model_input])
            out = yield Call(both, t.expand(len(both)), concatenate([unconditional, guided]), apart=apart)
            without, within = out.chunk(2)
            out = without + guidance * (within - without)
        else:
            within = out = yield Call(model_input, t.expand(len(model_input)), guided, apart=apart)
        if frozen is not None:
            tuned = yield Call(model_input, t.expand(len(model_input)), states, apart=apart)
            out = out + consistency * (tuned - within)
        latents = step_with(scheduler, out, t, latents, generators)
        if watch is not None:
            watch(number, latents)
    return latents


@torch.no_grad()
def generation_calls(
    stack: FrozenStack,
    condition: Callable[..., Conditioning],
    *,
    keys: Sequence[Hashable],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    sampler: Sampler,
    negative: Tensor | Conditioning,
    batch_size: int,
    time_dependent: bool,
    reads_latents: bool = False,
    frozen: Callable[[list[int], Tensor], Conditioning] | None = None,
    consistency: float = 0.0,
) -> Calls[Tensor]:
    """Draw one picture per row; rows of equal key share their conditioning, computed once per timestep and key.

    Args:
        stack: the frozen model.
        condition: (row numbers, timestep) -> their conditioning; called with one row per key, or with
            `reads_latents` as (row numbers, timestep, z_t) with all rows of a batch.
        keys: B values; equal keys mean equal conditioning (the same prompt and concept).
        seeds: B seeds.
        steps: denoising steps.
        guidance: s.
        sampler: which scheduler.
        negative: text states of the unconditional branch, (1, N, D) for all pictures or one (N, D) for each; or all
            that the branch reads, of one row or one for each.
        batch_size: pictures per U-Net call; with a scheduler that adds noise it is always one, shared with nobody.
        time_dependent: False if `condition` ignores the timestep, which is then asked once per key.
        reads_latents: True if it depends on z_t, so that nothing can be shared or kept.
        frozen: (row numbers, timestep) -> what the frozen model is asked, see `denoising_calls`; None for none.
        consistency: w_c of it.

    Returns:
        (B, 3, H, W) in [0, 1], on the CPU, in the order given.
    """
    if len(keys) != len(seeds):
        raise ValueError(f"{len(keys)} prompts but {len(seeds)} seeds: give one seed per picture.")
    dtype = torch.float64 if stack.alpha_bar.dtype == torch.float64 else torch.float32
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    order = sorted(range(len(keys)), key=lambda row: first[keys[row]])  # pictures of one prompt side by side
    cache = _ConditionCache(condition, first, time_dependent)
    frozen_cache = None if frozen is None else _ConditionCache(frozen, first, False)
    if sampler.adds_noise:  # a matrix product's rounding depends on its rows, and noise makes it grow
        batch_size = 1
    empty = Conditioning(negative[None]) if isinstance(negative, Tensor) else negative
    pictures: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for each in filter(None, (cache, frozen_cache)):
            each.prepare([keys[row] for row in rows])
        generators = private([seeds[row] for row in rows])
        noise = draw(generators, stack.latent_shape).to(stack.device, dtype)
        unconditional = empty.rows([0] * len(rows) if empty.keys.shape[1] == 1 else rows)
        states = functools.partial(condition, rows) if reads_latents else cache
        scheduler = sampler.build(stack, steps)
        latents = yield from denoising_calls(
            noise, scheduler, states, unconditional, guidance,
            reads_latents=reads_latents, generators=generators, apart=sampler.adds_noise, frozen=frozen_cache,
            consistency=consistency,
        )  # fmt: skip
        decoded = stack.decode(latents).div(2).add(0.5).clamp(0, 1).cpu()
        pictures.update(zip(rows, decoded, strict=True))
    return torch.stack([pictures[row] for row in range(len(keys))])


generate = answered(generation_calls)


class _ConditionCache:
    """Conditioning by (key, timestep), kept as long as the next batch still needs the key."""

    def __init__(
        self,
        condition: Callable[[list[int], Tensor], Conditioning],
        first: Mapping[Hashable, int],
        time_dependent: bool,
    ) -> None:
        self.condition, self.first, self.time_dependent = condition, first, time_dependent
        self.kept: dict[tuple[Hashable, int], Conditioning] = {}
        self.keys: list[Hashable] = []

    def prepare(self, keys: list[Hashable]) -> None:
        """Set the batch's keys and forget all others."""
        self.keys = keys
        self.kept = {pair: states for pair, states in self.kept.items() if pair[0] in set(keys)}

    def __call__(self, t: Tensor) -> Conditioning:
        """Conditioning of the batch's rows at timestep t; missing keys are worked out together."""
        when = int(t) if self.time_dependent else -1
        missing = [key for key in dict.fromkeys(self.keys) if (key, when) not in self.kept]
        if missing:
            fresh = self.condition([self.first[key] for key in missing], t)
            self.kept.update({(key, when): fresh.rows([row]) for row, key in enumerate(missing)})
        return concatenate([self.kept[key, when] for key in self.keys])
