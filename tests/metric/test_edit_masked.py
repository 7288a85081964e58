"""PIE-Bench's scores and NS-LPIPS against their definitions computed another way; reconstructions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hiperlab.errors import UserError
from hiperlab.metric.edit.distance import EditReference
from hiperlab.metric.edit.extractor import LpipsEncoder, PixelEncoder, lpips_network
from hiperlab.metric.edit.ns_lpips import NsLpips, NsLpipsFixed
from hiperlab.metric.edit.recipe import Lpips, Pixels, TensorKeys
from hiperlab.metric.edit.scores import (
    BackgroundMse,
    BackgroundPerceptual,
    BackgroundPsnr,
    BackgroundSsim,
    EditedTextScore,
    ReconstructionPsnr,
    StructureScore,
)
from hiperlab.metric.preprocess import Preprocess
from hiperlab.metric.protocol import Protocol
from hiperlab.metric.score import score
from hiperlab.metric.table import aggregate
from tests.metric.conftest import ColourEncoder, noise, plain

SIDE = 48
SOURCE, DRAWN = noise(1, (SIDE, SIDE)), noise(2, (SIDE, SIDE))
BOX = Image.new("L", (SIDE, SIDE))
BOX.paste(255, (8, 4, 30, 40))
SOFT = Image.linear_gradient("L").resize((SIDE, SIDE))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def levels(picture: Image.Image) -> torch.Tensor:
    """Values of 0 to 255, (1, C, H, W)."""
    array = np.asarray(picture, np.float32)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None]


def make_lpips(net: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return lpips_network(net)


@pytest.fixture(scope="module")
def alex() -> nn.Module:
    return make_lpips("alex")


def test_the_unedited_part_is_pie_benchs() -> None:
    """Both pictures times 1 - mask, black elsewhere, the whole frame counts; torchmetrics' own metrics."""
    kept = (levels(BOX) < 128).float()
    a, b = (levels(picture) / 255 * kept for picture in (DRAWN, SOURCE))
    reference = EditReference(SOURCE, "a", mask=BOX)
    wanted: list[tuple[Any, Any, Any]] = [
        (BackgroundPsnr, PixelEncoder(SIDE), peak_signal_noise_ratio(a, b, data_range=1.0)),
        (BackgroundMse, PixelEncoder(SIDE), F.mse_loss(a, b)),
        (BackgroundSsim, PixelEncoder(SIDE), structural_similarity_index_measure(a, b, data_range=1.0)),
    ]
    squeeze = make_lpips("squeeze")
    wanted.append((BackgroundPerceptual, LpipsEncoder(squeeze), squeeze(a * 2 - 1, b * 2 - 1)))
    for member, features, value in wanted:
        (found,) = member("x").measure(features, [DRAWN], ["b"], reference)
        assert float(found) == pytest.approx(float(value), rel=1e-5), member.__name__


