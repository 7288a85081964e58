"""NeTI beyond the golden numbers: distributions, variants, and its cost claims."""

from __future__ import annotations

import pytest
import torch

from hiperlab.base.method import Step, Subject
from hiperlab.errors import UserError
from hiperlab.layer.nested_dropout import draw_keep
from tests.composed import SUBJECTS, build, train

CATS = SUBJECTS[:1]


def test_nested_dropout_has_the_authors_distribution() -> None:
    """One coin per layer and pair of samples; a cut sample keeps a uniform 0 .. 127 units."""
    keep = draw_keep(0, torch.arange(4000), 16, 128, 0.5, 2)
    cut = keep < 128
    assert torch.equal(cut[:, 0::2], cut[:, 1::2]), "a pair shares its coin"
    assert abs(float(cut.float().mean()) - 0.5) < 0.01
    kept = keep[cut].double()
    assert kept.min() == 0 and kept.max() == 127 and abs(float(kept.mean()) - 63.5) < 0.5
    assert not torch.equal(keep[:, 0], keep[:, 1]), "lengths differ within a pair"
    assert len({tuple(row.tolist()) for row in cut[:, ::2]}) == 16, "layers toss their own coins"
    assert torch.equal(keep[:, 10:20], draw_keep(0, torch.arange(10, 20), 16, 128, 0.5, 2))


def test_truncations_are_variants(stack) -> None:
    method = build("neti", stack, CATS, truncation=[16, None]).eval()
    assert method.variants == ("truncation=16", "")
    word = CATS[0].placeholder
    cut = method.sample([f"a {word}"], [1], steps=2, guidance=2.0, variant="truncation=16")
    whole = method.sample([f"a {word}"], [1], steps=2, guidance=2.0)
    assert (cut - whole).abs().max() > 0
    step = Step([f"a {word}"], torch.tensor([0]), torch.tensor([5]), variant="truncation=128")
    torch.testing.assert_close(
        method.condition(step).keys, method.condition(Step(step.prompts, step.concept, step.timestep)).keys
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"truncation": 129}, "truncation=129"),
        ({"truncation": [-5, 16]}, "truncation=-5"),
        ({"num_time_anchors": 7}, "must divide 1000"),
        ({"rescale_mode": "both"}, "joint, base or none"),
        ({"nested_dropout": 1.5}, "no probability"),
    ],
)
def test_wrong_settings_are_named(stack, changes, match) -> None:
    with pytest.raises(UserError, match=match):
        build("neti", stack, CATS, **changes)


def test_one_text_pass_in_training_and_one_per_prompt_and_timestep_in_sampling(stack, monkeypatch) -> None:
    from hiperlab.model import text as clip

    rows: list[int] = []
    original = clip.transform
    monkeypatch.setattr(
        clip, "transform", lambda text, x, *layers: rows.append(x[..., 0, 0].numel()) or original(text, x, *layers)
    )
    method = build("neti", stack, CATS)
    train(method, 1)
    assert rows == [32], "16 layers x 2 prompts in one pass"
    rows.clear()
    word = CATS[0].placeholder
    method.sample([f"a {word}", "a dog"] * 3, [1, 2, 3, 4, 5, 6], steps=2, guidance=2.0, batch_size=4)
    # the empty prompt once, then each prompt once per timestep for its three pictures
    assert rows[0] == 1 and sum(rows[1:]) == 2 * 2 * 16


def test_two_concepts_in_one_prompt(stack) -> None:
    """Each placeholder is its own mapper's: the prompt of both differs from either with its word swapped."""
    method = build("neti", stack, SUBJECTS[:2]).eval()
    with torch.no_grad():
        method.mapper.output_layer["0"].bias[1].add_(1.0)
    a, b = (subject.placeholder for subject in SUBJECTS[:2])
    step = Step([f"{a} beside {b}", f"{b} beside {a}"], torch.tensor([0, 0]), torch.tensor([9, 9]))
    states = method.condition(step)
    tokens = stack.tokenize(step.prompts, method.slots)
    _, positions, found = tokens.occurrences()
    assert found.tolist() == [0, 1, 1, 0] and positions.tolist() == [1, 3, 1, 3]
    assert states.values is not None
    changed = (states.values - states.keys).abs().amax((0, 3)) > 1e-6
    assert changed.nonzero().tolist() == [[0, 1], [0, 3], [1, 1], [1, 3]]


def test_parameter_count_is_the_published_one(stack) -> None:
    """563,616 numbers at SD 1.x's width, as the authors' NeTIMapper has (models/neti_mapper.py)."""
    from hiperlab.layer.mapper import Mapper

    def count(outputs: int, positional_encoding: bool = True) -> int:
        mapper = Mapper(
            1, outputs, num_layers=16, num_timesteps=1000, seed=0, positional_encoding=positional_encoding,
            sigma_t=0.03, sigma_l=2.0, num_time_anchors=10,
        )  # fmt: skip
        return sum(parameter.numel() for parameter in mapper.parameters())

    assert count(2 * 768) == 563_616 and count(768) == 464_544 and count(2 * 768, False) == 215_552


def test_checkpoint_of_other_settings_is_refused(stack, tmp_path) -> None:
    mapper, _ = build("neti", stack, CATS, bypass=False).export(0, tmp_path, steps=1)
    with pytest.raises(UserError, match=r"method\.bypass=False"):
        build("neti", stack, CATS).load_foreign(0, mapper)


def test_stacked_rows_follow_their_placeholder(stack) -> None:
    """Renaming concepts or swapping their order moves their parameters along, nothing else."""
    one = build("neti", stack, [Subject("x", "<x>", "cat"), Subject("y", "<y>", "dog")])
    other = build("neti", stack, [Subject("y", "<y>", "dog"), Subject("x", "<x>", "cat")])
    for key, value in one.artifact(0).items():
        assert torch.equal(value, other.artifact(1)[key])
