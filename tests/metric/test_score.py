"""Scoring pictures on disk and the table made from the rows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.metric.picture import open_picture
from hiperlab.metric.protocol import IdentityScore, Protocol, TextScore
from hiperlab.metric.rows import ALL, CEILING, COPY, COPY_CEILING, PICTURE, score_row, table_row
from hiperlab.metric.score import score
from hiperlab.metric.table import aggregate, interval
from hiperlab.metric.weights import MissingWeightsError
from tests.metric.conftest import ColourEncoder, load_protocol, plain


def test_rows_of_the_twin(twin: Protocol, encoders: dict, samples, tmp_path: Path) -> None:
    records, references = samples
    rows, messages = score(records, references, twin, root=tmp_path, loaded=encoders)
    assert messages == ["mug has one reference picture: no real-against-real ceiling."]
    names = {row["metric"] for row in rows}
    assert names == {"clip_text", "clip_image", "dino"}
    for name in names:
        for kind, ceiling in ((PICTURE, CEILING), (COPY, COPY_CEILING)):
            mine = [row for row in rows if row["metric"] == name and row["kind"] in (kind, ceiling)]
            if name == "clip_text" and kind == COPY:
                assert not mine, "a text has no copies"
                continue
            assert sum(row["kind"] == ceiling for row in mine) == (0 if name == "clip_text" else 1)
            assert sorted(r["picture"] for r in mine if r["kind"] == kind) == sorted(r["path"] for r in records)
    row = next(row for row in rows if row["picture"] == "cats/0_1.png")
    assert row["truncation"] == 16 and row["seed"] == 1 and row["trained"] is False
    assert row["protocol"] == "twin" and row["protocol_hash"] == twin.hash
    json.loads(json.dumps(rows, allow_nan=False))
    again = score(records, references, load_protocol("twin"), root=tmp_path).rows
    assert again == rows  # freshly built: the same to the last bit


def test_batch_size_does_not_matter(twin: Protocol, encoders: dict, samples, tmp_path: Path) -> None:
    records, references = samples
    one, many = (
        score(records, references, twin, root=tmp_path, batch_size=size, loaded=encoders).rows for size in (1, 7)
    )
    for a, b in zip(one, many, strict=True):
        assert a["value"] == pytest.approx(b["value"], abs=2e-6)
        assert a | {"value": 0} == b | {"value": 0}


def test_rows_agree_with_the_metrics(twin: Protocol, encoders: dict, samples, tmp_path: Path) -> None:
    records, references = samples
    rows = score(records, references, twin, root=tmp_path, loaded=encoders).rows
    for name, texts in (("clip_text", True), ("clip_image", False), ("dino", False)):
        member = twin.members[name]
        metric = member.build(encoders[twin.encoders[member.encoder]])
        for record in records:
            picture = [open_picture(tmp_path / record["path"])]
            text = [" ".join(record["prompt"].replace("{}", "").split())]
            metric.update(picture, text if texts else references[record["concept"]])
        mine = [row["value"] for row in rows if row["metric"] == name and row["kind"] == PICTURE]
        assert metric.compute().item() == pytest.approx(sum(mine) / len(mine), abs=1e-6)
        overall = next(line for line in aggregate(rows) if line["metric"] == name and line["kind"] == ALL)
        assert overall["mean"] == pytest.approx(sum(mine) / len(mine), abs=1e-12)


class Colours:
    """A protocol over the colour encoder; its second encoder never loads."""

    def __init__(self, **members) -> None:
        self.protocol = Protocol("colours", False, load_protocol("twin").encoders, members)

    def run(self, monkeypatch: pytest.MonkeyPatch, records, references, root: Path):
        def load(_, key: str):
            if key == "dino":
                raise MissingWeightsError("weights of dino are not here.")
            return ColourEncoder()

        monkeypatch.setattr(Protocol, "load", load)
        return score(records, references, self.protocol, root=root)


def record(root: Path, name: str, colour: tuple[int, int, int], concept: str = "c") -> dict:
    plain(colour).save(root / f"{name}.png")
    return {"concept": concept, "prompt": "{} red", "text": "<me> red", "path": f"{name}.png"}


def test_values_by_hand_and_a_missing_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    half = math.sqrt(0.5)
    lab = Colours(
        lost=IdentityScore("dino", "cosine", "mean", "zero"),
        face=IdentityScore("clip", "cosine", "mean", "drop"),
        text=TextScore("clip", "percent", "remove"),
    )
    records = [record(tmp_path, "red", (255, 0, 0)), record(tmp_path, "black", (0, 0, 0))]
    references = {"c": [plain((255, 0, 0)), plain((255, 255, 0)), plain((0, 255, 0))], "unused": []}
    rows, messages = lab.run(monkeypatch, records, references, tmp_path)
    assert messages == ["Not scored: lost (colours): weights of dino are not here."]
    values = {(row["kind"], row["metric"], row["picture"]): row["value"] for row in rows}
    assert values[PICTURE, "face", "red.png"] == pytest.approx((1 + half) / 3)
    assert values[COPY, "face", "red.png"] == pytest.approx(1)
    assert values[PICTURE, "face", "black.png"] is None
    assert values[CEILING, "face", ""] == pytest.approx((half / 2 + half + half / 2) / 3)  # the self pairs are left out
    assert values[COPY_CEILING, "face", ""] == pytest.approx(half)
    assert values[PICTURE, "text", "red.png"] == pytest.approx(100)
    table = {(line["metric"], line["concept"]): line for line in aggregate(r for r in rows if r["metric"] != "text")}
    line = table["face", ""]
    assert (line["n"], line["missed"], line["low"]) == (1, 1, None)
    assert line["ceiling"] == values[CEILING, "face", ""]


def test_mistakes_are_named_before_anything_loads(twin: Protocol, samples, tmp_path: Path) -> None:
    records, references = samples
    for change, words in (
        ({"concept": "cat"}, "Did you mean cats"),
        ({"value": 1}, "may not have value"),
        ({"path": "gone.png"}, "is not there"),
    ):
        with pytest.raises(UserError, match=words):
            score([{**records[0], **change}], references, twin, root=tmp_path)
    with pytest.raises(UserError, match="lacks text"):
        score([{k: v for k, v in records[0].items() if k != "text"}], references, twin, root=tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(UserError, match="cannot be read"):
        open_picture(tmp_path / "broken.png")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="8 bits"):
        open_picture(tmp_path / "deep.png")


def test_nothing_to_score(twin: Protocol) -> None:
    assert score([], {}, twin) == ([], [])
    assert aggregate([]) == []


def line(value: float | None, **changes) -> dict:
    return {"kind": PICTURE, "concept": "c", "prompt": "p", "seed": 0, "picture": "x.png", "metric": "m",
            "value": value, "protocol": "twin", "protocol_hash": "0", "trained": False, "weights": "w",
            **changes}  # fmt: skip


@pytest.mark.parametrize("change", [{"protocol_hash": "1"}, {"protocol": "neti"}, {"weights": "v"}])
def test_mixtures_are_refused(change: dict) -> None:
    with pytest.raises(UserError, match=r"have no common mean|different weights"):
        aggregate([line(0.1), line(0.2, **change)])


def test_weights_may_differ_between_metrics_and_columns_split() -> None:
    rows = [line(0.0, truncation=16), line(1.0, truncation=64), line(0.5, metric="n", weights="v", truncation=16)]
    table = aggregate(rows, by=("truncation",))
    assert [(t["truncation"], t["metric"], t["mean"]) for t in table if t["kind"] == ALL] == [
        (16, "m", 0.0), (64, "m", 1.0), (16, "n", 0.5),
    ]  # fmt: skip


def test_a_ceiling_over_some_concepts_only_is_no_ceiling() -> None:
    rows = [line(0.5), line(0.5, concept="d"), line(0.9, kind=CEILING, picture="")]
    ceilings = {t["concept"]: t["ceiling"] for t in aggregate(rows)}
    assert ceilings == {"c": 0.9, "d": None, "": None}


def test_interval_knows_that_a_prompts_pictures_are_alike() -> None:
    """Ten equal pictures of a prompt tell no more than one: the interval stays as wide."""
    few, many = (interval([[[float(p % 2)] * n for p in range(8)]]) for n in (1, 10))
    assert few == many
    assert few is not None and few[0] < 0.3 and few[1] > 0.7


def test_interval_of_many_prompts_is_the_normal_one() -> None:
    values = [0.3 + 0.01 * ((7 * i) % 40) for i in range(400)]
    mean = sum(values) / 400
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values)) / 400
    low, high = interval([[[v] for v in values]]) or (0, 0)
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)


@pytest.mark.parametrize("num_concepts", [1, 4])
def test_interval_of_few_prompts_covers_the_truth(num_concepts: int) -> None:
    """Five prompts of a concept: the plain percentile interval covers 83 %, and of several concepts hardly more."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(600, num_concepts, 5, 1)).tolist()
    found = [interval(concepts) for concepts in draws]
    covered = np.mean([low <= 0 <= high for low, high in found])  # type: ignore[misc]
    assert (0.90 if num_concepts == 1 else 0.925) < covered < 0.975, covered


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=3), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_interval_stays_within_the_values(concepts: list[list[list[float]]]) -> None:
    flat = [v for concept in concepts for prompt in concept for v in prompt]
    found = interval(concepts, draws=200)
    assert (found is None) == all(sum(map(len, concept)) < 2 for concept in concepts)  # nothing varies
    if found:
        assert min(flat) - 1e-9 <= found[0] <= found[1] <= max(flat) + 1e-9
        assert interval(concepts, draws=200) == found


def test_rows_of_earlier_runs_are_read() -> None:
    """November 2026: marks inside the strings, no column `kind`."""
    shared = {"concept": "c", "prompt": "{} red", "seed": 0, "value": 0.5}
    earlier = [
        {**shared, "picture": "a.png", "metric": "face"},
        {**shared, "picture": "real", "metric": "face", "prompt": "", "seed": None},
        {**shared, "picture": "a.png", "metric": "face_copy"},
        {**shared, "picture": "real", "metric": "face_copy", "prompt": "", "seed": None},
    ]
    found = [score_row(row) for row in earlier]
    assert [row["kind"] for row in found] == [PICTURE, CEILING, COPY, COPY_CEILING]
    assert {row["metric"] for row in found} == {"face"} and [row["picture"] for row in found] == ["a.png", ""] * 2
    assert [score_row(row) for row in found] == found
    table = [table_row({"metric": "face", "concept": concept, "mean": 0.5}) for concept in ("c", "all")]
    assert [(row["kind"], row["concept"]) for row in table] == [("concept", "c"), (ALL, "")]
    assert [table_row(row) for row in table] == table
