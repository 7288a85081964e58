"""U-Net calls as values, so that several pieces of work that wait for the U-Net share one call.

Nothing in Stable Diffusion's U-Net mixes the rows of a batch. A training step or a drawing is written as a generator
that yields a `Call` where it needs the U-Net and is sent the prediction; `alone` runs one of them, `together` runs
several side by side and joins the calls that are asked for at the same time. Each gets what it would get alone (but for
rounding), whatever the others are: other concepts, settings, methods, steps of a path. A function or method whose name
ends in `_calls` makes such work.
Axes: B rows of a call, C latent channels, H, W latent sides, L cross-attention layers, N tokens, D text width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from hiperlab.model.attention_control import Control, Layer
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.stack import FrozenStack

Result = TypeVar("Result")
Given = ParamSpec("Given")


@dataclass(frozen=True)
class Call:
    """One question to the U-Net, as `FrozenStack.predict` takes it.

    Attributes:
        latents: z_t (B, C, H, W).
        timestep: (B,) int64 in [0, 1000).
        conditioning: of the B rows.
        gradient: whether the answer is to carry a gradient; what is enabled where the call is made.
        apart: no other rows may be in the call, because even their rounding would be seen in the result, or because a
            gradient that the work takes itself would walk back through them.
    """

    latents: Tensor
    timestep: Tensor
    conditioning: Conditioning
    gradient: bool = field(default_factory=torch.is_grad_enabled)
    apart: bool = False


Calls = Generator[Call, Tensor, Result]  # yields calls, is sent predictions (B, C, H, W), returns a result


def alone(stack: FrozenStack, work: Calls[Result]) -> Result:
    """The result of one piece of work, its calls answered one by one."""
    prediction: Tensor | None = None
    while True:
        try:
            call = work.send(prediction)  # type: ignore[arg-type]
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]
        (prediction,) = _answers(stack, [call])


def answered(
    make: Callable[Concatenate[FrozenStack, Given], Calls[Result]],
) -> Callable[Concatenate[FrozenStack, Given], Result]:
    """The function that does the work of `make(stack, …)` in calls of its own; it takes the same arguments."""

    @functools.wraps(make)
    def done(stack: FrozenStack, *args: Given.args, **how: Given.kwargs) -> Result:
        return alone(stack, make(stack, *args, **how))

    return done


def together(
    stack: FrozenStack,
    works: Sequence[Calls[Result]],
    failed: Callable[[int, Exception], None] | None = None,
) -> list[Result | None]:
    """The results of several pieces of work, in their order; calls that wait at the same time are joined.

    Calls with changes of the U-Net's own weights (`Conditioning.offsets`) have a U-Net of their own and stay alone,
    unless they say how to do without (`Conditioning.row_offsets`).
    Calls with a gradient wait until nobody asks for one without: those are what some trainings need before their loss
    (the next step of a path, say), and then all losses share one call.

    Args:
        stack: the frozen model that all of them ask.
        works: each may make as many calls as it likes.
        failed: told the number of a piece of work and what it raised itself; its result is None, the others go on. By
            default that ends them all, as an error in a shared call does.
    """
    results: dict[int, Result | None] = {}
    waiting: dict[int, Call] = {}

    def advance(number: int, prediction: Tensor | None) -> None:
        waiting.pop(number, None)
        try:
            waiting[number] = works[number].send(prediction)  # type: ignore[arg-type]
        except StopIteration as ended:
            results[number] = ended.value
        except Exception as error:
            if failed is None:
                raise
            results[number] = None
            failed(number, error)

    for number in range(len(works)):
        advance(number, None)
    while waiting:
        groups: dict[Hashable, list[int]] = {}
        without = {number: call for number, call in waiting.items() if not call.gradient}
        for number, call in sorted((without or waiting).items()):
            groups.setdefault(_kind(call, number), []).append(number)
        answers: dict[int, Tensor] = {}
        for numbers in groups.values():
            answers |= dict(zip(numbers, _answers(stack, [waiting[number] for number in numbers]), strict=True))
        for number, prediction in answers.items():
            advance(number, prediction)
    return [results[number] for number in range(len(works))]


def within(context: Callable[[], AbstractContextManager[object]], work: Calls[Result]) -> Calls[Result]:
    """The same work, whose own code runs inside a context that is left whenever it waits for an answer.

    What it sets for itself, such as evaluation mode, is then not seen by what runs side by side with it.

    Args:
        context: makes the context, anew for each stretch of the work.
        work: any.
    """
    prediction: Tensor | None = None
    try:
        while True:
            with context():
                try:
                    call = work.send(prediction)  # type: ignore[arg-type]
                except StopIteration as ended:
                    result: Result = ended.value
                    return result
            prediction = yield call
    finally:
        work.close()


def _kind(call: Call, number: int) -> Hashable:
    """Calls of equal kind can be joined."""
    states = call.conditioning
    if call.apart or (states.offsets is not None and states.row_offsets is None):
        return number
    form = None if states.row_offsets is None else states.row_offsets.form()
    further = None if states.decoupled is None else states.decoupled.form()
    tokens = states.keys.shape[2:]
    return call.gradient, call.latents.shape[1:], call.latents.dtype, tokens, form, further, states.detach_first


def _answers(stack: FrozenStack, calls: Sequence[Call]) -> list[Tensor]:
    """Each call's prediction (B, C, H, W), from one call of all rows."""
    with torch.set_grad_enabled(calls[0].gradient):
        if len(calls) == 1:
            return [stack.predict(calls[0].latents, calls[0].timestep, calls[0].conditioning)]
        counts = [len(call.latents) for call in calls]
        controls = [call.conditioning.control for call in calls]
        states = concatenate([replace(call.conditioning, control=None, offsets=None) for call in calls])
        if any(control is not None for control in controls):
            states = states.controlled(_Controls(controls, counts))
        latents = torch.cat([call.latents for call in calls])
        times = torch.cat([call.timestep for call in calls])
        return list(stack.predict(latents, times, states).split(counts))


class _Controls(Control):
    """The controls of a joined call: each sees its own call's rows alone.

    Args:
        controls: one per call, None for none.
        counts: rows of each call.
    """

    def __init__(self, controls: Sequence[Control | None], counts: Sequence[int]) -> None:
        bounds = pairwise(accumulate(counts, initial=0))
        self.parts = [(control or _LEFT_ALONE, slice(*bound)) for control, bound in zip(controls, bounds, strict=True)]

    def wants(self, layer: Layer, pixels: int) -> bool:
        return any(control.wants(layer, pixels) for control, _ in self.parts)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = []
        for control, rows in self.parts:
            asked = control if control.wants(layer, query.shape[2]) else _LEFT_ALONE
            found.append(asked.attend(layer, query[rows], key[rows], value[rows]))
        return torch.cat(found)

    def outputs(self) -> list[str]:
        return list(dict.fromkeys(name for control, _ in self.parts for name in control.outputs()))

    def output(self, name: str, states: Tensor) -> Tensor:
        parts = [(control if name in control.outputs() else _LEFT_ALONE, rows) for control, rows in self.parts]
        return torch.cat([control.output(name, states[rows]) for control, rows in parts])


_LEFT_ALONE = Control()
