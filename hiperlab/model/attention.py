"""Attention that reads a `Conditioning` and obeys a `Control`: one stateless processor per layer, which owns its index.

A counter inside the conditioning, as in NeTI's models/xti_attention_processor.py, gives equal images but wrong
gradients once gradient checkpointing replays layers, so the index is fixed when the stack is built.
Axes: B rows, S image positions, N tokens, C width of the layer, H heads of width d, D text width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from hiperlab.model.attention_control import Control, Layer, layer_of
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.decoupled_attention import DecoupledAttention


class CrossAttention:
    """Scaled dot-product cross-attention for one layer, with keys and values from different states.

    Args:
        name: the module's path in the U-Net, e.g. "mid_block.attentions.0.transformer_blocks.0.attn2".
        index: the layer's place in execution order, 0 .. L-1.
    """

    def __init__(self, name: str, index: int) -> None:
        self.layer = layer_of(name)
        self.index = index

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Conditioning | Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Attend from image states (B, S, C) to text: (B, S, C).

        Args:
            attn: the layer with its projections.
            hidden_states: image states (B, S, C).
            encoder_hidden_states: what keys and values read; a plain (B, N, D) tensor as in the bare U-Net works too.
            attention_mask: None.
            temb: not read.
            control: reads and changes what the layer attends to, or None.
        """
        assert attention_mask is None, "Stable Diffusion gives its cross-attention no mask"
        detach_first, further = False, None
        if isinstance(encoder_hidden_states, Conditioning):
            for_keys, for_values = encoder_hidden_states.layer(self.index)
            detach_first, further = encoder_hidden_states.detach_first, encoder_hidden_states.decoupled
        else:
            for_keys = for_values = encoder_hidden_states
        keys, values = attn.to_k(for_keys), attn.to_v(for_values)
        if detach_first:
            keys, values = _detach_first(keys), _detach_first(values)
        beside = None if further is None else (further, self.index)
        return _attend(attn, hidden_states, keys, values, self.layer, control, beside)


class SelfAttention:
    """Scaled dot-product self-attention for one layer; the same numbers as diffusers' own without a control.

    Args:
        name: the module's path in the U-Net, e.g. "mid_block.attentions.0.transformer_blocks.0.attn1".
    """

    def __init__(self, name: str) -> None:
        self.layer = layer_of(name)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Attend among image states (B, S, C): (B, S, C); the other arguments as in `CrossAttention`."""
        assert attention_mask is None and encoder_hidden_states is None, "self-attention reads the picture alone"
        keys, values = attn.to_k(hidden_states), attn.to_v(hidden_states)
        return _attend(attn, hidden_states, keys, values, self.layer, control)


def _attend(
    attn: Attention,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: Layer,
    control: Control | None,
    beside: tuple[DecoupledAttention, int] | None = None,
) -> Tensor:
    query = _split(attn.to_q(hidden_states), attn.heads)
    key, value = _split(keys, attn.heads), _split(values, attn.heads)
    if control is not None and control.wants(layer, query.shape[2]):
        attended = control.attend(layer, query, key, value)
    else:
        attended = F.scaled_dot_product_attention(query, key, value)
    if beside is not None:
        attended = attended + _beside(query, attn.heads, *beside)
    merged = attended.transpose(1, 2).flatten(2)
    out = attn.to_out[1](attn.to_out[0](merged))
    return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def _beside(query: Tensor, heads: int, further: DecoupledAttention, index: int) -> Tensor:
    """What further tokens add (B, H, S, d) at a layer, for queries of that shape; no control sees them."""
    key, value = _split(further.keys[index], heads), _split(further.values[index], heads)
    return further.scale.to(query)[:, None, None, None] * F.scaled_dot_product_attention(query, key, value)


def _detach_first(states: Tensor) -> Tensor:
    """The same (B, N, C), with no gradient through token 0.

    As CustomDiffusionAttnProcessor in Custom Diffusion's src/diffusers_model_pipeline.py.
    """
    return torch.cat([states[:, :1].detach(), states[:, 1:]], dim=1)


def _split(states: Tensor, heads: int) -> Tensor:
    """(B, S, H*d) -> (B, H, S, d)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def cross_attention_order(unet: Any) -> list[str]:
    """Paths of the cross-attention modules in the order the forward pass visits them: down, middle, up.

    `unet.attn_processors` and `named_modules()` list the middle block last although it runs between the two; using
    their order would shift ten of the sixteen layers. NeTI's constants.py (UNET_LAYERS) has the order used here.
    """
    rank = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    return sorted(names, key=lambda name: rank[name.split(".")[0]])  # sorted() is stable: inside a block order holds


def install_attention(unet: Any) -> list[str]:
    """Give every attention layer its own processor; returns the cross-attention's paths in execution order."""
    names = cross_attention_order(unet)
    processors = dict(unet.attn_processors)
    for index, name in enumerate(names):
        processors[f"{name}.processor"] = CrossAttention(name, index)
    for key in processors:
        if key.endswith(".attn1.processor"):
            processors[key] = SelfAttention(key.removesuffix(".processor"))
    unet.set_attn_processor(processors)
    return names
