"""Arbitrary values for every key of the composed config: accepted or refused in one line, never a traceback."""

from __future__ import annotations

import os
import random

import pytest
from omegaconf import OmegaConf

from hiperlab.run import main as door
from tests.composed import config
from tests.run import bench

ODD = [
    "nan", "inf", "-1", "0", "1e400", "null", "true", "abc", "''", "[]", "[abc]", "{a: 1}", "[nan]",
    "99999999999999999999", "'\"a b\"'", "/proc/self", "..", "'*'", "'${nothing}'",
]  # fmt: skip
COMMANDS = (["method=neti", "data=cats"], ["method=lora", "data=folder"], ["method=hiper", "data=standing_dog"])


def keys_of(words: list[str]) -> list[str]:
    """Dotted keys of what the words compose to, groups and inner nodes included."""
    found: list[str] = []

    def walk(node, path: str) -> None:
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if here != "hydra" and key != "_target_":
                found.append(here)
                if isinstance(value, dict):
                    walk(value, here)

    name = words[0].removeprefix("method=")
    walk(OmegaConf.to_container(config(name, *words[1:]), resolve=False), "")
    return found


CASES = [(words, key, value) for words in COMMANDS for key in keys_of(words) for value in ODD]


@pytest.mark.parametrize("number", range(int(os.environ.get("HIPERLAB_ODD_VALUES", "30"))))
def test_it_is_accepted_or_one_line(number, tmp_path, monkeypatch, capsys) -> None:
    """`HIPERLAB_ODD_VALUES=6000` tries them all."""
    words, key, value = CASES[random.Random(2026).sample(range(len(CASES)), len(CASES))[number % len(CASES)]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(door.JOB, "tests.run.bench:job")
    monkeypatch.setattr(bench, "job", lambda cfg: 0.0)
    code = door.main([*words, "data.dir=photos" if "data=folder" in words else "seed=1", f"{key}={value}"])
    seen = capsys.readouterr()
    assert code in (0, 2), (key, value)
    lines = [line for line in seen.err.splitlines() if line.startswith("hiperlab: ")]
    assert "Traceback" not in seen.err and (code == 0 or len(lines) == 1), (key, value, seen.err)
