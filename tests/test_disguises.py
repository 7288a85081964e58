"""Files that are not what their names say: the true cause, in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from hiperlab.errors import UserError
from hiperlab.formats import custom_diffusion, embedding, lora

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.safetensors", "a.SAFETENSORS"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(POINTER, "Git LFS pointer"), (b"<!DOCTYPE html><html>", "web page"), (b"", "empty"), ("png", "PNG picture")],
)
def test_the_true_cause_is_named(tmp_path, name, content, message) -> None:
    path = tmp_path / name
    if content == "png":
        Image.new("RGB", (8, 8)).save(path, format="PNG")
    else:
        path.write_bytes(content)
    for read in (embedding.read, lora.read, custom_diffusion.read):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_wrong_endings_say_the_right_one(tmp_path) -> None:
    (tmp_path / "a.pt").write_bytes(save({"<x>": torch.ones(4)}))
    with pytest.raises(UserError, match=r"rename it to a\.safetensors"):
        embedding.read(tmp_path / "a.pt")
    torch.save({"<x>": torch.ones(4)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"rename it to b\.pt"):
        embedding.read(tmp_path / "b.safetensors")
    save_file({"<x>": torch.ones(4)}, tmp_path / "c.SAFETENSORS")
    assert embedding.read(tmp_path / "c.SAFETENSORS").shape == (1, 4)


def test_what_a_pickle_holds_is_named(tmp_path) -> None:
    torch.save({"string_to_param": {"*": torch.ones(1, 4)}, "step": np.int64(3)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"it holds a numpy\.\S*scalar, which is no tensor"):
        embedding.read(tmp_path / "a.pt")
