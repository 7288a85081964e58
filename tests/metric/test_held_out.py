"""Held-out pictures, copies, galleries, drift and products: values by hand, and what a run does not bring is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hiperlab.data.world import load_named
from hiperlab.errors import UserError
from hiperlab.metric.drift import DriftScore, PerceptualDriftScore, cosine_distance
from hiperlab.metric.gallery import (
    AveragePrecisionScore,
    FolderGallery,
    GalleryEncoder,
    RankOneScore,
    average_precision,
    rank_one,
)
from hiperlab.metric.held_out import CopiedScore, HeldOutScore, copied
from hiperlab.metric.product import ProductScore
from hiperlab.metric.protocol import IdentityScore, Protocol, TextScore
from hiperlab.metric.score import score
from hiperlab.metric.table import aggregate
from hiperlab.metric.world.gallery import WorldGallery
from hiperlab.world.caption import true_identity, true_scene
from hiperlab.world.draw import render
from hiperlab.world.subjects import held_out, subject, views_of
from tests.metric.conftest import ColourEncoder, load_protocol, plain

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def angles(*degrees: float) -> torch.Tensor:
    """Unit rows (N, 2)."""
    turned = torch.tensor(degrees).deg2rad()
    return torch.stack([turned.cos(), turned.sin()], -1)


def made(tmp_path, **colours: tuple[int, int, int]) -> list[dict]:
    """A picture of one colour each, all of the concept x."""
    records = []
    for name, colour in colours.items():
        plain(colour).save(tmp_path / f"{name}.png")
        records.append({"concept": "x", "prompt": "red", "text": "red", "path": f"{name}.png", "word": "x"})
    return records


def scored(records, references, members, tmp_path, encoder=None, **brought):
    protocol = Protocol("t", False, load_protocol("twin").encoders, members)
    loaded = {protocol.encoders["clip"]: encoder or ColourEncoder()}
    return score(records, {"x": references}, protocol, root=tmp_path, loaded=loaded, **brought)


def test_held_out_pictures_are_the_references_and_the_ceiling(tmp_path) -> None:
    """Trained on red, held out green: a red picture is like the first and not like the second."""
    members = {
        "seen": IdentityScore("clip", "cosine", "mean", "zero"),
        "unseen": HeldOutScore("clip", "cosine", "mean", "zero"),
    }
    records = made(tmp_path, red=RED, green=GREEN, none=BLACK)
    found = scored(records, [plain(RED)], members, tmp_path, held_out={"x": [plain(GREEN), plain(GREEN)]})
    values = {(row["metric"], row["kind"], row["picture"]): row["value"] for row in found.rows}
    assert [values["seen", "picture", f"{n}.png"] for n in ("red", "green", "none")] == [1, 0, 0]
    assert [values["unseen", "picture", f"{n}.png"] for n in ("red", "green", "none")] == [0, 1, 0]
    assert values["unseen", "ceiling", ""] == 1 and ("unseen", "copy", "red.png") not in values


def test_copied_by_hand() -> None:
    """Training pictures at 0, 60 and 180 degrees; chords are 2 sin(angle / 2)."""
    real = angles(0, 60, 180)
    found = copied(angles(0, 10, 20, 30), real)  # at 10: 0.174 against 0.845 / 3; at 20: 0.347 against 0.684 / 3
    assert found.tolist() == [1, 1, 0, 0]
    assert copied(torch.full((1, 2), torch.nan), real).isnan().all() and copied(real, real[:1]).isnan().all()
    assert copied(angles(10), torch.cat([real, torch.full((1, 2), torch.nan)])).tolist() == [1]


def test_copied_is_a_column(tmp_path) -> None:
    records = made(tmp_path, copy=RED, own=(255, 255, 0))
    found = scored(records, [plain(RED), plain(GREEN)], {"copied": CopiedScore("clip")}, tmp_path)
    (line, _) = aggregate(found.rows)
    assert (line["mean"], line["n"], line["lower_is_better"]) == (0.5, 2, True)


def test_ranks_by_hand() -> None:
    """Own pictures at 10 and 50 degrees, others at 20, 30 and 90, asked from 0: order own, other, other, own, other."""
    own, others = angles(10, 50), angles(20, 30, 90)
    assert average_precision(angles(0), own, others).tolist() == pytest.approx([(1 / 1 + 2 / 4) / 2])
    assert average_precision(angles(21), own, others).tolist() == pytest.approx([(1 / 3 + 2 / 4) / 2])
    assert rank_one(angles(0, 21), own, others).tolist() == [1, 0]
    assert rank_one(own[:1], own, own).tolist() == [0], "where all are alike nobody is told apart"


class _Colours(GalleryEncoder):
    def key(self, concept):
        return None if concept == "unknown" else ""

    def pictures(self, concept):
        return [plain(GREEN), plain(BLACK)]


def test_galleries_are_scored_against_held_out_pictures(tmp_path) -> None:
    members = {"r1": RankOneScore("clip"), "ap": AveragePrecisionScore("clip")}
    records = made(tmp_path, red=RED, green=GREEN, none=BLACK)
    held = {"x": [plain(RED), plain(BLUE)]}
    found = scored(records, [plain(RED)], members, tmp_path, _Colours(ColourEncoder(), 1), held_out=held)
    assert [row["value"] for row in found.rows] == [1, 0, 0, 1, 0.5, 0], "where nothing is seen nobody is found"
    with pytest.raises(UserError, match="ColourEncoder has no gallery"):
        scored(records, [plain(RED)], members, tmp_path, held_out=held)
    unknown = [{**record, "concept": "unknown"} for record in records]
    protocol = Protocol("t", False, load_protocol("twin").encoders, members)
    loaded = {protocol.encoders["clip"]: _Colours(ColourEncoder(), 1)}
    references, held = {"unknown": [plain(RED)]}, {"unknown": [plain(RED)]}
    assert not score(unknown, references, protocol, root=tmp_path, loaded=loaded, held_out=held).rows


def test_the_worlds_gallery_is_of_the_kind_and_never_the_subject_itself() -> None:
    inner = load_protocol("twin").encoders["dino"]
    gallery = WorldGallery(inner, views=2, identities=3, first=7, size=64).load("k")
    assert isinstance(gallery, GalleryEncoder)
    wanted = [view.tobytes() for seed in (7, 8, 9) for view in views_of(held_out(seed, "cat"), seed, 64, 2)]
    assert [each.tobytes() for each in gallery.pictures("cats")] == wanted
    assert [each.tobytes() for each in gallery.pictures("world-8-cat")] == [*wanted[:2], *wanted[4:]]
    assert gallery.others("cats").shape[0] == 6 and gallery.others("world-8-cat").shape[0] == 4
    assert gallery.others("mug") is None, "the world does not know it"


def test_a_gallery_is_part_of_the_protocol_or_of_the_weights(tmp_path) -> None:
    inner = load_protocol("twin").encoders["dino"]
    one = WorldGallery(inner, views=2, identities=3, first=7, size=64)
    assert one.settings() != replace(one, first=8).settings() != replace(one, encoder=replace(inner, seed=1)).settings()
    for name, colour in (("a", RED), ("b", BLUE)):
        (tmp_path / name).mkdir()
        plain(colour, 32).save(tmp_path / name / "0.png")
    folder = FolderGallery(inner, 2, str(tmp_path))
    before = folder.load("k")
    assert len(before.pictures("x")) == 2 and len(before.pictures("a")) == 1 and before.others("x").shape[0] == 2
    plain(GREEN, 32).save(tmp_path / "b" / "0.png")
    assert folder.load("k").weights != before.weights, "ranks in another gallery do not compare"
    with pytest.raises(UserError, match=r"k\.path=.*/a holds no pictures in sub-folders"):
        replace(folder, path=str(tmp_path / "a")).fetch("k")


def test_cosine_distance_is_exactly_zero_of_equal_rows() -> None:
    rows = torch.nn.functional.normalize(torch.randn(50, 37, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert cosine_distance(rows, rows).tolist() == [0.0] * 50
    assert cosine_distance(angles(0), angles(60)).item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("kind", [DriftScore, PerceptualDriftScore])
def test_drift_is_of_unrelated_pictures_only(kind, tmp_path) -> None:
    class Eyes(ColourEncoder):
        def perceptual(self, pictures, others):
            return 1 + cosine_distance(self.images(pictures), self.images(others))  # never 0 by itself

    records = made(tmp_path, red=RED)
    others = [{**record, "frozen": "blue.png"} for record in made(tmp_path, green=GREEN, blue=BLUE)]
    found = scored(records, [plain(RED)], {"drift": kind("clip")}, tmp_path, Eyes(), unrelated=others)
    far = 1 if kind is DriftScore else 2
    assert [(row["picture"], row["value"]) for row in found.rows] == [("green.png", far), ("blue.png", 0)]
    assert all(row["lower_is_better"] and row["kind"] == "picture" for row in found.rows)
    with pytest.raises(UserError, match=r"picture green\.png lacks frozen"):
        scored(records, [plain(RED)], {"d": kind("clip")}, tmp_path, unrelated=made(tmp_path, green=GREEN))


def test_what_a_run_does_not_bring_is_said(tmp_path) -> None:
    members = {"drift": DriftScore("clip"), "unseen": HeldOutScore("clip", "cosine", "mean", "zero")}
    found = scored(made(tmp_path, red=RED), [plain(RED), plain(RED)], members, tmp_path)
    assert not found.rows and len(found.messages) == 2
    assert "Not scored: unseen (t): there are no held-out pictures: data.held_out" in found.messages[0]
    assert "Not scored: drift (t): no pictures of other things were drawn: sample.unrelated" in found.messages[1]


def test_a_product_needs_both() -> None:
    product = ProductScore("clip", [["who"], ["a", "b"]], [])
    assert product.combine({"who": 0.8, "a": 1.0, "b": 0.5}) == pytest.approx(0.6)
    assert product.combine({"who": 0.8, "b": 0.5}) == pytest.approx(0.4), "what a prompt does not name does not count"
    own = replace(product, without=["copied"])
    assert (
        own.combine({"who": 0.8, "a": 1.0, "copied": 1.0}) == 0
        and own.combine({"who": 0.8, "a": 1, "copied": 0}) == 0.8
    )
    assert math.isnan(own.combine({"who": 0.8, "a": 1.0}))
    assert product.combine({"who": -0.5, "a": -1.0}) == 0 and math.isnan(product.combine({"who": 0.8}))


def test_a_product_is_scored_from_its_members_rows(tmp_path) -> None:
    members = {
        "both": ProductScore("clip", [["who"], ["text"]], []),
        "who": IdentityScore("clip", "cosine", "mean", "zero"),
        "text": TextScore("clip", "cosine", "keep"),
    }
    found = scored(made(tmp_path, red=RED, yellow=(255, 255, 0)), [plain(RED)], members, tmp_path).rows
    both = [row["value"] for row in found if row["metric"] == "both"]
    assert both == pytest.approx([1, 0.5]) and [row["metric"] for row in found[:2]] == ["both", "both"]
    encoders = load_protocol("twin").encoders
    with pytest.raises(
        UserError, match=r"members\.both is made of wo, which is no score of pictures\. Did you mean who"
    ):
        Protocol("t", False, encoders, {**members, "both": ProductScore("clip", [["wo"], ["text"]], [])})
    with pytest.raises(UserError, match="give two lists of members or more"):
        Protocol("t", False, encoders, {**members, "both": ProductScore("clip", [["who"]], [])})


def test_naive_likeness_ranks_a_copier_first_and_the_default_last(tmp_path) -> None:
    """Drawn by the world: what prompts ask for, another subject there, and training pictures whatever is asked."""
    full = load_protocol("mini_full")
    dear = {"truth_distance", "kid", "fid", "diversity"}
    protocol = replace(full, members={name: each for name, each in full.members.items() if name not in dear})
    protocol = replace(protocol, encoders={name: each for name, each in full.encoders.items() if name != "world"})
    (cats,) = load_named(
        "cats", 128, placeholder=None, word=None, property="world", prompts=None, class_noun="none", captions="off",
        masks="off", max_views=None, held_out=6, references=None, center_crop=False, flip=0.0,
    ).concepts  # fmt: skip
    who = {"true": subject("cats").who, "other": held_out(4, "cat")}
    means, loaded = {}, {}
    for name in ("true", "other", "copier"):
        records = []
        for number, prompt in enumerate(cats.prompts[1:6]):
            text = prompt.replace("{}", cats.placeholder)
            if name == "copier":
                picture = cats.views[number]
            else:
                drawn = render(
                    true_identity(who[name], text, cats.placeholder), true_scene(text, number, "<cats>"), 128
                )
                picture = Image.fromarray(drawn.rgb)
            picture.save(tmp_path / f"{number}.png")
            records.append(
                {"concept": "cats", "prompt": prompt, "text": text, "placeholder": "<cats>", "word": "cat",
                 "path": f"{number}.png"}
            )  # fmt: skip
        found = score(
            records, {"cats": cats.views}, protocol, root=tmp_path, loaded=loaded, held_out={"cats": cats.held_out}
        )
        means[name] = {line["metric"]: line["mean"] for line in aggregate(found.rows) if line["kind"] == "all"}
    order = {metric: sorted(means, key=lambda name: -means[name][metric]) for metric in means["true"]}
    assert order["identity"][0] == "copier" and means["copier"]["copied"] == 1
    assert order["likeness_in_context"][0] == "true" and means["true"]["copied"] <= 0.2
    assert means["copier"]["likeness_in_context"] == 0, "a copy counts nothing"
    plain_product = {name: each["identity_held_out"] * each["clip_text"] for name, each in means.items()}
    assert plain_product["copier"] < 0.5 * plain_product["true"], "nor would it win by its likeness alone"
    assert means["true"]["rank_one"] == 1 and means["other"]["rank_one"] <= 0.2
