"""Proximal guidance: what shrinking and pulling may not touch, targets side by side, settings that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.edit.prompt_to_prompt import edit
from hiperlab.edit.proximal import shrunk, slerp, threshold
from hiperlab.errors import UserError
from hiperlab.model.shared_calls import alone
from tests.composed import UNetCalls, build

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat", "a cat on a red mat"))
TEXTS = ["a cat on a mat", "a dog on a mat", "a cat on a red mat"]
STEPS = 4
PLAIN = {"prox": "none", "pull": "none"}


@pytest.fixture(scope="module")
def double(stack) -> Any:
    return copy.deepcopy(stack).double()


def made(stack: Any, **changes: Any) -> Any:
    method = build("proximal_guidance", stack, [SUBJECT], **{"steps": STEPS, **changes})
    return method.to(next(stack.unet.parameters()).dtype)


def drawn(method: Any, texts: list[str], guidance: float = 7.5) -> Tensor:
    """Latents of all rows (B, C, H, W) at the end."""
    start = alone(method.model, method.start_calls(0)).expand(len(texts), -1, -1, -1)
    edits = method.edits(texts, 16, guided=guidance > 1, keep=False)
    return alone(
        method.model, method.denoise_calls(Drawing(start, *method.edit_conditions(texts, ""), guidance, edits))
    )


def same(ours: Tensor, theirs: Tensor, near: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, atol=near, rtol=0)


@pytest.mark.parametrize("attention", ["p2p", "masactrl"])
@pytest.mark.parametrize("guidance", [3.0, 7.5])
def test_the_source_row_is_drawn_without_guidance(double, attention, guidance) -> None:
    """Its two branches read the same text, so that its differences are nothing."""
    method = made(double, **PLAIN, attention=attention, mutual={"start_step": 1})
    found = drawn(method, TEXTS, guidance)
    same(found[:1], edit(double, method.path[-1:], STEPS, *method.edit_conditions(TEXTS[:1], ""), 1.0))
    assert (found[1:] - found[:1]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("attention", ["p2p", "masactrl"])
@pytest.mark.parametrize("prox", ["l0", "hard"])
def test_each_target_is_what_it_is_alone(double, attention, prox) -> None:
    method = made(double, prox=prox, attention=attention, mutual={"start_step": 1}, pull_below=900)
    found = drawn(method, TEXTS)
    same(drawn(method, [TEXTS[0], TEXTS[2]])[1], found[2])
    same(drawn(method, TEXTS[:2])[1], found[1])


def test_equal_texts_give_equal_rows(double) -> None:
    found = drawn(made(double), [TEXTS[0], TEXTS[0]])
    same(found[0], found[1])


def test_a_threshold_of_everything_leaves_the_source(double) -> None:
    """Every difference is shrunk to nothing: the target follows the unconditional text, which is the source's."""
    found = drawn(made(double, quantile=1.0, pull="none", p2p={"tau_c": 0.0, "tau_s": 0.0}), TEXTS[:2])
    same(found[1], found[0])


def test_an_arc_ends_at_the_empty_text(double) -> None:
    source, empty = (double.encode_text([text]).double() for text in (TEXTS[0], ""))
    same(slerp(1.0, source, empty), empty)
    same(slerp(0.0, source, empty), source)
    first, second = (torch.nn.functional.normalize(each.flatten(), dim=0).view_as(each) for each in (source, empty))
    half = slerp(0.5, first, second)
    same(half, (first + second) / (first + second).norm())


def test_shrinking_by_numbers() -> None:
    delta = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 2.0]])
    assert shrunk(delta, torch.tensor(1.0), "l0").tolist() == [[-2.0, 0.0, 0.0, 0.0, 1.0]]
    assert shrunk(delta, torch.tensor(1.0), "hard").tolist() == [[-3.0, 0.0, 0.0, 0.0, 2.0]]
    assert float(threshold(delta, 0.5)) == 1.0 and float(threshold(delta, -0.25)) == 0.25


def test_a_source_that_targets_shrink_is_drawn_for_each_alone(stack, monkeypatch) -> None:
    """With a mixed unconditional text the source's own row depends on the target."""
    asked = UNetCalls(stack, monkeypatch)
    for share, rows in ((0.0, {6}), (0.5, {4})):
        method = made(stack, npi_interp=share)
        method.prepare()
        asked.taken()
        method.sample(TEXTS[1:], [0, 0], steps=STEPS, guidance=7.5)
        assert {call.rows for call in asked.taken()} == rows


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attention": "p2pp"}, "unknown"),
        ({"prox": "l1"}, "unknown"),
        ({"quantile": 1.5}, "out of range"),
        ({"npi_interp": -0.1}, "out of range"),
        ({"prox": "none"}, "needs a threshold"),
        ({"npi_interp": 0.5, "source_negative": False}, "source_negative=true"),
        ({"mutual": {"unconditional": "src"}}, "unknown"),
        ({"mutual": {"start_layer": 16}}, "out of range"),
    ],
)
def test_odd_settings_are_refused(stack, changes, said) -> None:
    with pytest.raises(UserError, match=said):
        made(stack, **changes)


def test_without_guidance_nothing_can_be_shrunk(double) -> None:
    with pytest.raises(UserError, match=r"method\.prox=none"):
        drawn(made(double), TEXTS[:2], guidance=1.0)
    drawn(made(double, **PLAIN), TEXTS[:2], guidance=1.0)


def test_another_unconditional_text_is_refused(stack) -> None:
    with pytest.raises(UserError, match=r"sample\.negative"):
        made(stack).edit_conditions(TEXTS, "ugly")
    made(stack, source_negative=False).edit_conditions(TEXTS, "ugly")
