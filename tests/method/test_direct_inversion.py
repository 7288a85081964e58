"""Direct Inversion: overwriting the source row is adding its offsets, and what its ablations are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hiperlab.base import artifact
from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.edit.prompt_to_prompt import edit, edit_calls
from hiperlab.errors import UserError
from hiperlab.model.inversion import previous
from hiperlab.model.shared_calls import alone
from tests.composed import UNetCalls, build, picture

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat",))
TEXTS = ["a cat on a mat", "a dog on a mat"]
HOW = {"steps": 3, "guidance": 7.5}


def made(stack: Any, **changes: Any) -> Any:
    method = build("direct_inversion", stack, [SUBJECT], **{"steps": 3, **changes})
    method.start = alone(stack, method.start_calls(0)).expand(2, -1, -1, -1)
    return method


def drawn(method: Any, controlled: bool = True) -> Tensor:
    """Latents of source and target after every step (T, 2, C, H, W)."""
    found: list[Tensor] = []
    edits = method.p2p.edits(method.model.tokenizer, TEXTS[0], TEXTS[1:], 3, 16, True) if controlled else None
    states = method.edit_conditions(TEXTS, "")
    alone(method.model, method.denoise_calls(Drawing(method.start, *states, 7.5, edits, lambda _, z: found.append(z))))
    return torch.stack(found)


@pytest.fixture
def double(stack) -> Any:
    """float64: offsets of a walk without control and a drawing with it cancel to its rounding."""
    return copy.deepcopy(stack).double()


def test_overwriting_the_source_is_adding_its_offsets(double) -> None:
    """Written naively, as the authors' two passes: offsets first, then a drawing that adds them to row 0."""
    method = made(double).double()
    states = method.edit_conditions(TEXTS, "")
    offsets, z, path = [], method.start, method.path
    for step, t in enumerate(method.timesteps):
        noise = [double.predict(z, torch.tensor([t, t]), each(step)) for each in states]
        z = previous(double, z, noise[1] + 7.5 * (noise[0] - noise[1]), t, 3)
        offsets.append(path[2 - step] - z)
        z = z + offsets[-1]
    found: list[Tensor] = []

    def add(step: int, latents: Tensor, noise: Tensor) -> Tensor:
        after = previous(double, latents, noise, method.timesteps[step], 3)
        return torch.stack([after[0] + offsets[step][0], after[1]])

    edits = method.p2p.edits(double.tokenizer, TEXTS[0], TEXTS[1:], 3, 16, True)

    watch = lambda _, z: found.append(z)  # noqa: E731
    alone(double, edit_calls(double, method.start, 3, *states, 7.5, edits, watch=watch, move=add))
    torch.testing.assert_close(drawn(method), torch.stack(found), atol=1e-9, rtol=0)
    walked = alone(double, method.offset_calls(2, *states, 7.5))
    torch.testing.assert_close(walked, torch.stack(offsets), atol=1e-9, rtol=0)


def test_the_source_is_on_the_path_and_costs_no_pass_of_its_own(stack, monkeypatch) -> None:
    method, asked = made(stack), UNetCalls(stack, monkeypatch)
    found = drawn(method)
    assert torch.equal(found[:, 0], method.path.flip(0)[1:])
    assert [call.rows for call in asked.taken()] == [4] * 3
    scaled = made(stack, offset_scale=0.5)
    asked.taken()
    assert (drawn(scaled)[:, 0] - method.path.flip(0)[1:]).abs().max() > 1e-2
    assert [call.rows for call in asked.taken()] == [2] * 3 + [4] * 3, "the source's offsets first"


def test_offsets_of_nothing_are_plain_prompt_to_prompt(double) -> None:
    method = made(double, offset_scale=0.0).double()
    states = method.edit_conditions(TEXTS, "")
    edits = method.p2p.edits(double.tokenizer, TEXTS[0], TEXTS[1:], 3, 16, True)
    plain = edit(double, method.start, 3, *states, 7.5, edits)
    torch.testing.assert_close(drawn(method)[-1], plain, atol=1e-12, rtol=0)


def test_a_target_with_its_own_offsets_is_the_picture_without_control(double) -> None:
    method = made(double, target_offset="target").double()
    path = method.path.flip(0)[1:, None].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(drawn(method, controlled=False), path, atol=1e-9, rtol=0)
    assert (drawn(method)[-1, 1] - path[-1, 1]).abs().max() > 1e-3, "control moves it"


def test_offsets_at_every_second_step(double) -> None:
    method = made(double, offset_interval=2).double()
    offsets = alone(double, method.offset_calls(2, *method.edit_conditions(TEXTS, ""), 7.5))
    assert offsets[[0, 2]].abs().amax((1, 2, 3, 4)).min() > 1e-3 and not offsets[1].any()


def test_an_artifact_edits_without_its_picture(stack, tmp_path) -> None:
    """It keeps the path, not its end alone."""
    method = build("direct_inversion", stack, [SUBJECT], steps=3)
    expected = method.sample(TEXTS, [0, 0], **HOW)
    artifact.write(tmp_path / "cat.safetensors", method, 0, {}, steps=0)
    other = build("direct_inversion", stack, [SUBJECT], steps=3)
    other._picture = None
    artifact.load_into(other, 0, tmp_path / "cat.safetensors")
    torch.testing.assert_close(other.sample(TEXTS, [0, 0], **HOW), expected, atol=1e-6, rtol=0)
    other.set_reference(0, picture(Subject("toy", "<t>", "toy"), 0, stack.size))
    assert (other.sample(TEXTS, [0, 0], **HOW) - expected).abs().max() > 1e-2, "another picture has another path"


def test_guidance_of_the_inversion(double, tmp_path) -> None:
    """At 0 it is that of the empty text; at 1 nothing is asked twice; kept paths are of their own guidance."""
    paths = {w: made(double, inverse_guidance=w, cache=str(tmp_path)).double() for w in (0.0, 1.0, 2.5)}
    assert len(list(tmp_path.iterdir())) == 3
    empty = Subject("cat", "<c>", "cat", "", ())
    method = build("direct_inversion", double, [empty], steps=3).double()
    method.source = ""
    alone(double, method.start_calls(0))
    torch.testing.assert_close(paths[0.0].path, method.path, atol=1e-5, rtol=0)
    ends = {w: each.path[-1] for w, each in paths.items()}
    assert all((ends[1.0] - ends[w]).abs().max() > 1e-3 for w in (0.0, 2.5))
    with pytest.raises(UserError, match="inverse_guidance"):
        kept = tmp_path / "cat.safetensors"
        artifact.write(kept, paths[2.5], 0, {"inverse_guidance": 2.5}, steps=0)
        artifact.load_into(paths[1.0], 0, kept)


def test_settings_are_checked(stack) -> None:
    with pytest.raises(UserError, match="target_offset='both' is unknown"):
        build("direct_inversion", stack, [SUBJECT], target_offset="both")
    with pytest.raises(UserError, match="offset_interval=0"):
        build("direct_inversion", stack, [SUBJECT], offset_interval=0)
