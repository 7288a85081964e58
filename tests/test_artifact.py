"""Artifacts that came from elsewhere or were damaged on the way: refused in one line, whatever was done to them."""

from __future__ import annotations

import json
import logging
import random

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hiperlab.base import artifact
from hiperlab.errors import UserError
from hiperlab.model.tiny import tiny, tiny_sdxl
from tests.composed import ROOT, SUBJECTS, build, config, train


@pytest.fixture
def written(stack, tmp_path):
    method = build("ti", stack, SUBJECTS[:1], num_vectors=3)
    train(method, 1)
    path = tmp_path / "my-cat.safetensors"
    artifact.write(path, method, 0, {"_target_": "hiperlab.method.ti.TextualInversion", "num_vectors": 3}, 1)
    return path


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_any_flipped_bit_is_noticed(written) -> None:
    """In the numbers as in the metadata; the file's frame is safetensors' own to check."""
    good, chance, noticed = written.read_bytes(), random.Random(0), 0
    artifact.read(written)
    for _ in range(200):
        damaged = bytearray(good)
        damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        written.write_bytes(bytes(damaged))
        with pytest.raises(UserError) as caught:
            artifact.read(written)
        assert "\n" not in str(caught.value)
        noticed += 1
    assert noticed == 200
    written.write_bytes(good[: len(good) - 96] + bytes(96))
    with pytest.raises(UserError, match="not what its checksum says"):
        artifact.read(written)


def test_an_earlier_version_s_file_is_read_and_said(caplog) -> None:
    path = next((ROOT / "tests" / "earlier").glob("*/artifacts/*.safetensors"))
    with caplog.at_level(logging.INFO):
        artifact.read(path)
    assert "carries no checksum" in caplog.text


@pytest.mark.parametrize("name", ["../../../x", "/tmp/x", "a/b", "..", "", "x" * 300, "a\x00b", 7, None, ["a"]])
def test_a_name_that_leaves_the_run_folder_is_refused(written, name) -> None:
    """Even with a checksum that fits."""
    metadata = metadata_of(written)
    subject = json.dumps({**json.loads(metadata["subject"]), "name": name})
    rewritten(written, {**metadata, "subject": subject})
    with pytest.raises(UserError, match="cannot be a file name"):
        artifact.read(written)


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "[]"}, {"subject": "{}"}, {"subject": "not json"}, {"base": "{}"}, {"base": "null"},
        {"settings": "3"}, {"settings": "["}, {"steps": "many"}, {"settings": "[" * 100_000},
    ],
    ids=lambda change: " ".join(f"{key}={value[:9]}" for key, value in change.items()),
)  # fmt: skip
def test_malformed_metadata_are_one_line(written, change) -> None:
    rewritten(written, metadata_of(written) | change)
    with pytest.raises(UserError, match="its metadata are damaged") as caught:
        artifact.read(written)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def rewritten(path, metadata) -> None:
    tensors = load_file(path)
    save_file(tensors, path, {**metadata, artifact.CHECKSUM: artifact._checksum(tensors, metadata)})


def test_settings_in_the_file_are_those_of_the_run() -> None:
    assert config("ti").method._target_ == "hiperlab.method.ti.TextualInversion", "what `written` says"


def test_the_card_says_what_other_tools_prompts_say() -> None:
    """A weight method's rare word is nowhere in our prompts, and its files draw nothing of the concept without it."""
    stack = tiny(seed=0, size=64)
    lora, ti = (build(name, stack, SUBJECTS[:1]) for name in ("lora", "ti"))
    subject = SUBJECTS[0]
    for method, said in ((lora, f"sks {subject.word}"), (ti, subject.placeholder)):
        written = [artifact.Written(subject, ["a.safetensors"], method.said_elsewhere(0))]
        text = artifact.card("method", stack.base, "", [3], "command", written)
        assert f"| `a.safetensors` | `{said}` |" in text and "pooled" not in text
    assert "`model.pooled_at=end`" in artifact.card("method", tiny_sdxl(seed=0, size=64).base, "", [3], "command", [])
