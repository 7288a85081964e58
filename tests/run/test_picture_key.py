"""No picture is shown as another's: whatever drawing reads changes its key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import get_class

from hiperlab.model.sampler import Sampler
from hiperlab.model.tiny import tiny, tiny_sdxl
from hiperlab.run import sample
from hiperlab.run.picture_key import concept_inputs, model_inputs, picture_key, sampler_inputs
from hiperlab.run.sample import draw_missing, seeds_of
from tests.composed import METHODS, SUBJECTS, quick


def changes(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every leaf of nested settings in turn with another value, and its dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict):
            for inner, changed in changes(value):
                yield f"{name}.{inner}", {**settings, name: changed}
        else:
            yield name, {**settings, name: "another"}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_counts(name) -> None:
    """All but those that its class calls training-only, which are never among those that only drawing reads."""
    settings = quick(name)
    method: Any = get_class(settings["_target_"])
    assert not set(method.training_settings) & set(method.sampling_settings) - {"cache"}

    def key(given: dict[str, Any]) -> str:
        return picture_key(concept=concept_inputs(method, given, SUBJECTS[0], {}))

    first = key(settings)
    for path, changed in changes(settings):
        elsewhere = {*method.training_settings, *method.variant_settings}
        assert (key(changed) == first) == (path.split(".")[0] in elsewhere), path


def test_what_a_named_file_holds_counts(tmp_path) -> None:
    """In a setting of its own, in a list and in a table; a text that names no file is itself."""
    method: Any = get_class(quick("masactrl")["_target_"])
    path = tmp_path / "mask.png"
    settings = {"masks": [str(path), "a text"], "nested": {"file": str(path)}, "identifier": "sks" * 2000}

    def key() -> str:
        return picture_key(concept=concept_inputs(method, settings, SUBJECTS[0], {}))

    keys = [key()]
    for content in (b"one", b"two"):
        path.write_bytes(content)
        keys.append(key())
    path.write_bytes(b"one")
    assert len(set(keys)) == 3 and key() == keys[1]


def test_the_concept_and_what_was_learnt_count() -> None:
    method: Any = get_class(quick("ti")["_target_"])
    tensors = {"vectors": torch.zeros(1, 4)}
    first = concept_inputs(method, {}, SUBJECTS[0], tensors)
    for subject in (SUBJECTS[1], replace(SUBJECTS[0], word="dog"), replace(SUBJECTS[0], source="a cat on a mat")):
        assert picture_key(concept=concept_inputs(method, {}, subject, tensors)) != picture_key(concept=first)
    other = concept_inputs(method, {}, SUBJECTS[0], {"vectors": torch.full((1, 4), 1e-7)})
    assert picture_key(concept=other) != picture_key(concept=first)


@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_any_weight_counts(part) -> None:
    stack = tiny(seed=0, size=64)
    precision = {"unet": "float32"}
    before = model_inputs(stack, precision)
    assert model_inputs(tiny(seed=0, size=64), precision) == before
    weight = list(getattr(stack, part).parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] += 1e-3
    assert model_inputs(stack, precision) != before
    assert model_inputs(stack, {"unet": "bfloat16"})["precision"] != before["precision"]


def test_the_sampler_counts() -> None:
    plain = Sampler("DDIMScheduler", 4, 7.5, {})
    others = [
        (Sampler("PNDMScheduler", 4, 7.5, {}), ""),
        (Sampler("DDIMScheduler", 5, 7.5, {}), ""),
        (Sampler("DDIMScheduler", 4, 7.0, {}), ""),
        (Sampler("DDIMScheduler", 4, 7.5, {"timestep_spacing": "trailing"}), ""),
        (plain, "blurry"),
    ]
    stack = tiny(seed=0, size=64)
    assert len({picture_key(sampler=sampler_inputs(*each, stack)) for each in [(plain, ""), *others]}) == 6


def test_an_absent_negative_is_an_empty_one_but_for_sdxl() -> None:
    plain = Sampler("DDIMScheduler", 4, 7.5, {})
    for stack, told_apart in ((tiny(seed=0, size=64), False), (tiny_sdxl(seed=0, size=64), True)):
        absent, empty = (sampler_inputs(plain, negative, stack) for negative in (None, ""))
        assert (absent != empty) == told_apart


def test_a_seed_named_twice_is_one_picture() -> None:
    assert seeds_of([3, 3, 1]) == [3, 1]


def test_processes_that_look_at_different_times_draw_every_picture(tmp_path, monkeypatch) -> None:
    """The second looks when the first has drawn its share already, which is what two processes may do."""
    records = [
        {
            "path": f"{number}.png",
            "key": str(number),
            "text": "a <cats>",
            "seed": number,
            "concept": "cats",
            "variant": "",
        }
        for number in range(5)
    ]
    drawn: list[str] = []

    def paint(batch: list[dict[str, Any]]) -> torch.Tensor:
        drawn.extend(record["path"] for record in batch)
        return torch.zeros(len(batch), 3, 8, 8)

    monkeypatch.setattr(sample, "barrier", lambda: None)
    for rank in (0, 1):
        monkeypatch.setattr(sample, "_rank", lambda rank=rank: (rank, 2))
        draw_missing(tmp_path, records, paint, 2, {})
    assert sorted(drawn) == [record["path"] for record in records]
    assert all((tmp_path / record["path"]).is_file() for record in records)
