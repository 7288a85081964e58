"""Scores of scores: by hand, by the definition, and where they say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hiperlab import files
from hiperlab.metric.validity import agreement, copy_bias, kendall_tau_b
from hiperlab.metric.validity_table import main, validity


def test_kendalls_tau_by_hand() -> None:
    """Of the six pairs of 1 2 2 4 against 1 3 2 2: four alike, one round, one tie in each."""
    # (1,2)+ (1,3)+ (1,4)+ (2,3) tie in x, (2,4)-, (3,4) tie in y: P = 3, Q = 1, T = 1, U = 1
    assert kendall_tau_b([1, 2, 2, 4], [1, 3, 2, 2]) == pytest.approx((3 - 1) / math.sqrt(5 * 5))
    assert kendall_tau_b([1, 2, 3], [10, 20, 30]) == 1 and kendall_tau_b([1, 2, 3], [3, 2, 1]) == -1
    assert math.isnan(kendall_tau_b([1, 1, 1], [1, 2, 3])) and math.isnan(kendall_tau_b([], []))
    assert kendall_tau_b([1, np.nan, 3, 2], [1, 0, 3, np.nan]) == 1, "pictures without a number do not count"


def test_agreement_is_within_subjects() -> None:
    """Each subject's pictures are ordered the wrong way round; over all of them the order looks right."""
    truths, names = [1, 2, 11, 12, 21, 22], ["a", "a", "b", "b", "c", "c"]
    scores = [2, 1, 12, 11, 22, 21]
    found = agreement(scores, truths, names)
    assert (found.tau, found.low, found.high, found.subjects) == (-1, -1, -1, 3)
    assert kendall_tau_b(scores, truths) > 0.5


def test_its_interval_is_over_subjects() -> None:
    """One subject agrees, one does not: of two drawn with replacement half the means are 0, a quarter each -1 and 1."""
    found = agreement([1, 2, 2, 1], [1, 2, 1, 2], ["a", "a", "b", "b"])
    assert (found.tau, found.low, found.high) == (0, -1, 1)
    assert found == agreement([1, 2, 2, 1], [1, 2, 1, 2], ["a", "a", "b", "b"]), "the same numbers, the same interval"
    alone = agreement([1, 2, 5], [1, 2, 5], ["a", "a", "b"])
    assert (alone.tau, alone.subjects) == (1, 1) and math.isnan(alone.low)


def test_copy_bias_by_hand() -> None:
    """Others 1, 2, 3 with deviation 1; copies 4 and 6 are three of it above."""
    assert copy_bias([1, 2, 3, 4, 6], [0, 0, 0, 1, 1]) == 3
    assert copy_bias([1, 2, 3, 0], [0, 0, 0, 1]) == -2
    assert copy_bias([2, 2, 5, np.nan], [0, 0, 1, 0]) == math.inf and math.isnan(copy_bias([1, 2], [0, 0]))


def rows(metric: str, values: dict[str, float | None], lower: bool = False) -> list[dict]:
    return [
        {"kind": "picture", "concept": "x", "picture": picture, "metric": metric, "value": value, "protocol_hash": "h",
         "lower_is_better": lower}
        for picture, value in values.items()
    ]  # fmt: skip


def test_the_table_of_run_folders(tmp_path, capsys) -> None:
    """Two honest pictures and a copy: likeness orders the honest ones rightly and puts the copy, the worst, on top."""
    honest, copies = tmp_path / "honest", tmp_path / "copies"
    truth = {"a": 0.1, "b": 0.2}
    files.write_jsonl(honest / "scores.jsonl", [*rows("truth_distance", truth, True), *rows("like", {"a": 2, "b": 1})])
    copied = [*rows("truth_distance", {"c": 0.9}, True), *rows("like", {"c": 5}), *rows("odd", {"c": None})]
    files.write_jsonl(copies / "scores.jsonl", copied)
    line, odd = validity([honest], [copies], "truth_distance")
    assert (line.metric, line.agreement.tau, line.agreement.subjects) == ("like", 1, 1)
    assert line.with_copies.tau == pytest.approx((1 - 2) / 3) and line.bias == pytest.approx(3.5 / math.sqrt(0.5))
    assert odd.metric == "odd" and math.isnan(odd.agreement.tau) and math.isnan(odd.bias)
    assert main([str(honest), "--copies", str(copies)]) == 0
    assert [each.split()[0] for each in capsys.readouterr().out.splitlines()] == ["score", "like", "odd"]


def test_mistakes_of_the_table(tmp_path, capsys) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    files.write_jsonl(one / "scores.jsonl", rows("like", {"a": 1}))
    files.write_jsonl(other / "scores.jsonl", [{**row, "protocol_hash": "i"} for row in rows("like", {"a": 1})])
    assert main([str(one), "--truth", "like_", "--copies"]) == 2
    assert "has no score like_ of pictures. Did you mean like" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(one), str(other), "--truth", "like"]) == 2
    assert "scores of 2 protocols" in capsys.readouterr().err
