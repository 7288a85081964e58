"""Scores of edits: by hand, with what is missing left out, through a protocol."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.metric.edit import distance as edit
from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.edit.extractor import KeyEncoder, PixelEncoder
from hiperlab.metric.edit.recipe import Lpips, Pixels
from hiperlab.metric.edit.scores import (
    BackgroundMse,
    BackgroundPsnr,
    BackgroundSsim,
    DirectionScore,
    EditTruthScore,
    StructureScore,
)
from hiperlab.metric.protocol import Protocol, TextScore
from hiperlab.metric.score import score
from hiperlab.metric.table import aggregate
from tests.metric.conftest import ColourEncoder, noise, plain

SIDE = 32
HALF = Image.fromarray(np.repeat(np.where(np.arange(SIDE) < SIDE // 2, 255, 0)[None], SIDE, 0).astype(np.uint8))


def test_direction_by_hand() -> None:
    source, text = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    images = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    texts = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [0.0, 1.0]])
    found = edit.direction(images, source, texts, text)
    assert found[:2].tolist() == pytest.approx([1.0, -1.0]) and math.isnan(found[2])


def test_structure_ignores_what_all_patches_share_and_sees_what_moves() -> None:
    torch.manual_seed(0)
    patches = torch.randn(1, 6, 4)
    assert float(edit.structure_distance(3 * patches, patches)) == pytest.approx(0, abs=1e-6)
    one = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    same = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert float(edit.structure_distance(same, one)) == pytest.approx(0.5)  # two of four cosines went from 0 to 1


def test_perceptual_distance_by_hand() -> None:
    a, b = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    a[0, 0], b[0, 1] = 5.0, 2.0
    assert float(edit.perceptual_distance([a], [b])) == pytest.approx(2.0)
    assert float(edit.perceptual_distance([a, a], [a, 3 * a])) == pytest.approx(0)


def test_background_is_what_lies_outside_the_mask() -> None:
    features = PixelEncoder(SIDE)
    source = plain((100, 100, 100), SIDE)
    inside, outside = source.copy(), source.copy()
    inside.paste((255, 0, 0), (0, 0, SIDE // 2, SIDE))
    outside.paste((151, 151, 151), (SIDE // 2, 0, SIDE, SIDE))
    reference = EditReference(source, "a", mask=HALF)
    pictures, texts = [inside, outside], ["b", "b"]
    error = BackgroundMse("pixels").measure(features, pictures, texts, reference)
    assert error.tolist() == pytest.approx([0.0, 0.5 * 0.2**2], abs=1e-6)
    ratio = BackgroundPsnr("pixels").measure(features, pictures, texts, reference)
    assert ratio.tolist() == pytest.approx([100.0, -10 * math.log10(0.02)], abs=1e-3)
    likeness = BackgroundSsim("pixels").measure(features, pictures, texts, reference)
    assert likeness[0] == pytest.approx(1, abs=1e-4) and likeness[1] < 0.95
    unknown = EditReference(source, "a")
    assert BackgroundMse("pixels").measure(features, pictures, texts, unknown).isnan().all()


def test_truth_distance_forgives_the_camera_only() -> None:
    features = PixelEncoder(SIDE)
    coarse = np.random.default_rng(1).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    truth, other = (Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in coarse)
    moved = Image.fromarray(np.roll(np.asarray(truth), round(0.08 * SIDE), axis=1))
    reference = EditReference(noise(5, (SIDE, SIDE)), "a", {"b": truth})
    pictures = [truth, truth.transpose(Image.Transpose.FLIP_LEFT_RIGHT), moved, other, truth]
    found = EditTruthScore("pixels").measure(features, pictures, ["b", "b", "b", "b", "c"], reference)
    assert found[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert 0 < found[2] < found[3] / 2 and math.isnan(found[4])


def test_keys_are_those_of_the_last_block() -> None:
    import timm
    from torchvision.transforms import Compose, Normalize, ToTensor

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = Compose([ToTensor(), Normalize(mean, std)])
    pictures = [noise(1, (SIDE, SIDE)), noise(2, (SIDE, SIDE))]
    plainly = KeyEncoder(network, transform, raw=False)
    keys = plainly.patches(pictures)
    assert keys.shape == (2, 1 + 4, 192)
    seen: list[torch.Tensor] = []
    handle = network.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        network(torch.stack([transform(p) for p in pictures]))
    handle.remove()
    torch.testing.assert_close(keys, seen[0][..., 192:384])
    raw = KeyEncoder(network, transform, raw=True)._pixels(pictures[0])
    levels = torch.from_numpy(np.asarray(pictures[0]).copy()).permute(2, 0, 1).float()
    wanted = (levels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(raw, wanted, atol=1e-3, rtol=1e-4)
    score_ = StructureScore("dino").measure(plainly, pictures, ["", ""], EditReference(pictures[0], ""))
    assert score_[0] == pytest.approx(0, abs=1e-9) and score_[1] > 0


class _Colours(Pixels):
    def load(self, key: str):
        return ColourEncoder()


def test_a_protocol_scores_edits_beside_other_members(tmp_path) -> None:
    protocol = Protocol(
        "t", True, {"clip": _Colours(16), "pixels": Pixels(16)},
        {"clip_text": TextScore("clip", "cosine", "noun"), "direction": DirectionScore("clip"),
         "background_mse": BackgroundMse("pixels"), "edit_truth": EditTruthScore("pixels")},
    )  # fmt: skip
    colours = {"source": (255, 0, 0), "target": (0, 255, 0)}
    records = []
    for role, text in (("source", "red"), ("target", "green")):
        plain(colours[role], 16).save(tmp_path / f"{role}.png")
        records.append({"concept": "x", "prompt": text, "text": text, "path": f"{role}.png", "seed": 0, "role": role})
    references = {"x": [plain((255, 0, 0), 16)]}
    edits = {"x": EditReference(references["x"][0], "red", {"green": plain((0, 255, 0), 16)}, HALF.resize((16, 16)))}
    rows = score(records, references, protocol, root=tmp_path, edits=edits).rows
    table = {row["metric"]: row for row in aggregate(rows) if row["kind"] == "all"}
    assert table["direction"]["mean"] == pytest.approx(1) and table["direction"]["n"] == 1, (
        "reconstructions are no edits"
    )
    assert table["background_mse"]["mean"] == pytest.approx(0.5 * 2 / 3, abs=1e-5)
    assert table["edit_truth"]["mean"] == pytest.approx(0, abs=1e-6) and table["clip_text"]["mean"] == pytest.approx(1)
    assert [name for name in table if table[name]["lower_is_better"]] == ["background_mse", "edit_truth"]
    none = score(records, references, protocol, root=tmp_path).rows
    assert {row["metric"] for row in none} == {"clip_text"}, "a concept that is no edit has no edit scores"


def test_mistakes() -> None:
    with pytest.raises(UserError, match="Did you mean alex"):
        Lpips("alexx", None)
    with pytest.raises(UserError, match="16 to 2048"):
        Pixels(4)
    with pytest.raises(UserError, match="gives no patches"):
        PixelEncoder(16).patches([plain((0, 0, 0))])
