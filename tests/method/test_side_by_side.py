"""Several pictures side by side, a method each: passes of the U-Net are shared, and each is what it is alone.

They differ in everything that may differ: picture, seed, steps of the path, updates at each step, settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hiperlab.base.editing_method import EditingMethod
from hiperlab.base.method import Method, Subject
from hiperlab.model.shared_calls import together
from hiperlab.model.stack import FrozenStack
from tests.composed import Asked, UNetCalls, build, train_together

SUBJECTS = [
    Subject("cat", "<c>", "cat", "a cat on a mat", ("a tiger on a mat", "a fluffy cat on a mat")),
    Subject("dog", "<d>", "dog", "a photo of a dog", ("a photo of a wolf", "a photo of a red dog")),
    Subject("vase", "<v>", "vase", "a vase", ("a jar",)),
]
STEPS = (2, 3, 3)  # T of each one's path
Makers = Sequence[Callable[[], Method]]


@pytest.fixture(scope="module")
def double(stack) -> FrozenStack:
    return copy.deepcopy(stack).double()


@pytest.fixture
def asked(double, monkeypatch) -> UNetCalls:
    return UNetCalls(double, monkeypatch)


def makers(name: str, stack: FrozenStack, *each: dict[str, Any]) -> Makers:
    """A method for each of the three pictures."""

    def make(number: int) -> Callable[[], Method]:
        changes = each[number] if each else {}
        if name != "imagic":
            changes = {"steps": STEPS[number], **changes}
        return lambda: build(name, stack, SUBJECTS[number : number + 1], seed=number, **changes).double()

    return [make(number) for number in range(len(SUBJECTS))]


def everything(method: Method) -> dict[str, torch.Tensor]:
    """Parameters and the state of the path, progress included."""
    return {key: value for key, value in method.state_dict().items() if not key.startswith("model.")}


def rows(calls: Sequence[Asked]) -> list[int]:
    return [call.rows for call in calls]


def check_trainings(makers: Makers, steps: Sequence[int], asked: UNetCalls) -> list[Asked]:
    """Trains three alone and three together until each has made its steps or finished; compares all that they hold.

    Returns:
        The calls of the three together.
    """
    single = [make() for make in makers]
    expected = [train_together([method], [most])[0] for method, most in zip(single, steps, strict=True)]
    single_calls = asked.taken()
    beside = [make() for make in makers]
    found = train_together(beside, steps)
    shared = asked.taken()
    assert sum(rows(shared)) == sum(rows(single_calls)) and {call.rows for call in single_calls} <= {1, 2}
    assert len({len(losses) for losses in found}) == 3, "one ends before the others"
    for mine, one in zip(found, expected, strict=True):
        assert mine == pytest.approx(one, rel=0, abs=1e-12)
    for mine, one in zip(beside, single, strict=True):
        assert mine.finished == one.finished
        state = everything(mine)
        for key, value in everything(one).items():
            # Adam makes steps of a gradient that is 0 but for rounding (biases before a norm).
            near = 1e-8 if key.startswith("networks.") else 1e-11
            torch.testing.assert_close(state[key], value, atol=near, rtol=0, msg=key)
    check_pictures(single, beside)
    return shared


def check_pictures(single: Sequence[Method], beside: Sequence[Method], **how: Any) -> None:
    """All texts of each, drawn alone by the first and together by the second."""

    def wanted(method: Method, number: int) -> dict[str, Any]:
        texts = [SUBJECTS[number].source, *SUBJECTS[number].targets]
        steps = method.steps if isinstance(method, EditingMethod) else STEPS[number]
        return {"prompts": texts, "seeds": [7] * len(texts), "steps": steps, "guidance": 7.5, **how}

    expected = [method.sample(**wanted(method, number)) for number, method in enumerate(single)]
    works = [method.sample_calls(**wanted(method, number)) for number, method in enumerate(beside)]
    for mine, one in zip(together(beside[0].model, works), expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-6, rtol=0)  # the VAE's answer is float32


@pytest.mark.parametrize("optimise", [None, "text"])
def test_null_text(optimise, double, asked) -> None:
    """One is done with a step of its path when a loss is small enough, the others after one and two updates."""
    changes = ({"inner_steps": 1}, {"inner_steps": 2}, {"inner_steps": 3, "epsilon": 1.12})
    each = makers("null_text", double, *({"optimise": optimise, **change} for change in changes))
    calls = check_trainings(each, (100, 100, 100), asked)
    assert rows(calls)[:2] == [3, 3], "the first steps of their inversions"
    # 2, 6 and 8 updates: wherever the others are on their paths, those that still train share each call of the losses.
    assert [call.rows for call in calls if call.gradient] == [3, 3, 2, 2, 2, 2, 1, 1]


def test_negative_prompt_inversion_has_nothing_to_train(double, asked) -> None:
    """Inversions and edits are shared; nothing is fitted."""
    each = makers("null_text", double, *[{"optimise": "negative_prompt"}] * 3)
    single, beside = [make() for make in each], [make() for make in each]
    assert all(method.finished for method in beside)
    check_pictures(single, beside)
    assert rows(asked.taken())[-4:] == [8, 16, 10, 10], "at first beside the inversions of the longer paths"
    for mine, one in zip(beside, single, strict=True):
        torch.testing.assert_close(mine.artifact(0)["noise"], one.artifact(0)["noise"], atol=1e-12, rtol=0)


def test_style_diffusion(double, asked) -> None:
    """With and without an attention loss: maps of a shared call are each picture's own."""
    changes = (
        {"inner_steps": 1, "inner_decay": 0.0},
        {"inner_steps": 3, "inner_decay": 0.5},
        {"inner_steps": 2, "inner_decay": 0.0, "attention_loss": "none"},
    )
    calls = check_trainings(makers("style_diffusion", double, *changes), (100, 100, 4), asked)
    assert [call.rows for call in calls if call.gradient] == [3, 3, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("inject", [False, True])
def test_ddim_inversion(inject, double, asked) -> None:
    """Inverted in calls of all pictures, then edited in calls of all rows; also where the source is held."""
    each = makers("ddim_inversion", double, *[{"inject_source_latents": inject}] * 3)
    single, beside = [make() for make in each], [make() for make in each]
    check_pictures(single, beside)
    for mine, one in zip(beside, single, strict=True):
        torch.testing.assert_close(mine.inversion.latents, one.inversion.latents, atol=1e-12, rtol=0)  # type: ignore[attr-defined]
    calls = rows(asked.taken())
    assert calls[:16] == [1] * 2 + [6] * 2 + [1] * 3 + [6] * 3 + [1] * 3 + [4] * 3
    # The shorter path is drawn while the longer ones are inverted: neither needs a gradient.
    assert calls[16:] == [3, 3, 6 + 1 + 1, 6 + 6 + 4, 6 + 4, 6 + 4]


def test_prompt_to_prompt(double, asked) -> None:
    """Maps are exchanged between rows of one picture only, whatever stands beside it; blending, too."""
    blend = {"blend": ["cat", "tiger"], "blend_threshold": 0.9, "equalizer": {"tiger": 2.0}}
    each = makers("prompt_to_prompt", double, {"p2p": blend}, {"p2p": {"tau_u": 0.5, "tau_c": [0.2, 0.9]}}, {})
    single, beside = [make() for make in each], [make() for make in each]
    check_pictures(single, beside)
    assert rows(asked.taken())[2 + 3 + 3 :] == [6 + 6 + 4, 6 + 6 + 4, 6 + 4]


def test_imagic(double, asked) -> None:
    """Phase A shares, phase B's own weights do not; one is in phase B while others are still in phase A."""
    changes = [{"steps": 4, "embedding_share": share, "model_lr": 1e-4} for share in (0.25, 0.75, 0.5)]
    calls = check_trainings(makers("imagic", double, *changes), (2, 4, 3), asked)
    assert sorted(call.rows for call in calls if not call.changed) == [2, 4, 6]
    assert [call.rows for call in calls if call.changed] == [2, 2, 2]


def test_a_method_may_be_drawn_twice_at_once(stack) -> None:
    """One ends before the other, which stays in evaluation mode; afterwards the method is in training as before."""
    method = build("neti", stack, SUBJECTS[:1]).train()
    how = [{"steps": steps, "guidance": 1.0} for steps in (1, 3)]
    expected = [method.sample(["a <c>"], [3], **each) for each in how]  # type: ignore[arg-type]
    found = together(stack, [method.sample_calls(["a <c>"], [3], **each) for each in how])  # type: ignore[arg-type]
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-4, rtol=0)
    assert all(module.training for child in method.children() if child is not stack for module in child.modules())


@pytest.mark.parametrize("count", [1, 2])
def test_variants_of_one_method_share_calls_and_stay_apart(count, double, asked) -> None:
    """The same matrices at two strengths: each row has its own factor."""
    method = build("lora", double, SUBJECTS[:count], strength=[1.0, 0.3]).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in method.up.values():  # type: ignore[operator, union-attr]
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    how: dict[str, Any] = {"prompts": ["a <c>"], "seeds": [3], "steps": 2, "guidance": 7.5}
    expected = [method.sample(variant=variant, **how) for variant in method.variants]
    asked.taken()
    found = together(double, [method.sample_calls(variant=variant, **how) for variant in method.variants])
    assert rows(asked.taken()) == [4, 4]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float((found[0] - found[1]).abs().max()) > 1e-2
