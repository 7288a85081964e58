"""MasaCtrl: what control may not touch, what masks do, rows of a call, settings that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.edit.edits import Rows
from hiperlab.edit.mutual_attention import MutualAttention, by_parts, word_map
from hiperlab.edit.prompt_to_prompt import edit, edit_calls
from hiperlab.errors import UserError
from hiperlab.model.shared_calls import alone, together
from tests.composed import UNetCalls, build

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat", "a cat on a red mat"))
TEXTS = ["a cat on a mat", "a dog on a mat", "a cat on a red mat"]
STEPS = 3
EARLY = {"steps": STEPS, "start_step": 1, "start_layer": 7}


@pytest.fixture
def double(stack) -> Any:
    return copy.deepcopy(stack).double()


def made(stack: Any, **changes: Any) -> Any:
    method = build("masactrl", stack, [SUBJECT], **{**EARLY, **changes})
    return method.to(next(stack.unet.parameters()).dtype)


def drawn(method: Any, texts: list[str], controlled: bool = True) -> Tensor:
    """Latents of all rows (B, C, H, W) at the end, each guided."""
    start = alone(method.model, method.start_calls(0)).expand(len(texts), -1, -1, -1)
    edits = method.edits(texts, 16, guided=True, keep=False) if controlled else None
    return alone(method.model, method.denoise_calls(Drawing(start, *method.edit_conditions(texts, ""), 7.5, edits)))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_the_source_row_is_drawn_as_alone_and_targets_are_not(double) -> None:
    method = made(double, reference=False)
    plain, found = drawn(method, TEXTS, controlled=False), drawn(method, TEXTS)
    same(found[:1], edit(double, method.path[-1:], STEPS, *method.edit_conditions(TEXTS[:1], ""), 1.0))
    assert (found[1:] - plain[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    same(drawn(method, TEXTS[:2])[1], found[1])
    same(drawn(method, ["", ""])[1], found[0])


@pytest.mark.parametrize("nowhere", [{"control_steps": []}, {"control_layers": []}, {"start_step": STEPS}])
def test_without_control_nothing_changes(double, nowhere) -> None:
    same(drawn(made(double, **nowhere), TEXTS), drawn(made(double), TEXTS, controlled=False))


def test_an_empty_source_has_one_row(double, monkeypatch) -> None:
    """The same numbers as with both of its rows, and in shared passes."""
    method, asked = made(double), UNetCalls(double, monkeypatch)
    start = alone(double, method.start_calls(0)).expand(3, -1, -1, -1)
    states = method.edit_conditions(TEXTS, "")
    asked.taken()
    found = drawn(method, TEXTS)
    assert [call.rows for call in asked.taken()] == [5] * STEPS
    same(drawn(method, TEXTS[:1]), found[:1])
    assert [call.rows for call in asked.taken()] == [1] * STEPS
    doubled = MutualAttention(Rows(3, True), method.control_layers, method.control_steps, None, 16, stores=False)
    same(found, edit(double, start, STEPS, *states, 7.5, doubled, method.path))
    assert [call.rows for call in asked.taken()] == [6] * STEPS
    plain = edit(double, start, STEPS, *states, 7.5)
    other = made(double, mask_words=["cat", "cat"], source_text=True)
    masked = drawn(other, TEXTS)
    asked.taken()

    def work(method: Any) -> Any:
        first = method.path[-1:].expand(3, -1, -1, -1)
        edits = method.edits(TEXTS, 16, guided=True, keep=False)
        return method.denoise_calls(Drawing(first, *method.edit_conditions(TEXTS, ""), 7.5, edits))

    both = together(double, [work(method), edit_calls(double, start, STEPS, *states, 7.5), work(other)])
    assert [call.rows for call in asked.taken()] == [5 + 6 + 6] * STEPS
    for ours, theirs in zip(both, (found, plain, masked), strict=True):
        same(ours, theirs)


def test_the_source_text_is_read_where_it_is_asked_for(double, monkeypatch) -> None:
    """Its path is another one, and its two rows differ."""
    method, asked = made(double, source_text=True), UNetCalls(double, monkeypatch)
    drawn(method, TEXTS[:2])
    assert [call.rows for call in asked.taken()] == [1] * STEPS + [4] * STEPS
    empty = made(double)
    drawn(empty, TEXTS[:2])
    assert (method.path[-1] - empty.path[-1]).abs().max() > 1e-4


def test_a_negative_text_is_the_targets_alone(double) -> None:
    method = made(double)
    _, unconditional = method.edit_conditions(TEXTS, "blurry")
    conditional, _ = method.edit_conditions(TEXTS, "")
    assert torch.equal(unconditional(0).keys[:, 0], conditional(0).keys[:, 0])
    same(unconditional(0).keys[:, 1:], method.encode(["blurry"] * 2)[None])


def test_parts_look_up_one_another() -> None:
    """Written naively, query by query."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 1, 4, 5, generator=generator, dtype=torch.float64)
    source, target = torch.tensor([True, False, False, True]), torch.tensor([False, False, True, True])
    expected = torch.empty_like(query)
    for row in range(2):
        for position in range(4):
            part = source if target[position] else ~source
            weights = (key[row, 0, part] @ query[row, 0, position] / 5**0.5).softmax(0)
            expected[row, 0, position] = weights @ value[row, 0, part]
    torch.testing.assert_close(by_parts(query, key, value, source, target), expected)
    everything = torch.ones(4, dtype=torch.bool)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for one in (everything, ~everything):
        assert torch.equal(by_parts(query, key, value, one, target), plain), "there is no part to look up"