@pytest.mark.parametrize("antialias", [False, True])
def test_structure_distance_is_pie_benchs(tmp_path: Path, antialias: bool) -> None:
    """Keys of all heads side by side, cosines, MSE; fed 0 to 255, resized as a tensor of a larger picture."""
    torch.manual_seed(0)
    name, size = "vit_tiny_patch16_224", 32
    network = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    torch.save(network.state_dict(), tmp_path / "keys.pth")
    how = Preprocess(size, size, "bilinear", MEAN, STD)
    features = TensorKeys("vit_tiny_patch16_224.augreg_in21k_ft_in1k", str(tmp_path / "keys.pth"), how, True, antialias)
    pictures = [noise(seed, (80, 80)) for seed in (1, 2)]

    def similarity(picture: Image.Image) -> torch.Tensor:
        small = F.interpolate(levels(picture), (size, size), mode="bilinear", align_corners=False, antialias=antialias)
        fed = (small - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        seen: list[torch.Tensor] = []
        block = network.blocks[-1].attn
        handle = block.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
        with torch.no_grad():
            network.eval()(fed)
        handle.remove()
        heads = seen[0].reshape(-1, 3, block.num_heads, 192 // block.num_heads)[:, 1]  # (tokens, heads, width)
        keys = heads.reshape(len(heads), -1)
        norms = keys.norm(dim=1)
        return (keys @ keys.T) / (norms[:, None] * norms[None])

    value = F.mse_loss(similarity(pictures[1]), similarity(pictures[0]))
    member = StructureScore("dino")
    loaded = features.load("metric.encoders.dino")
    (found,) = member.measure(loaded, pictures[1:], ["b"], EditReference(pictures[0], "a"))
    assert float(found) == pytest.approx(float(value), rel=1e-4)
    assert float(value) > 1e-6


def test_text_score_of_the_edited_part() -> None:
    picture = plain((255, 0, 0), SIDE)
    picture.paste((0, 255, 0), BOX.getbbox())
    cut = np.asarray(picture) * (np.asarray(BOX) > 0)[..., None]
    assert cut[10, 20].tolist() == [0, 255, 0] and not cut[0].any()
    measure = EditedTextScore("clip", "percent").measure
    found = measure(ColourEncoder(), [picture, picture], ["green", "red"], EditReference(SOURCE, "a", mask=BOX))
    assert found.tolist() == pytest.approx([100, 0])
    nowhere = Image.new("L", (SIDE, SIDE))
    for mask in (None, nowhere):
        assert measure(ColourEncoder(), [picture], ["green"], EditReference(SOURCE, "a", mask=mask)).isnan().all()
    with pytest.raises(UserError, match="8 x 8 pixels, its source 48 x 48"):
        measure(ColourEncoder(), [plain((1, 2, 3))], ["green"], EditReference(SOURCE, "a", mask=BOX))


def test_ns_lpips_as_released_and_as_meant(alex: nn.Module) -> None:
    """The script's steps with torchvision's transforms: resize, [0, 1], grey background as stored."""
    from torchvision.transforms import Compose, Grayscale, Resize, ToTensor

    prepare = Compose([Resize((256, 256)), ToTensor()])
    a, b = (prepare(picture)[None] for picture in (DRAWN, SOURCE))
    features, grey = LpipsEncoder(alex), SOFT.resize((256, 256), Image.Resampling.BILINEAR)
    stored = Image.fromarray(255 - np.asarray(grey)).convert("RGB")  # the mask file is the background
    background = Grayscale()(prepare(stored))[None]
    reference = EditReference(SOURCE, "a", mask=grey)
    (released,) = NsLpips("alex").measure(features, [DRAWN], ["b"], reference)
    assert float(released) == pytest.approx(float(alex(a * background, b * background)), rel=1e-4)
    binary = (torch.from_numpy(np.asarray(grey).copy()) < 127.5).float()
    (meant,) = NsLpipsFixed("alex").measure(features, [DRAWN], ["b"], reference)
    assert float(meant) == pytest.approx(float(alex(a * binary * 2 - 1, b * binary * 2 - 1)), rel=1e-4)
    assert abs(float(meant) - float(released)) > 1e-3


@pytest.mark.parametrize("member", [NsLpips, NsLpipsFixed])
def test_ns_lpips_sees_the_background_only(alex: nn.Module, member: type[NsLpips]) -> None:
    inside, outside = SOURCE.copy(), SOURCE.copy()
    inside.paste(DRAWN.crop((12, 8, 26, 36)), (12, 8))
    outside.paste(DRAWN.crop((34, 4, 48, 40)), (34, 4))
    reference = EditReference(SOURCE, "a", mask=BOX)
    found = member("alex").measure(LpipsEncoder(alex), [inside, outside], ["b", "b"], reference)
    assert 0 <= found[0] < 0.01 * found[1]
    unknown = member("alex").measure(LpipsEncoder(alex), [inside], ["b"], EditReference(SOURCE, "a"))
    everywhere = EditReference(SOURCE, "a", mask=Image.new("L", (SIDE, SIDE), 255))
    nothing = member("alex").measure(LpipsEncoder(alex), [inside], ["b"], everywhere)
    assert unknown.isnan().all() and nothing.isnan().all()


def test_lpips_over_alexnet_reads_torchvisions_file(alex: nn.Module, tmp_path: Path) -> None:
    names = {f"features.{own.split('.', 1)[1]}": value for own, value in alex.net.state_dict().items()}
    torch.save(names, tmp_path / "alexnet.pth")
    loaded = Lpips("alex", str(tmp_path / "alexnet.pth")).load("metric.encoders.alex")
    assert loaded.weights == LpipsEncoder(alex).weights


def test_reconstructions_are_scored_by_themselves(tmp_path: Path) -> None:
    protocol = Protocol(
        "t", True, {"pixels": Pixels(16)},
        {"reconstruction_psnr": ReconstructionPsnr("pixels"), "background_mse": BackgroundMse("pixels")},
    )  # fmt: skip
    records = []
    for role, text, grey in (("source", "a  red car", 151), ("target", "a green car", 0)):
        plain((grey, grey, grey), 16).save(tmp_path / f"{role}.png")
        records.append({"concept": "x", "prompt": text, "text": text, "path": f"{role}.png", "seed": 0, "role": role})
    source, mask = plain((100, 100, 100), 16), BOX.resize((16, 16), Image.Resampling.NEAREST)
    edits = {"x": EditReference(source, "a  red car", mask=mask)}
    rows = score(records, {"x": [source]}, protocol, root=tmp_path, edits=edits).rows
    table = {row["metric"]: row for row in aggregate(rows) if row["kind"] == "all"}
    assert table["reconstruction_psnr"]["mean"] == pytest.approx(-20 * math.log10(51 / 255), abs=1e-3)
    assert table["reconstruction_psnr"]["n"] == 1 and table["reconstruction_psnr"]["missed"] == 0
    assert table["background_mse"]["n"] == 1, "an edit's score passes over the reconstruction"
    assert [row["picture"] for row in rows if row["metric"] == "reconstruction_psnr"] == ["source.png"]
