"""Files of cloneofsimo/lora, the first LoRA trainer for Stable Diffusion: pairs by number, layers without names.

Layers are counted as its lora_diffusion/lora.py (`_find_modules`) walked the networks of diffusers in 2022 and 2023:
the linear layers of every attention and of every GEGLU, of every `CLIPAttention` in the text model. Its offset is
B A, without alpha.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hiperlab.errors import UserError

NUMBERED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
# One Transformer2DModel of SD 1 and 2 each, the mid block last, as the U-Net registers them.
BLOCKS = (
    *(f"down_blocks.{block}.attentions.{number}" for block in range(3) for number in range(2)),
    *(f"up_blocks.{block}.attentions.{number}" for block in range(1, 4) for number in range(3)),
    "mid_block.attentions.0",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")  # in the order of transformers' CLIPAttention
FEED_FORWARD = "ff.net.0.proj"

Pair = tuple[Tensor, Tensor]  # (up, down)


def is_theirs(content: Any) -> bool:
    """Whether a file's content is of this kind: `up, down, up, down, ...`, or tensors called "unet:0:up"."""
    if isinstance(content, list):
        return bool(content) and all(isinstance(value, Tensor) for value in content)
    return isinstance(content, Mapping) and any(NUMBERED.fullmatch(str(key)) for key in content)


def named(name: str, content: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matrices by PEFT's names ("unet.<layer>.lora_A.weight"), and learnt words, each (V, D).

    Args:
        name: the file's, for messages; "x.text_encoder.pt" holds the text model's.
        content: what `is_theirs`.

    Raises:
        UserError: a number of pairs that no layers of SD 1 or 2 have.
    """
    words: dict[str, Tensor] = {}
    pairs: dict[str, dict[int, dict[str, Tensor]]] = {}
    if isinstance(content, list):
        part = "text_encoder" if ".text_encoder." in name else "unet"
        pairs[part] = {
            number: {"up": content[2 * number], "down": content[2 * number + 1]} for number in range(len(content) // 2)
        }
    else:
        for key, value in content.items():
            if match := NUMBERED.fullmatch(str(key)):
                pairs.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value
            else:
                words[str(key)] = value.reshape(-1, value.shape[-1])
    found: dict[str, Tensor] = {}
    for part, numbered in pairs.items():
        whole = sorted(numbered) == list(range(len(numbered))) and all(len(both) == 2 for both in numbered.values())
        if not whole or (isinstance(content, list) and len(content) % 2):
            raise UserError(f"{name} is damaged: a matrix of {part} lacks its other half.")
        rows = [(both["up"], both["down"]) for _, both in sorted(numbered.items())]
        layers = _text_layers(len(rows)) if part == "text_encoder" else _unet_layers(rows)
        if layers is None:
            raise UserError(
                f"{name} has {len(rows)} pairs of matrices for {part}: no layers of Stable Diffusion 1 or 2 are that "
                "many. It is for another model, or holds convolutions, which are not read."
            )
        for layer, (up, down) in zip(layers, rows, strict=True):
            found |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    return found, words


def _text_layers(count: int) -> list[str] | None:
    if count % len(TEXT):
        return None
    return [f"encoder.layers.{number}.self_attn.{name}" for number in range(count // len(TEXT)) for name in TEXT]


def _unet_layers(rows: Sequence[Pair]) -> list[str] | None:
    """Names of the pairs; diffusers moved the feed-forward layer from the second place in a block to the third."""
    each = len(rows) // len(BLOCKS)
    if each * len(BLOCKS) != len(rows) or each not in (8, 9):
        return None
    names = []
    for number, block in enumerate(BLOCKS):
        mine = rows[number * each : (number + 1) * each]
        attentions = [f"attn{which}.{name}" for which in (1, 2) for name in ATTENTION]
        if each == 9:
            attentions.insert(4 if _is_geglu(mine[4]) else 8, FEED_FORWARD)
        names += [f"{block}.transformer_blocks.0.{name}" for name in attentions]
    return names


def _is_geglu(pair: Pair) -> bool:
    """Whether a layer widens its input eight times, as only GEGLU's does."""
    up, down = pair
    return up.shape[0] == 8 * down.shape[1]
