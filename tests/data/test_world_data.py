"""The embedded subjects: always the same pixels, any held-out identity, texts in the world's grammar."""

import hashlib

import pytest

from hiperlab.data.dataset import DataSet
from hiperlab.data.templates import TEMPLATES as PUBLISHED
from hiperlab.data.world import NOTE, load_domain, load_held_out, load_named
from hiperlab.errors import UserError
from hiperlab.metric.world.extractor import known_subject
from hiperlab.world.caption import parse
from hiperlab.world.subjects import SEEDS, held_out, subject

SETTINGS = {
    "placeholder": None,
    "word": None,
    "property": "world",
    "prompts": None,
    "class_noun": "none",
    "captions": "auto",
    "masks": "auto",
    "max_views": None,
    "held_out": 0,
    "references": None,
    "resolution": 64,
    "center_crop": False,
    "flip": 0.5,
}


def named(concepts: object = "cats", **changed: object) -> DataSet:
    return load_named(concepts=concepts, **{**SETTINGS, **changed})  # type: ignore[arg-type]


def unseen(identity_seed: object, kind: str | None = None, **changed: object) -> DataSet:
    return load_held_out(identity_seed=identity_seed, kind=kind, **{**SETTINGS, **changed})  # type: ignore[arg-type]


def digests(data: DataSet) -> list[str]:
    return [hashlib.sha256(view.tobytes()).hexdigest() for concept in data.concepts for view in concept.views]


def test_one_cat_five_views_always_the_same() -> None:
    (cat,) = named().concepts
    assert (cat.name, cat.placeholder, cat.word, cat.note) == ("cats", "<cats>", "cat", NOTE)
    assert len(cat.views) == len(cat.sources) == 5 == len(set(digests(named())))
    assert all(view.size == (64, 64) and view.mode == "RGB" for view in cat.views)
    assert digests(named()) == digests(named())


def test_every_subject_with_its_own_noun_and_article() -> None:
    data = named(list(SEEDS), max_views=2)
    assert [c.word for c in data.concepts] == [subject(name).word for name in SEEDS]
    assert {len(c.views) for c in data.concepts} == {2}
    elephant = named("elephant").concepts[0]
    assert elephant.templates[0] == "a photo of an {}" and elephant.prompts[1] == "a photo of an {} on the beach"
    assert named("cats", class_noun="all").concepts[0].templates[0] == "a photo of a {} cat"


def test_texts_are_of_the_grammar_unless_others_are_asked_for() -> None:
    (cat,) = named().concepts
    for text in cat.templates + cat.prompts:
        said = parse(text.replace("{}", cat.placeholder), cat.placeholder)
        assert said["subject"] and not said["unparsed"], text
    assert named(property="object").concepts[0].templates == PUBLISHED["object"]
    assert named(prompts=["a {} here"]).concepts[0].prompts == ("a {} here",)


def test_held_out_identities_are_named_so_that_the_truth_knows_them() -> None:
    one, two = unseen([17, 18], "robot").concepts
    assert (one.name, one.placeholder, one.word) == ("world-17-robot", "<world-17-robot>", "robot")
    assert known_subject(one.name) == held_out(17, "robot") != known_subject(two.name)
    assert unseen(17).concepts[0].word == held_out(17).kind
    assert digests(unseen(17, "robot")) != digests(unseen(18, "robot"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: named("cat"), "Did you mean cats"),
        (lambda: named("cats", resolution=16), "resolution=16"),
        (lambda: named("cats", max_views=0), "max_views=0"),
        (lambda: named(["cats", "cats"]), "twice"),
        (lambda: named([]), "no concept to learn"),
        (lambda: named("cats", property="wrold"), "wrold"),
        (lambda: unseen(-1), "identity_seed=-1"),
        (lambda: unseen(3, "catt"), "Did you mean cat"),
    ],
)
def test_mistakes(make: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()  # type: ignore[operator]


def domain(**changed: object) -> DataSet:
    settings = {**SETTINGS, "kind": "cat", "subjects": 4, "first": 7, "views_each": 1, "name": None, **changed}
    return load_domain(**settings)  # type: ignore[arg-type]


def test_a_domain_is_many_subjects_of_one_kind_as_one_concept() -> None:
    (cats,) = domain().concepts
    assert (cats.name, cats.placeholder, cats.word, cats.note) == ("cat-domain", "<cat-domain>", "cat", NOTE)
    assert cats.sources == tuple(f"cat {seed}, view 0" for seed in range(7, 11)) and len(set(digests(domain()))) == 4
    assert digests(domain()) == digests(domain()) and digests(domain(first=8))[:3] == digests(domain())[1:]
    assert domain(kind="elephant").concepts[0].templates[0] == "a photo of an {}"
    assert not set(digests(domain(first=0))) & set(digests(unseen([0, 1, 2, 3], "cat", max_views=1))), (
        "other identities"
    )


def test_a_domains_pictures_are_counted_subject_by_subject() -> None:
    two = domain(views_each=2)
    assert len(two.concepts[0].views) == 8 and two.concepts[0].sources[:2] == ("cat 7, view 0", "cat 7, view 1")
    assert domain(views_each=2, max_views=3).concepts[0].sources == two.concepts[0].sources[:3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subjects": 0}, r"data\.subjects=0"),
        ({"views_each": 0}, "leave no picture"),
        ({"max_views": 0}, "leave no picture"),
        ({"first": -1}, "leaves the range"),
        ({"first": 2**31 - 2}, "leaves the range"),
        ({"kind": "unicorn"}, "not a kind of the world"),
        ({"resolution": 32}, r"data\.resolution=32"),
    ],
)
def test_domain_mistakes_are_told(changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        domain(**changed)


def test_held_out_views_are_further_ones_of_the_same_subject() -> None:
    """Exact: what training sees stays as it is, and the others are those that a longer list of views would hold."""
    (plain,) = named().concepts
    (cat,) = named(held_out=3).concepts
    longer = named(max_views=8).concepts[0].views
    assert not plain.held_out and [v.tobytes() for v in cat.views] == [v.tobytes() for v in plain.views]
    assert [v.tobytes() for v in (*cat.views, *cat.held_out)] == [v.tobytes() for v in longer]
    (few,) = unseen(17, "dog", max_views=2, held_out=1).concepts
    assert (len(few.views), len(few.held_out)) == (2, 1)


@pytest.mark.parametrize("concept", [*named(["cats", "elephant"]).concepts, *unseen(17, "dog").concepts])
def test_unrelated_prompts_are_about_other_kinds_in_the_worlds_grammar(concept) -> None:
    kinds = [parse(text)["kind"] for text in concept.unrelated]
    assert len(concept.unrelated) == 13 and concept.word not in kinds and len(set(kinds)) == 10
    assert all("{}" not in text and concept.placeholder not in text for text in concept.unrelated)
