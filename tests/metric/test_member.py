"""ClipText, ClipImage and Identity against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.metric.compare import image_similarity, real_similarity, rescale, unit
from hiperlab.metric.extractor import VisionEncoder
from hiperlab.metric.picture import as_pictures
from hiperlab.metric.torchmetric import ClipImage, ClipText, Identity
from tests.metric.conftest import ColourEncoder, plain

RED, GREEN, YELLOW, BLACK = plain((255, 0, 0)), plain((0, 255, 0)), plain((255, 255, 0)), plain((0, 0, 0))
HALF = math.sqrt(0.5)  # cosine of red or green with yellow


def test_text_similarity_by_hand() -> None:
    metric = ClipText(ColourEncoder(), scale="cosine")
    values = metric([RED, RED, YELLOW], ["a red", "a green", "a green"])
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, HALF]))
    assert metric.compute().item() == pytest.approx((1 + HALF) / 3)


@pytest.mark.parametrize(("pairing", "expected"), [("mean", [0.5, (1 + HALF) / 2]), ("max", [1.0, 1.0])])
def test_image_similarity_by_hand(pairing: str, expected: list[float]) -> None:
    metric = ClipImage(ColourEncoder(), scale="cosine", pairing=pairing)
    first = metric([RED], [RED, GREEN])
    second = metric([YELLOW], [YELLOW, RED])
    torch.testing.assert_close(torch.cat([first, second]), torch.tensor(expected))
    assert metric.compute().item() == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize(
    ("scale", "expected"), [("cosine", [-0.5, 0.25]), ("percent", [-50, 25]), ("clipscore", [0, 0.625])]
)
def test_scales(scale: str, expected: list[float]) -> None:
    torch.testing.assert_close(rescale(torch.tensor([-0.5, 0.25]), scale), torch.tensor(expected, dtype=torch.float32))


def test_clipscore_is_scaled_before_pairing() -> None:
    pictures, references = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert image_similarity(pictures, references, "clipscore", "mean").item() == pytest.approx(1.25)


@pytest.mark.parametrize(("missing", "value", "mean"), [("zero", 0.0, 0.5), ("drop", math.nan, 1.0)])
def test_a_picture_in_which_nothing_is_found(missing: str, value: float, mean: float) -> None:
    metric = Identity(ColourEncoder(), scale="cosine", pairing="mean", missing=missing)
    values = metric([RED, BLACK], [RED, BLACK])  # the black reference does not count either
    torch.testing.assert_close(values, torch.tensor([1.0, value]), equal_nan=True)
    assert metric.compute().item() == pytest.approx(mean)


def test_references_without_anything_found_give_no_score() -> None:
    metric = Identity(ColourEncoder(), scale="cosine", pairing="mean", missing="zero")
    assert metric([RED], [BLACK]).isnan().all()
    assert metric.compute().isnan()


def test_real_against_real_leaves_itself_out() -> None:
    references = ColourEncoder().images([RED, GREEN, YELLOW])
    torch.testing.assert_close(real_similarity(references, "cosine", "mean"), torch.tensor([HALF / 2, HALF / 2, HALF]))
    torch.testing.assert_close(real_similarity(references, "cosine", "max"), torch.tensor([HALF, HALF, HALF]))
    assert real_similarity(references[:1], "cosine", "mean").numel() == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["mean", "max"]))
def test_order_and_range(seed: int, pictures: int, references: int, pairing: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    a, b = (unit(torch.randn(n, 6, generator=rng)) for n in (pictures, references))
    values = image_similarity(a, b, "cosine", pairing)
    assert values.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(
        image_similarity(a, b[torch.randperm(references, generator=rng)], "cosine", pairing), values
    )
    torch.testing.assert_close(image_similarity(a.flip(0), b, "cosine", pairing), values.flip(0))
    assert (image_similarity(a, b, "cosine", "max") >= image_similarity(a, b, "cosine", "mean") - 1e-6).all()


def test_every_byte_survives_the_way_through_a_tensor() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    (picture,) = as_pictures(bytes_ / 255)
    assert picture.tobytes() == bytes_[0].permute(1, 2, 0).contiguous().numpy().tobytes()


def test_tensor_and_pil_are_the_same_pictures() -> None:
    metric = ClipImage(ColourEncoder(), scale="cosine", pairing="mean")
    tensor = torch.zeros(1, 3, 8, 8)
    tensor[:, 0] = 1
    torch.testing.assert_close(metric(tensor, [YELLOW]), metric([RED], [YELLOW]))


@pytest.mark.parametrize(
    "bad", [torch.full((1, 3, 4, 4), -1.0), torch.zeros(3, 4, 4), torch.full((1, 3, 4, 4), torch.nan)]
)
def test_wrong_tensors_are_refused(bad: Tensor) -> None:
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        ClipImage(ColourEncoder(), scale="cosine", pairing="mean")(bad, [RED])


def test_sums_travel_between_processes() -> None:
    """Two processes with one and two pictures agree on the mean of all three."""
    whole, mine, other = (ClipText(ColourEncoder(), scale="cosine") for _ in range(3))
    for part, batch in ((mine, ([RED, YELLOW], ["red", "red"])), (other, ([GREEN], ["red"]))):
        part.update(*batch)
        whole.update(*batch)
    theirs = {id(getattr(mine, name)): getattr(other, name) for name in ("total", "count")}
    mine.sync(dist_sync_fn=lambda tensor, group: [tensor, theirs[id(tensor)]], distributed_available=lambda: True)
    assert (mine.total / mine.count).item() == pytest.approx((1 + HALF) / 3)
    assert (mine.total / mine.count).item() == pytest.approx(whole.compute().item(), abs=1e-12)


def test_a_text_score_needs_a_text_tower() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    with pytest.raises(UserError, match="text tower"):
        VisionEncoder(network, lambda picture: torch.zeros(3, 8, 8)).texts(["a cat"])