def test_map_of_words() -> None:
    maps = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    found = word_map(maps, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.6], [1.0, 0.2]]))
    assert not word_map(torch.ones(4, 2), torch.ones(2)).any(), "a flat map marks nothing"


def files(folder: Any, *sides: tuple[int, int]) -> list[str]:
    names = []
    for number, size in enumerate(sides):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // (2 + number), size[1]))
        names.append(str(folder / f"{number}.png"))
        mask.save(names[-1])
    return names


def test_masks_change_targets_alone(double, tmp_path) -> None:
    plain = drawn(made(double), TEXTS)
    masked = drawn(made(double, masks=files(tmp_path, (64, 64), (32, 32))), TEXTS)
    same(masked[0], plain[0])
    assert (masked[1:] - plain[1:]).abs().amax((1, 2, 3)).min() > 1e-4


def test_a_target_without_the_word_has_no_mask(double) -> None:
    how = {"source_text": True, "mask_threshold": 0.5}
    plain, masked = drawn(made(double, **how), TEXTS), drawn(made(double, mask_words=["cat", "dog"], **how), TEXTS)
    assert (masked[1] - plain[1]).abs().max() > 1e-4
    same(masked[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_step": -1}, "start_step=-1 is no step. Choose 0 or more"),
        ({"start_layer": 16}, "start_layer=16 is no layer. There are 16: choose 0 to 15"),
        ({"control_steps": [1, STEPS]}, f"control_steps={STEPS} is no step"),
        ({"control_steps": 2}, "control_steps=2 must be a list of steps"),
        ({"control_layers": ["mid"]}, "control_layers='mid' is no layer"),
        ({"mask_words": ["cat", "dog"]}, "set method.source_text=true"),
        ({"mask_words": ["cat"], "source_text": True}, "must be .word of the source, word of the target."),
        ({"mask_words": ["horse", "dog"], "source_text": True}, "'horse' is not in 'a cat on a mat'"),
        ({"mask_words": ["cat", "horse"], "source_text": True}, "'horse' is not in 'a dog on a mat'"),
        ({"mask_threshold": 1.5}, "mask_threshold=1.5"),
        ({"masks": ["a.png"]}, "must be .mask of the source, mask of the target., two files"),
        ({"masks": ["absent.png", "absent.png"]}, "absent.png does not exist"),
        ({"masks": ["a", "b"], "mask_words": ["cat", "dog"]}, "give one of them"),
    ],
)
def test_settings_are_checked(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        made(stack, **changes)
    assert "\n" not in str(refused.value)


def test_masks_that_do_not_fit_are_refused(stack, tmp_path) -> None:
    with pytest.raises(UserError, match="64 x 32 pixels: give one of the square picture"):
        made(stack, masks=files(tmp_path, (64, 64), (64, 32)))
    with pytest.raises(UserError, match="has 49 positions: set"):
        drawn(made(stack, mask_words=["cat", "dog"], source_text=True, mask_pixels=49), TEXTS)


def test_a_start_behind_the_last_step_is_said(stack, caplog) -> None:
    made(stack, start_step=STEPS)
    assert "start_step=3 of 3 steps: nothing is controlled" in caplog.text
