"""Scores of sets: the published formulas, by hand and by a library, and their way into scores.jsonl."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from hiperlab.errors import UserError
from hiperlab.metric.contract import EmbeddedPictures, Measurement, Score
from hiperlab.metric.protocol import Protocol
from hiperlab.metric.rows import SET
from hiperlab.metric.score import score
from hiperlab.metric.sets import (
    DiversityScore,
    FrechetScore,
    KernelScore,
    PerceptualDiversityScore,
    diversity,
    frechet_distance,
    kernel_distance,
)
from hiperlab.metric.table import aggregate
from tests.metric.conftest import ColourEncoder, load_protocol, plain


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kernel_distance_is_the_librarys() -> None:
    x, y = rows(12, 5, 0), rows(12, 5, 1) + 0.3
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(y, x)), rel=1e-9)


def test_kernel_distance_by_hand() -> None:
    """X = {0, 1}, y = {0, 1} in one dimension: k(0, .) = 1, k(1, 1) = 8; 1 + 1 - 2 (1 + 1 + 1 + 8) / 4."""
    x = torch.tensor([[0.0], [1.0]])
    assert kernel_distance(x, x) == pytest.approx(2 - 2 * 11 / 4)
    assert math.isnan(kernel_distance(x[:1], x))


def test_frechet_distance_by_hand() -> None:
    """One dimension: (m - m')^2 + (s - s')^2 with unbiased variances."""
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [9.0]])
    assert frechet_distance(x, y) == pytest.approx(6.0**2 + (math.sqrt(8) - math.sqrt(2)) ** 2, rel=1e-6)
    assert math.isnan(frechet_distance(x, y[:1]))


def test_diversity_by_hand() -> None:
    """Two prompts: equal pictures 0, right angles 1; a prompt of one picture says nothing."""
    images = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    assert diversity(images, ["a", "a", "b", "b", "c"]) == pytest.approx(0.5)
    assert math.isnan(diversity(images[:1], ["a"]))


def test_they_are_scored_and_tabled(samples, tmp_path) -> None:
    records, references = samples
    sets = {"kid": KernelScore("dino"), "fid": FrechetScore("dino"), "diversity": DiversityScore("dino")}
    protocol = Protocol("sets", False, load_protocol("twin").encoders, sets)
    found = score(records, references, protocol, root=tmp_path).rows
    concepts = list(dict.fromkeys(record["concept"] for record in records))
    assert [(row["kind"], row["metric"], row["concept"]) for row in found] == [
        (SET, name, concept) for name in sets for concept in concepts
    ]
    table = {(line["metric"], line["concept"]): line for line in aggregate(found)}
    for row in found:
        line = table[row["metric"], row["concept"]]
        assert line["mean"] == row["value"] and line["low"] is None
        assert row["num_pictures"] == 4 and 4 in (line["n"], line["missed"])
        assert line["lower_is_better"] == (row["metric"] != "diversity")


def test_sets_of_variants_and_roles_are_kept_apart(tmp_path) -> None:
    """Each variant repeats one picture. Reconstructions are no edits; pictures without an embedding do not count."""
    records = []
    for variant, role, colour in (
        ("a", "target", (255, 0, 0)),
        ("b", "target", (0, 255, 0)),
        ("b", "source", (9, 9, 9)),
    ):
        for seed in range(3):
            path = f"{variant}{role}{seed}.png"
            plain((0, 0, 0) if (variant, seed) == ("a", 0) else colour).save(tmp_path / path)
            records.append(
                {"concept": "x", "prompt": "p", "text": "p", "path": path, "variant": variant, "role": role}
            )  # fmt: skip
    protocol = Protocol("t", False, load_protocol("twin").encoders, {"diversity": DiversityScore("clip")})
    loaded = {protocol.encoders["clip"]: ColourEncoder()}
    found = score(records, {"x": [plain((255, 0, 0))]}, protocol, root=tmp_path, loaded=loaded).rows
    assert [(row["variant"], row["role"], row["num_pictures"]) for row in found] == [
        ("a", "target", 2), ("b", "target", 3), ("b", "source", 3),
    ]  # fmt: skip
    assert [row["value"] for row in found] == pytest.approx([0, 0, 0], abs=1e-6)
    table = {line["variant"]: line["n"] for line in aggregate(found, by=("variant",)) if line["kind"] == "all"}
    assert table == {"a": 2, "b": 3}, "reconstructions are no edits"


def test_frechet_distance_is_the_formula() -> None:
    """The trace of (C C')^(1/2) by the eigenvalues of C^(1/2) C' C^(1/2), in five dimensions."""
    x, y = rows(40, 5, 0), rows(30, 5, 1) * 1.5 + 0.3
    a, b = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    wanted = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(float(wanted), rel=1e-8)


def test_a_new_score_is_one_class(samples, tmp_path) -> None:
    """With a setting that nothing else knows: it is checked, hashed and found without another line anywhere."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Brightness(Score):
        mode: str
        choices = {"mode": ("mean", "most")}  # noqa: RUF012

        def measurements(self, pictures: EmbeddedPictures):
            for record, picture in zip(pictures.records, pictures.opened(pictures.records), strict=True):
                pixels = list(picture.convert("L").getdata())
                value = max(pixels) if self.mode == "most" else sum(pixels) / len(pixels)
                yield Measurement("picture", value / 255, record["concept"], record)

    records, references = samples
    encoders = load_protocol("twin").encoders
    one, other = (Protocol("b", True, encoders, {"bright": Brightness("clip", mode)}) for mode in ("mean", "most"))
    assert one.hash != other.hash
    found = score(records, references, one, root=tmp_path).rows
    assert len(found) == len(records) and all(0 <= row["value"] <= 1 for row in found)
    with pytest.raises(UserError, match=r"metric\.members\.bright\.mode=mena is unknown\. Did you mean mean"):
        Protocol("b", True, encoders, {"bright": Brightness("clip", "mena")})


def test_div_as_published_by_hand(tmp_path) -> None:
    """Distances of grey levels: prompt a has 0 1 4 (mean of 1, 4, 3), prompt b 2 2, prompt c a single one."""

    class Levels(ColourEncoder):
        def perceptual(self, pictures, others):
            return torch.tensor(
                [abs(a.getpixel((0, 0))[0] - b.getpixel((0, 0))[0]) for a, b in zip(pictures, others, strict=True)]
            )

    records = []
    for number, (prompt, level) in enumerate((("a", 0), ("a", 1), ("a", 4), ("b", 2), ("b", 2), ("c", 9))):
        plain((level,) * 3).save(tmp_path / f"{number}.png")
        records.append({"concept": "x", "prompt": prompt, "text": prompt, "path": f"{number}.png"})
    protocol = Protocol("t", False, load_protocol("twin").encoders, {"div": PerceptualDiversityScore("clip")})
    loaded = {protocol.encoders["clip"]: Levels()}
    (row,) = score(records, {"x": [plain((1, 1, 1))]}, protocol, root=tmp_path, loaded=loaded).rows
    assert (row["value"], row["num_pictures"], row["kind"]) == (pytest.approx((8 / 3 + 0) / 2), 6, SET)
    (row,) = score(records[-1:], {"x": [plain((1, 1, 1))]}, protocol, root=tmp_path, loaded=loaded).rows
    assert row["value"] is None
