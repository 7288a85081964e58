"""E4T's parts against the numbers of the public reimplementation. Items are named as in golden/e4t/README.md.

Limits are ten times what the specification measured (its section 22).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import CLIPVisionConfig, CLIPVisionModel

from hiperlab.formats.open_clip import to_open_clip, to_transformers
from hiperlab.layer.image_encoder import LayerHead, PatchHead, pool
from hiperlab.layer.weight_offset import WeightOffset
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.first_half import FirstHalf
from hiperlab.model.multiplied import Multiplied
from hiperlab.model.offsets import Offsets
from hiperlab.model.vision import VisionTower, preprocess
from tests.parity import golden

close = golden.close


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("e4t")


@pytest.fixture(scope="module")
def twin():
    return golden.twin(128, "golden")


def offsets(root: Path) -> dict[str, WeightOffset]:
    """The initial offsets, by the projection's name in the U-Net."""
    state = golden.tensors(root / "init_weight_offsets.safetensors")
    names = sorted({name.rsplit(".wo_", 1)[0] + ".to_" + name.rsplit(".wo_", 1)[1][0] for name in state})
    made = {}
    for name in names:
        own = golden.pick(state, f"{name[: -len('to_q')]}wo_{name[-1]}.")
        made[name] = WeightOffset(len(own["linear1.bias"]), len(own["linear2.bias"]))
        made[name].load_state_dict(own)
    return made


def changes(made: dict[str, WeightOffset]) -> Offsets:
    return Offsets({f"{name}.weight": Multiplied(*offset()) for name, offset in made.items()})


@pytest.mark.parametrize("which", ["square", "wide"])
def test_one_offset(root, which) -> None:
    g = golden.pick(golden.tensors(root / "a_weight_offsets.safetensors"), f"{which}.")
    outputs, inputs = g["base_weight"].shape
    offset = WeightOffset(inputs, outputs)
    offset.load_state_dict(golden.pick(g, "param."))
    left, right = offset()
    close("e4t delta", left @ right.T, g["delta"], 3e-6)
    weight = Multiplied(left, right).apply(g["base_weight"])
    close("e4t effective_weight", weight, g["effective_weight"], 3e-6)
    loss = F.mse_loss(g["x"] @ weight.T, g["y"])
    close("e4t offset loss", loss, g["loss"], 3e-6)
    loss.backward()
    for name, parameter in offset.named_parameters():
        close("e4t offset grad", parameter.grad, g[f"grad.{name}"], 3e-6)  # type: ignore[arg-type]


def test_unet_with_offsets_and_its_first_half(root, twin) -> None:
    g = golden.tensors(root / "b_unet.safetensors")
    made = offsets(root)
    assert len(made) == 96
    with torch.no_grad():
        changed = changes(made)
        weights = changed.weights(twin.unet)
        for name, value in golden.pick(g, "merged.").items():
            close("e4t merged", weights[name], value, 3e-6)
        states = Conditioning(g["encoder_hidden_states"][None])
        close("e4t noise_pred_without_offsets", twin.predict(g["sample"], g["timesteps"], states),
              g["noise_pred_without_offsets"], 1e-5)  # fmt: skip
        with_offsets = Conditioning(states.keys, offsets=changed)
        close("e4t noise_pred", twin.predict(g["sample"], g["timesteps"], with_offsets), g["noise_pred"], 1e-5)
        half = FirstHalf(twin.unet)
        named = {f"unet.{name}": weight for name, weight in weights.items()}
        maps = functional_call(half, named, (g["sample"], g["timesteps"], states))
    wanted = golden.pick(g, "feature.")
    assert len(maps) == len(wanted) == 13
    for number, found in enumerate(maps):
        close("e4t features", found, wanted[f"{number:02d}"], 1.5e-5)


def tower(state: dict[str, Tensor], size: int, activation: str) -> VisionTower:
    """A tower from transformers' names."""
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=size, patch_size=patch, hidden_act=activation,
    )  # fmt: skip
    network = CLIPVisionModel(config).eval()
    prefix = "vision_model." if next(iter(network.state_dict())).startswith("vision_model.") else ""
    network.load_state_dict({f"{prefix}{name}": value for name, value in state.items()}, strict=True)
    return VisionTower(network, size)


def test_the_reimplementations_encoder(root) -> None:
    g, maps = (golden.tensors(root / f"{name}.safetensors") for name in ("c_encoder", "b_unet"))
    state = golden.tensors(root / "init_encoder.safetensors")
    small = preprocess(g["image"], 224)
    close("e4t preprocessed_image", small[0][:, 80:144, 80:144], g["preprocessed_image_0_crop"], 1e-6)
    close("e4t preprocessed sums", small.double().sum((2, 3)), g["preprocessed_image_sums"], 1e-6)
    theirs = golden.pick(state, "clip_vision.")
    renamed = to_transformers(theirs)
    back = to_open_clip(renamed)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    seen = tower(renamed, 224, "gelu")(g["image"])
    close("e4t clip_pooled", seen.pooled, g["clip_pooled"], 5e-6)
    close("e4t clip_tokens", seen.tokens, g["clip_tokens"], 5e-6)
    pooled = pool([maps[f"feature.{number:02d}"] for number in range(13)])
    close("e4t unet_pooled", pooled, g["unet_pooled"], 1e-6)
    head = PatchHead(32, 16, 129, 608)
    own = {name: value for name, value in state.items() if not name.startswith(("clip_vision.", "first_linears."))}
    for part in ("weight", "bias"):
        own[f"first_{part}"] = torch.stack([state[f"first_linears.{number}.{part}"] for number in range(129)])
    head.load_state_dict(own)
    close("e4t unet_embedded", head.unet_feature_embedder(pooled), g["unet_embedded"], 5e-6)
    close("e4t embedding", head(seen.pooled, seen.tokens, pooled), g["embedding"], 5e-6)


def test_the_papers_encoder(root) -> None:
    g = golden.tensors(root / "c2_encoder_paper.safetensors")
    settings = golden.config(root / "meta.json")["c2_vision_config"]
    seen = tower(golden.pick(g, "state.clip_vision.vision_model."), settings["image_size"], settings["hidden_act"])(
        g["image"]
    )
    assert seen.classes.shape == (2, settings["num_hidden_layers"] // 2, 16)
    head = LayerHead(32, 16, 192)
    own = {name: value for name, value in golden.pick(g, "state.").items() if not name.startswith("clip_vision.")}
    head.load_state_dict({name.replace("linear.", "vision_linear.", 1) if name.startswith("linear.") else name: value
                          for name, value in own.items()})  # fmt: skip
    features = pool([g[f"feature.{number}"] for number in range(4)])
    close("e4t c2 embedding", head(seen.classes, features), g["embedding"], 5e-6)
