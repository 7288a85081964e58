"""StyleDiffusion's and null-text's inversions against the authors' numbers (golden/stylediffusion/README.md).

Limits are ten times what a clean implementation measured (the README's table), unless said otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from hiperlab.data.images import to_pixels
from hiperlab.formats.open_clip import to_transformers
from hiperlab.layer.mapping import MappingNetworks, value_rows, value_states
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.vision import VisionTower, preprocess
from tests.parity import golden
from tests.parity.test_e4t import tower

close = golden.close
NAMES = {"conv_block.0.0": "conv_block", "conv_block.0.1": "norm"}
IRRELEVANT = ("conv_start.bias", "conv_block.0.0.bias")  # batch norm removes them: their gradients are rounding


@pytest.fixture(scope="module", params=["golden", "slice"])
def mapping(request) -> dict[str, Tensor]:
    """The mapping file of the full folder and of the committed slice."""
    folder = golden.folder("stylediffusion") if request.param == "golden" else golden.SLICE / "stylediffusion"
    return golden.tensors(folder / "mapping.safetensors")


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("stylediffusion")


def ours(name: str) -> str:
    """Our name of one of their parameters."""
    module, _, kind = name.rpartition(".")
    return f"{NAMES.get(module, module)}.{kind}"


def networks(state: dict[str, Tensor], steps: int = 1) -> MappingNetworks:
    """T networks that all have the recorded numbers."""
    made = MappingNetworks(steps, tokens=197, rows=value_rows("affine", 77), seed=0).to(state["conv_end.bias"].dtype)
    own = made.state_dict()
    for name, value in state.items():
        if "running_" not in name and "num_batches" not in name:
            own[ours(name)].copy_(value.squeeze(-1) if value.dim() == 3 else value)
    return made


def test_picture_to_features(mapping) -> None:
    g = mapping
    image = Image.fromarray(g["image"].numpy())
    pixels = to_pixels(image, 512, center_crop=True, flip=False)[None]
    wanted = g["image512_sub8"].permute(2, 0, 1).float() / 127.5 - 1
    close("sd picture 512", pixels[0, :, ::8, ::8], wanted, 1e-6)
    small = preprocess(pixels, 224, align_corners=False)
    close("sd clip_input", small[:, :, ::4, ::4], g["clip_input"], 2e-5)
    state = {name: value for name, value in golden.pick(g, "clip.").items() if name != "proj"}
    eyes: VisionTower = tower(to_transformers(state), 224, "quick_gelu")
    close("sd features", eyes.all_tokens(pixels), g["features"], 2e-5)


def test_mapping_network(mapping) -> None:
    g = mapping
    net = networks(golden.pick(g, "m."))
    with torch.no_grad():
        started = net.conv_start(g["features"], 0)
        close("sd mapping conv_start", started, g["after.conv_start"], 1e-6)
        block = torch.nn.functional.leaky_relu(net.norm(net.conv_block(started, 0), 0))
        close("sd mapping conv_block", block, g["after.conv_block"], 1e-6)
        mapped = net(g["features"], 0)
        close("sd mapping conv_end", mapped, g["after.conv_end"], 1e-6)
        close("sd value_context", value_states(g["context"], mapped, "affine"), g["value_context"], 1e-6)
        close("sd mapping of two", net(g["features_b2"], 0), g["out_b2_separately"], 1e-6)


def test_keys_from_text_values_from_the_picture(root) -> None:
    g = golden.tensors(root / "unet_kv.safetensors")
    twin = golden.twin(128, "golden")
    net = networks(golden.pick(golden.tensors(root / "mapping.safetensors"), "m."))
    with torch.no_grad():
        values = value_states(g["context_k"], net(g["features"], 0), "affine")
        close("sd unet_kv context_v", values, g["context_v"], 1e-6)
        for t in (1, 401, 958):
            when = torch.tensor([t])
            mixed = Conditioning(g["context_k"][None], values[None])
            close("sd noise_kv", twin.predict(g["x"], when, mixed), g[f"noise_kv.t{t}"], 1.5e-5)
