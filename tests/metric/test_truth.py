"""Ground-truth scores: on the world's own pictures they must say what is true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.metric.protocol import IdentityScore, Protocol
from hiperlab.metric.score import score
from hiperlab.metric.weights import MissingWeightsError
from hiperlab.metric.world import network as truth_judge
from hiperlab.metric.world.attributes import said_attributes
from hiperlab.metric.world.distance import PARTS, distances, nearest, overlap, pack, truths, unpack
from hiperlab.metric.world.extractor import ReaderEncoder, TruthEncoder, known_subject, subject_in
from hiperlab.metric.world.network import Judge, Shape
from hiperlab.metric.world.recipe import FolderIdentity, FolderReader, WorldTruth
from hiperlab.metric.world.scores import KindScore, PlaceScore, TruthScore
from hiperlab.world.caption import true_picture
from hiperlab.world.subjects import edit, held_out, subject

GRID = {"size": 48, "shifts": (-0.07, 0.0, 0.07), "zooms": (0.9, 1.05)}
LABELS = {"kind": ("cat", "dog", "bear"), "place": ("beach", "snow"), "style": ("photo", "cartoon")}


def judge(labels: dict, seed: int = 0) -> Judge:
    torch.manual_seed(seed)
    heads = {name: len(values) for name, values in labels.items()} or {"embedding": 16}
    return Judge(Shape(64, (8, 16), heads, labels)).eval()


def fixed(kind: int, place: int, style: int) -> ReaderEncoder:
    """A reader that sees the same in every picture."""
    network = judge(LABELS)
    with torch.no_grad():
        for head, value in (("kind", kind), ("place", place), ("style", style)):
            network.heads[head].weight.zero_()
            network.heads[head].bias.copy_(torch.nn.functional.one_hot(torch.tensor(value), len(LABELS[head])))
    return ReaderEncoder(network)


def picture(prompt: str, seed: int, name: str = "cats") -> Image.Image:
    return Image.fromarray(true_picture(subject(name).who, prompt, seed, 96, f"<{name}>").rgb)


# ---- attributes --------------------------------------------------------------------------------------------------


def test_silence_means_the_plain_style_but_no_place():
    assert said_attributes("a photo of a cat jumping in the snow") == {
        "kind": "cat", "pose": "jumping", "place": "snow", "style": "photo", "accessory": "none", "light": "day",
    }  # fmt: skip
    said = said_attributes("an oil painting of <x> wearing a crown at night", "<x>", "dog")
    assert said == {"kind": "dog", "style": "oil painting", "accessory": "crown", "light": "night"}


def test_a_judge_survives_its_folder(tmp_path):
    network = judge(LABELS)
    truth_judge.save(network, tmp_path)
    loaded = truth_judge.load(tmp_path)
    assert loaded.shape == network.shape
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(loaded(pixels)["kind"], network(pixels)["kind"], atol=1e-2, rtol=0)
    assert ReaderEncoder(loaded).weights == ReaderEncoder(truth_judge.load(tmp_path)).weights


def test_folders_without_a_judge_are_refused(tmp_path):
    with pytest.raises(MissingWeightsError, match=r"key\.path is not set"):
        FolderReader(None).load("key")
    with pytest.raises(MissingWeightsError, match="holds no judge"):
        FolderIdentity(str(tmp_path)).fetch("key")
    truth_judge.save(judge(LABELS), tmp_path)
    with pytest.raises(UserError, match="judges/identity"):
        FolderIdentity(str(tmp_path)).load("key")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="usable judge"):
        FolderReader(str(tmp_path)).load("key")


# ---- distance ----------------------------------------------------------------------------------------------------


def test_the_truth_is_near_itself_and_nearer_than_anything_else():
    who, prompt = subject("cats").who, "a photo of <cats> sitting on the beach"
    true = truths(who, prompt, "<cats>", *GRID.values())
    assert len(true.pictures) == 12 and true.whole
    found = distances(true.pictures[3], true)
    assert found["pixel"].argmin() == found["structure"].argmin() == 3
    assert found["pixel"][3] == 0 and found["subject"][3] == 0 and found["structure"][3] < 1e-5
    assert found["mask"][3] < 0.35  # the sample's mask is a guess from colours
    assert set(nearest(true.pictures[3], true)) == {*PARTS, "total"}


@pytest.mark.parametrize("name", ["cats", "robot", "racer"])
def test_another_camera_costs_little_another_subject_or_scene_much(name):
    features = TruthEncoder(**GRID)
    prompt = f"a photo of <{name}> sitting on the beach"
    who = subject(name).who
    right = [picture(prompt, seed, name) for seed in (11, 12)]
    noun = who.kind
    other = Image.fromarray(true_picture(held_out(5, noun), f"a photo of a {noun} sitting on the beach", 11, 96).rgb)
    moved = picture(f"a photo of <{name}> sitting in the jungle", 11, name)
    true = truths(who, prompt, f"<{name}>", *GRID.values())
    samples = features.images([*right, other, moved]).view(4, 3, GRID["size"], GRID["size"])
    total = torch.stack([nearest(sample, true)["total"] for sample in samples])
    assert total[:2].max() < total[2:].min()


def test_a_prompt_without_place_compares_the_subject_only():
    who = subject("cats").who
    true = truths(who, "a photo of <cats> sitting", "<cats>", 48, (0.0,), (1.0,))
    assert not true.whole and len(true.pictures) == 2
    changed = torch.where(true.masks[0].bool(), true.pictures[0], torch.rand(3, 48, 48))
    assert distances(changed, true)["pixel"][0] < 0.05
    open_pose = truths(who, "a photo of <cats> on the beach", "<cats>", 48, (0.0,), (1.0,))
    assert len(open_pose.pictures) == 12  # six poses, two mirrorings


def test_overlap_by_hand():
    a, b = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    a[0, :2], b[0, 1:3] = 1, 1
    assert overlap(a, b).tolist() == pytest.approx([4 / 12, 1])


def test_packing_survives_padding():
    true = truths(subject("cats").who, "<cats> sitting in the snow", "<cats>", 32, (0.0,), (1.0,))
    row = torch.cat([pack(true), torch.full((7,), torch.nan)])
    back = unpack(row)
    assert back is not None and back.whole and torch.equal(back.pictures, true.pictures)
    assert torch.equal(back.masks, true.masks)
    assert unpack(torch.full((5,), torch.nan)) is None


def test_subjects_are_found_by_their_placeholder():
    assert subject_in("a photo of <cats> sitting") == ("<cats>", "cats") and subject_in("a cat") is None
    assert subject_in("<cats> beside <cats>") == ("<cats>", "cats")
    assert subject_in("<cats> beside <puppy>") is None, "a picture of two has no one truth"
    assert known_subject("cats") == subject("cats").who and known_subject("sofa") is None
    assert known_subject("world-17-dog") == held_out(17, "dog")
    assert known_subject("standing_dog") == known_subject("standing_dog-2") == edit("standing_dog").who
    assert known_subject("standing_dog-x") is None


# ---- in a protocol -----------------------------------------------------------------------------------------------


def test_a_protocol_scores_truth_without_knowing_it(tmp_path):
    for name, labels in (("reader", LABELS), ("identity", {})):
        truth_judge.save(judge(labels), tmp_path / name)
    told = {"scale": "cosine", "cleaning": "noun"}
    keep = {"scale": "cosine", "cleaning": "keep"}
    protocol = Protocol(
        name="truth",
        trained=False,
        encoders={
            "reader": FolderReader(str(tmp_path / "reader")),
            "identity": FolderIdentity(str(tmp_path / "identity")),
            "world": WorldTruth(48, [0.0], [1.0]),
        },
        members={
            "kind": KindScore("reader", **told),
            "place": PlaceScore("reader", **told),
            "identity": IdentityScore("identity", "cosine", "mean", "zero"),
            "distance": TruthScore("world", **keep),
        },
    )
    records = []
    for i, prompt in enumerate(("a photo of {} sitting on the beach", "a photo of {}")):
        picture(prompt.format("<cats>"), i).save(tmp_path / f"{i}.png")
        records.append({"concept": "cats", "prompt": prompt, "text": prompt.format("<cats>"), "path": f"{i}.png",
                        "placeholder": "<cats>", "word": "cat"})  # fmt: skip
    references = {"cats": [picture("a photo of <cats>", seed) for seed in (3, 4)]}
    found = score(records, references, protocol, root=tmp_path)
    assert not found.messages
    rows = {(row["metric"], row["picture"]): row["value"] for row in found.rows}
    assert rows["kind", "0.png"] in (0, 1) and rows["place", "1.png"] is None
    assert 0 <= rows["distance", "0.png"] < 0.5 and -1 <= rows["identity", "0.png"] <= 1
    assert (
        len({Protocol(protocol.name, False, protocol.encoders, {m: v}).hash for m, v in protocol.members.items()}) == 4
    )


def test_pictures_of_no_known_subject_have_no_distance():
    features = TruthEncoder(**GRID)
    assert features.texts(["a photo of a cat"]).isnan().all()
    assert features.images([Image.fromarray(np.zeros((96, 96, 3), np.uint8))]).shape == (1, 3 * 48 * 48)
