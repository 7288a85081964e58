"""XTI: one vector per layer, its file, and Textual Inversion as the case of equal vectors."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hiperlab.base.method import Step
from hiperlab.errors import UserError
from tests.composed import SUBJECTS, build

CATS = SUBJECTS[:1]
STEP = Step([f"a photo of {CATS[0].placeholder}"], torch.tensor([0]), torch.tensor([100]))


def test_equal_vectors_are_textual_inversion(stack) -> None:
    """Both start from the class noun, so before training they condition alike in every layer."""
    with torch.no_grad():
        xti, ti = build("xti", stack, CATS).condition(STEP), build("ti", stack, CATS).condition(STEP)
    assert xti.layers == 16 and ti.layers == 1
    torch.testing.assert_close(xti.keys, ti.keys.expand(16, -1, -1, -1), atol=1e-6, rtol=0)


def test_a_layers_vector_reaches_that_layer_only(stack) -> None:
    method = build("xti", stack, CATS)
    with torch.no_grad():
        before = method.condition(STEP).keys
        method.vectors[0, 6] += 1
        changed = (method.condition(STEP).keys - before).abs().amax((1, 2, 3)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [6]


def test_file_has_promptplusplus_form(stack, tmp_path) -> None:
    method = build("xti", stack, CATS)
    (path,) = method.export(0, tmp_path, steps=1)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {f"<my-cat-{layer}-0>" for layer in range(16)}
        assert set(file.metadata().values()) == {"<embed>"}
        assert file.get_tensor("<my-cat-3-0>").shape == (32,)
    save_file({f"<my-cat-{layer}-0>": torch.zeros(32) for layer in range(9)}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="9 layer vectors, expected 16"):
        method.load_foreign(0, tmp_path / "short.safetensors")
