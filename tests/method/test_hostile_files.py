"""Other tools' files with one thing wrong anywhere in them: each is refused in one line, or loads finite numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from safetensors.torch import load_file, save_file

from hiperlab.base.capability import Exportable
from hiperlab.errors import UserError
from hiperlab.formats import neti
from hiperlab.model.tiny import tiny
from tests.composed import METHODS, SUBJECTS, config, kept

READABLE = [name for name in METHODS if issubclass(get_class(config(name).method._target_), Exportable)]
MOST = 60  # changes tried of each file, drawn with a fixed seed; the small files have fewer
VALUES = [
    None, "x", -1, float("nan"), float("inf"), [], {}, 2**70, torch.zeros(0), torch.zeros(1), torch.tensor(1.0),
    torch.full((3,), float("nan")), b"\0", True, (1, 2), ["x"], {"x": 1},
]  # fmt: skip


def changed(value: Any) -> Iterator[Any]:
    """The value with one thing in it replaced, missing or added."""
    yield from VALUES
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: each for name, each in value.items() if name != key}
            yield from ({**value, key: other} for other in changed(inner))
        yield {**value, 5: 1}
        yield {**value, "another": torch.ones(2)}
    if isinstance(value, list) and value:
        yield value[1:]
        yield from ([other, *value[1:]] for other in changed(value[0]))
    if isinstance(value, torch.Tensor):
        yield from tensors_like(value)
        yield value.to_sparse() if value.dim() else value
        yield value.to(torch.complex64)
        yield torch.zeros(1).expand(10**6)


def tensors_like(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of other numbers, shapes and types; what safetensors can hold."""
    yield value.float() * float("nan")
    yield value.flatten()[:-1].clone()
    yield value[None].clone()
    yield value.to(torch.int8)
    yield value.to(torch.bool)
    yield value.new_zeros(0)


def variants(path: Path) -> Iterator[Any]:
    if path.suffix != ".safetensors":
        with neti._as_their_module():
            yield from changed(torch.load(path, weights_only=False))
        return
    tensors = load_file(path)
    for name, value in tensors.items():
        yield {key: each for key, each in tensors.items() if key != name}
        yield from ({**tensors, name: other} for other in tensors_like(value))
    yield {}
    yield {**tensors, "another": torch.ones(2)}


@pytest.mark.parametrize("name", READABLE)
def test_a_file_with_one_thing_wrong(name, tmp_path) -> None:
    stack = tiny(seed=0, size=64)
    settings = config(name).method
    all_files = {key: True for key in settings if key.startswith("export_") and settings[key] is False}
    method = kept(name, stack, SUBJECTS[0], **all_files)
    refused = 0
    for path in method.export(0, tmp_path, steps=1):
        if path.suffix not in (".pt", ".bin", ".pth", ".safetensors"):
            continue
        everything, good = list(variants(path)), path.read_bytes()
        most = MOST if path.stat().st_size < 10**6 else MOST // 8
        for content in random.Random(0).sample(everything, min(most, len(everything))):
            if path.suffix == ".safetensors":
                save_file(content, path)
            else:
                with neti._as_their_module() if name == "neti" else nullcontext():
                    torch.save(content, path)
            before = {key: value.detach().clone() for key, value in method.named_parameters()}
            try:
                method.load_foreign(0, path)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and (path.name in str(error) or str(path.parent) in str(error))
                changed_by_it = [k for k, v in method.named_parameters() if not torch.equal(v, before[k])]
                assert not changed_by_it, f"refused ({error}), but {changed_by_it[0]} is another"
            assert all(torch.isfinite(value).all() for value in method.parameters())
        path.write_bytes(good)
    assert refused > 3
