"""Preprocessing agrees with the authors' loader (golden group i)."""

import torch
from PIL import Image

from hiperlab.data.images import to_pixels
from tests.parity import golden


def test_preprocessing_equals_the_authors() -> None:
    """At most one grey level anywhere (Pillow versions round differently), hardly any on average."""
    folder = golden.folder("neti")
    everything = golden.tensors(folder / "golden.safetensors")
    size = golden.config(folder / "config.json")["preprocessing_size"]
    pictures = {k.split("/")[1]: v for k, v in everything.items() if k.startswith("i/") and k.endswith("/uint8")}
    assert pictures, "the folder's group i holds no picture"
    for name, uint8 in pictures.items():
        for key, theirs in golden.pick(everything, f"i/{name}/").items():
            if key == "uint8":
                continue
            crop, flip = key.split("_")
            ours = to_pixels(
                Image.fromarray(uint8.numpy()), size, "square" if crop == "crop1" else "squeeze", flip == "flip1"
            )
            golden.close("i/preprocessing", ours, theirs, 1 / 127.5 + 1e-6, absolute=True)
            assert torch.mean((ours - theirs).abs()) < 1e-3, key
