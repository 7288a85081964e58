"""EDICT: what undoes what, whose calls are shared, float32 predictions around a float64 pair, settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hiperlab.base import artifact
from hiperlab.base.editing_method import Drawing
from hiperlab.base.method import Subject
from hiperlab.edit.own_source import block_alignment
from hiperlab.errors import UserError
from hiperlab.method import edict
from hiperlab.method.edict import coupled_timesteps, draw_calls, invert_calls, mixed, order, unmixed
from hiperlab.model.shared_calls import Calls, alone, together
from hiperlab.model.tiny import tiny
from tests.composed import UNetCalls, build, config

SUBJECT = Subject("cat", "<c>", "cat", "a cat on a mat", ("a dog on a mat",))
TEXTS = ["a cat on a mat", "a dog on a mat", "a red cat"]
STEPS = 5


@pytest.fixture
def double(stack) -> Any:
    return copy.deepcopy(stack).double()


def made(stack: Any, subject: Subject = SUBJECT, **changes: Any) -> Any:
    return build("edict", stack, [subject], **{"steps": STEPS, **changes})


def work(method: Any, texts: list[str] = TEXTS, guidance: float = 3.0, ends: list[Tensor] | None = None) -> Any:
    start = alone(method.model, method.start_calls(0))
    edits = method.edits(texts, start.shape[-1], guided=True, keep=False)
    watch = None if ends is None else lambda _, pair: ends.append(pair)
    many = start.expand(len(texts), *start.shape[1:])
    return method.denoise_calls(Drawing(many, *method.edit_conditions(texts, "ugly"), guidance, edits, watch))


def drawn(method: Any, *args: Any, **how: Any) -> Tensor:
    return alone(method.model, work(method, *args, **how))


# ---- the mathematics, with a network that is a formula ---------------------------------------------------------------


def there_and_back(stack: Any, count: int, p: float, leapfrog: bool) -> float:
    """Largest error after n = `count` steps of 10 there and back; the "network" is a fixed non-linear map."""
    path = coupled_timesteps(10, count / 10)
    start = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(step: int, latents: Tensor) -> Calls[Tensor]:
        return torch.sin(3 * latents + step)
        yield

    pair = alone(stack, invert_calls(stack, start.expand(-1, 2, -1, -1, -1), 10, path, p, leapfrog, predict))
    back = alone(stack, draw_calls(stack, pair, 10, path, p, leapfrog, predict))
    return float((back - start).abs().max())


@pytest.mark.parametrize(("p", "leapfrog"), [(0.93, True), (0.93, False), (1.0, True), (1.0, False)])
@pytest.mark.parametrize("count", [7, 8])
def test_drawing_undoes_the_inversion(stack, count, p, leapfrog) -> None:
    assert there_and_back(stack, count, p, leapfrog) < 1e-9


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("order", lambda step, leapfrog: order(step + 1, leapfrog)),  # the other one first
        ("order", lambda step, leapfrog: order(6 - step + 1, leapfrog)),  # counted from the inversion's start, n = 7
        ("mixed", lambda pair, p: mixed(pair.flip(1), p).flip(1)),
    ],
)
def test_another_order_does_not(stack, name, wrong, monkeypatch) -> None:
    """Of drawing alone: the inversion keeps its own."""
    right, inverting = getattr(edict, name), edict.invert_calls

    def only_inverting_right(*args: Any) -> Any:
        monkeypatch.setattr(edict, name, right)
        found = yield from inverting(*args)
        monkeypatch.setattr(edict, name, wrong)
        return found

    monkeypatch.setitem(globals(), "invert_calls", only_inverting_right)
    assert there_and_back(stack, 7, 0.93, True) > 1e-3


def test_mixing_by_hand() -> None:
    pair = torch.tensor([[1.0, 2.0]], dtype=torch.float64)[..., None, None, None]
    assert mixed(pair, 0.9).flatten().tolist() == pytest.approx([1.1, 0.11 + 1.8])
    torch.testing.assert_close(unmixed(mixed(pair, 0.9), 0.9), pair)
    grown = unmixed(pair, 0.9)
    assert float(grown[0, 1] - grown[0, 0]) == pytest.approx(1 / 0.9**2)


def test_timesteps_are_the_last_of_evenly_spaced_ones() -> None:
    found = coupled_timesteps(50, 0.8)
    assert (len(found), found[0], found[-1]) == (40, 780, 0)
    assert len(coupled_timesteps(50, 0.58)) == 29, "0.58 * 50 is 28.999…"


def test_tokens_are_matched_in_blocks_of_equal_length() -> None:
    """A replaced block of another length keeps its own maps; what follows is matched again."""
    found = block_alignment([0, 5, 6, 7, 9], [0, 8, 6, 1, 2, 9])
    assert found.aligned is not None and found.mapper is not None
    assert found.aligned.tolist() == [1, 1, 1, 0, 0, 1]
    assert found.mapper[found.aligned.bool()].tolist() == [0, 1, 2, 4]


# ---- the method ------------------------------------------------------------------------------------------------------


def test_float32_leads_back_exactly_in_any_company(stack, monkeypatch) -> None:
    """The U-Net is in float32, targets and other pictures are drawn at the same time, with another guidance."""
    method, other = made(stack), made(stack, Subject("dog", "<d>", "dog", "a dog"))
    ends: list[Tensor] = []
    single = alone(stack, work(method, TEXTS[:1], ends=ends))
    assert single.dtype == torch.float64
    expected = method.picture_latents()
    assert (ends[-1] - expected[:, None]).abs().max() < 1e-9
    works = [work(method, TEXTS, 7.5), work(other, ["a dog", "a cat"])]
    asked = UNetCalls(stack, monkeypatch)
    found = together(stack, works)[0]
    assert found is not None and torch.equal(found[:1], single)
    updates = 2 * (len(method.path) - 1)
    assert sorted(call.rows for call in asked.taken()) == sorted([2, 2, 4 + 2] * updates)


def test_each_direction_alone_is_not_the_picture(double) -> None:
    """With another text it is an edit; without guidance of the inversion's strength there is no way back."""
    method = made(double)
    found = drawn(method)
    assert (found[1:] - found[:1]).abs().amax((1, 2, 3)).min() > 1e-3
    method.guidance_source = 2.0
    assert (drawn(method)[:1] - method.picture_latents()).abs().max() > 1e-3


