"""A judge of one's own: what it is asked, what it may answer, and every way in which it fails in one line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hiperlab.cli.targets import check_targets
from hiperlab.errors import UserError
from hiperlab.metric.judge import Judge, JudgeScore
from hiperlab.metric.protocol import Protocol
from hiperlab.metric.score import score
from hiperlab.metric.weights import MissingWeightsError
from tests.metric.conftest import load_protocol

ECHO = """
import json, sys
from PIL import Image
for line in sys.stdin:
    asked = json.loads(line)
    sizes = [Image.open(path).size for path in asked["pictures"]]
    print("null" if "painting" in asked["prompt"] else len(asked["prompt"]) + 1000 * len(sizes) + sizes[0][0] / 1000)
"""


def program(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "judge.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def judged(command=None, call=None, version: str | None = "1", timeout: float = 60) -> Judge:
    return Judge(command=command, call=call, version=version, timeout=timeout)


def of(judge: Judge, references: int = 2) -> Protocol:
    return Protocol("judge", True, {"judge": judge}, {"judge": JudgeScore("judge", "noun", references)})


def test_a_program_is_asked_once_and_answers_line_by_line(samples, tmp_path) -> None:
    """Its number holds the length of the text, the pictures it was shown and the drawn one's width."""
    records, references = samples
    judge = judged(program(tmp_path, ECHO), None, "1", 60)
    found = score(records, references, of(judge), root=tmp_path).rows
    beach, shown = len("A photo of cat on a beach"), {"cats": 1 + 2, "mug": 1 + 1}
    for row in found:
        wanted = beach + 1000 * shown[row["concept"]] + 0.096
        if "painting" in row["prompt"]:
            assert row["value"] is None
        else:
            assert row["value"] == pytest.approx(wanted)
    assert len(found) == len(records) and {row["value"] is None for row in found} == {True, False}


def test_a_function_gets_the_text_and_the_pictures(samples, tmp_path) -> None:
    records, references = samples
    asked = []

    def likeness(prompt: str, pictures: list[Image.Image]) -> float | None:
        asked.append((prompt, [picture.mode for picture in pictures]))
        return None if "painting" in prompt else 0.5

    found = score(records, references, of(judged(None, likeness, "1", 60)), root=tmp_path).rows
    assert {row["value"] for row in found} == {None, 0.5}
    assert asked[0] == ("A photo of cat on a beach", ["RGB"] * 3) and asked[-1][1] == ["RGB"] * 2


def test_its_version_is_hashed_and_its_files_are_in_the_weights(tmp_path) -> None:
    judge = judged(program(tmp_path, ECHO), None, "1", 60)
    assert of(judge).hash != of(replace(judge, version="2")).hash
    assert of(judge).hash == of(replace(judge, timeout=5, command=("elsewhere",))).hash
    assert of(judged(None, len, "1", 60)).hash != of(judged(None, max, "1", 60)).hash
    before = judge.load("k").weights
    assert before == judge.load("k").weights and len(before) == 12
    program(tmp_path, ECHO + "#")
    assert judge.load("k").weights != before != replace(judge, version="2").load("k").weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print(1)", "gave 1 answers for 8 pictures"),
        ("print('NaN\\n' * 8)", "answered 'nan' for 0_1.png: expected a number or null"),
        ("print('1e999\\n' * 8)", "answered 'inf' for 0_1.png"),
        ("print('\"0.5\"\\n' * 8)", "answered '0.5' for 0_1.png"),
        ("print('true\\n' * 8)", "answered 'True' for 0_1.png"),
        ("print('[1]\\n' * 8)", r"answered '\[1\]' for 0_1.png"),
        ("print('very good\\n' * 8)", "answered 'very good' for 0_1.png"),
        ("import sys; sys.exit('no key')", "ended with code 1: no key"),
        ("raise SystemExit(3)", "ended with code 3: it said nothing"),
        ("import time; time.sleep(30)", "took more than 1 s"),
    ],
)
def test_a_failing_program_is_told_in_one_line(text, said, samples, tmp_path) -> None:
    records, references = samples
    with pytest.raises(UserError, match=said) as caught:
        score(
            records,
            references,
            of(judged(program(tmp_path, text), None, "1", 1 if "sleep" in text else 60)),
            root=tmp_path,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompt, pictures: 1 / 0, "failed on 0_1.png .*division by zero"),
        (lambda prompt, pictures: float("nan"), "answered 'nan' for 0_1.png"),
        (lambda prompt, pictures: "good", "answered 'good' for 0_1.png"),
    ],
)
def test_a_failing_function_is_told_in_one_line(function, said, samples, tmp_path) -> None:
    records, references = samples
    with pytest.raises(UserError, match=said):
        score(records, references, of(judged(None, function, "1", 60)), root=tmp_path)


def test_a_judge_must_be_named_once_and_with_a_version() -> None:
    with pytest.raises(MissingWeightsError, match=r"k\.command is not set"):
        load_protocol("judge").encoders["judge"].fetch("k")
    with pytest.raises(UserError, match="exclude each other"):
        judged(["a"], len, "1", 60).fetch("k")
    with pytest.raises(UserError, match=r"k\.version is not set"):
        judged(["a"], None, None, 60).fetch("k")
    with pytest.raises(UserError, match="cannot be run"):
        judged(["/no/such/program"], None, "1", 60).load("k").ask([])


def test_programs_and_functions_run_only_if_the_command_line_names_them() -> None:
    """A config comes from anywhere; another's recorded command must not run because one trusts `python`."""
    config = {"metric": {"encoders": {"judge": {"command": ["python", "judge.py"], "call": None}}}}
    said = r"metric\.encoders\.judge\.command would run `python judge\.py`"
    for extra in ([], ["python"], ["python judge"], ["python judge.py --more"]):
        with pytest.raises(UserError, match=said):
            check_targets(config, extra)
    check_targets(config, ["python judge.py"])
    nobody = {"metric": {"encoders": {"judge": {"command": None, "call": {"_target_": "os.system"}}}}}
    with pytest.raises(UserError, match=r"judge\.call\._target_=os\.system is not allowed"):
        check_targets(nobody, ["python judge.py"])
    check_targets({"metric": {"encoders": {"judge": {"call": {"_target_": "mine.likeness"}}}}}, ["mine"])
    with pytest.raises(UserError, match=r"metric\.any\[0\]\.command would run"):
        check_targets({"metric": {"any": [{"command": "rm x"}]}}, [])
    with pytest.raises(TypeError, match="positional"):
        Judge(["rm", "x"], None, "1", 60)  # type: ignore[misc]
