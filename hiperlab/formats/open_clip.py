"""OpenCLIP's vision towers as transformers' CLIPVisionModel: the same function under other names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hiperlab.errors import UserError

PLAIN = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    **{f"ln_pre.{kind}": f"pre_layrnorm.{kind}" for kind in ("weight", "bias")},  # sic, transformers' spelling
    **{f"ln_post.{kind}": f"post_layernorm.{kind}" for kind in ("weight", "bias")},
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a tower's tensors and split its joint query-key-value projections (3D, D) into three (D, D).

    Args:
        state: OpenCLIP's visual tower without its projection: `conv1.weight`, `transformer.resblocks.0. ...`, ...

    Raises:
        UserError: a name or a shape that such a tower does not have.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in PLAIN:
            found[PLAIN[name]] = value
            continue
        head, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
        part, _, kind = rest.rpartition(".")
        if not head.isdigit():
            raise UserError(f"{name} is no tensor of an OpenCLIP vision tower.")
        layer = f"encoder.layers.{head}."
        if rest.startswith("attn.in_proj_"):
            if not value.dim() or len(value) % 3:
                raise UserError(f"{name} is {list(value.shape)}, expected queries, keys and values of one size.")
            for which, chunk in zip("qkv", value.chunk(3), strict=True):
                found[f"{layer}self_attn.{which}_proj.{rest.removeprefix('attn.in_proj_')}"] = chunk
        elif part in BLOCK:
            found[f"{layer}{BLOCK[part]}.{kind}"] = value
        else:
            raise UserError(f"{name} is no tensor of an OpenCLIP vision tower.")
    return found


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: transformers' names -> OpenCLIP's, of any shape."""
    plain = {theirs: ours for ours, theirs in PLAIN.items()}
    block = {theirs: ours for ours, theirs in BLOCK.items()}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in plain:
            found[plain[name]] = value
            continue
        _, _, number, rest = name.split(".", 3)
        part, _, kind = rest.rpartition(".")
        layer = f"transformer.resblocks.{number}."
        if part in block:
            found[f"{layer}{block[part]}.{kind}"] = value
        elif part == "self_attn.q_proj":
            parts = [state[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"]
            found[f"{layer}attn.in_proj_{kind}"] = torch.cat(parts)
    return found