def test_targets_together_are_targets_alone(double) -> None:
    for how in ({}, {"use_p2p": True}):
        method = made(double, **how)
        both = drawn(method)
        for row in (1, 2):
            torch.testing.assert_close(drawn(method, [TEXTS[0], TEXTS[row]])[1], both[row], atol=1e-9, rtol=0)


def test_maps_of_the_source_change_the_target(double) -> None:
    """Of the target alone; the source row reads none but its own."""
    plain, held = drawn(made(double)), drawn(made(double, use_p2p=True))
    torch.testing.assert_close(plain[0], held[0], atol=1e-12, rtol=0)
    assert (plain[1] - held[1]).abs().max() > 1e-3


def test_a_model_of_velocities_is_inverted_too() -> None:
    """Of another schedule as well: the miniature's kind."""
    stack = tiny(seed=0, size=64, prediction_type="v_prediction")
    stack.alpha_bar = torch.cos(torch.linspace(0.01, 1.5, 1000)) ** 2
    method = made(stack)
    found = drawn(method)
    assert (found[:1] - method.picture_latents()).abs().max() < 1e-9
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_the_pair_is_kept_on_disk_for_its_settings(stack, tmp_path, monkeypatch) -> None:
    first = made(stack, cache=str(tmp_path))
    expected = drawn(first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    asked = UNetCalls(stack, monkeypatch)
    again = made(stack, cache=str(tmp_path))
    again.prepare()
    assert not asked.taken() and torch.equal(again.noise, first.noise) and again.noise.dtype == torch.float64
    assert torch.equal(drawn(again), expected)
    for changes in ({"strength": 0.6}, {"mix_weight": 0.95}, {"leapfrog": False}, {"guidance_source": 4.0},
                    {"latent": "mean"}):  # fmt: skip
        made(stack, cache=str(tmp_path), **changes).prepare()
    assert len(list(tmp_path.iterdir())) == 6


def test_an_artifact_edits_without_its_picture(stack, tmp_path) -> None:
    """It holds the pair in float64; only under the settings of its inversion."""
    method = made(stack)
    expected = method.sample(TEXTS, [0, 0, 0], steps=STEPS, guidance=3.0)
    settings = {name: getattr(method, name) for name in method.fixed_settings}
    artifact.write(tmp_path / "cat.safetensors", method, 0, settings, steps=0)
    other = made(stack)
    other._picture = None
    artifact.load_into(other, 0, tmp_path / "cat.safetensors")
    assert torch.equal(other.noise, method.noise)
    assert torch.equal(other.sample(TEXTS, [0, 0, 0], steps=STEPS, guidance=3.0), expected)
    with pytest.raises(UserError, match="strength"):
        artifact.load_into(made(stack, strength=0.6), 0, tmp_path / "cat.safetensors")


@pytest.mark.parametrize("use_p2p", [False, True])
def test_maps_of_words_are_shown(stack, use_p2p) -> None:
    """Of the source and its targets, added up over both updates of all steps; pictures are the same as without."""
    method = made(stack, use_p2p=use_p2p)
    found = method.attention_maps(TEXTS[1:], 0, guidance=3.0)
    assert [each.text for each in found] == TEXTS
    pictures = method.sample(TEXTS, [0] * 3, steps=STEPS, guidance=3.0)
    for each, picture in zip(found, pictures, strict=True):
        assert each.maps.shape[0] == len(each.words) and each.maps.min() > 0
        torch.testing.assert_close(each.picture, picture, atol=2e-2, rtol=0)


def test_defaults_are_the_authors() -> None:
    cfg = config("edict")
    assert (cfg.sampler.guidance, cfg.method.guidance_source, cfg.method.strength, cfg.method.mix_weight) == (
        3.0, 3.0, 0.8, 0.93,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 30}, "steps=30 does not divide 1000"),
        ({"strength": 0.0}, "strength=0.0 makes 0 of 5 steps"),
        ({"strength": 1.2}, "strength=1.2 makes 6 of 5 steps"),
        ({"mix_weight": 0.0}, "mix_weight=0.0 cannot be undone"),
        ({"mix_weight": 1.1}, "mix_weight=1.1 cannot be undone"),
        ({"latent": "resample"}, "latent='resample' is unknown. Choose sample_once, mean"),
    ],
)
def test_settings_are_checked(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        made(stack, **changes)
