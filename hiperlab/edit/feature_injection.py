"""Plug-and-play injection (Tumanyan et al. 2023): layout from the source's features and attention, looks from a text.

Follows MichalGeyer/pnp-diffusers (pnp_utils.py, register_conv_control_efficient, register_attention_control_efficient).
Axes: R rows of a call, H heads of width d, S image positions.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor

from hiperlab.edit.edits import Edits, Rows, StepControl
from hiperlab.model.attention_control import Control, Layer


class FeatureInjection(Edits):
    """In early steps all rows have the source's residual features in one place, and its attention map in others.

    Args:
        rows: of each call.
        convolution: path of the layer whose output is the source's; the residual block adds its own input behind it.
        layers: paths of the self-attention layers whose queries and keys are the source's; values stay each row's own.
        feature_steps: number of steps with the source's features.
        attention_steps: number of steps with its queries and keys.
        pixels: see `Edits`.
        stores: see `Edits`.
    """

    def __init__(
        self,
        rows: Rows,
        convolution: str,
        layers: Collection[str],
        feature_steps: int,
        attention_steps: int,
        pixels: int,
        stores: bool,
    ) -> None:
        super().__init__(rows, pixels, stores)
        self.convolution, self.layers = convolution, frozenset(layers)
        self.feature_steps, self.attention_steps = feature_steps, attention_steps

    def at(self, step: int) -> Control:
        """The control of the call at sampling step 0 .. T-1."""
        return _AtStep(self, step)


class _AtStep(StepControl):
    """`FeatureInjection` in one call."""

    def __init__(self, edits: FeatureInjection, step: int) -> None:
        super().__init__(edits)
        self.layers = edits.layers if step < edits.attention_steps else frozenset()
        self.convolutions = (edits.convolution,) if step < edits.feature_steps else ()

    def wants(self, layer: Layer, pixels: int) -> bool:
        return layer.name in self.layers or super().wants(layer, pixels)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer.cross:
            return super().attend(layer, query, key, value)
        sources = self.edits.rows.sources
        assert len(query) == len(sources), "a call of other rows"
        return F.scaled_dot_product_attention(query[sources], key[sources], value)

    def outputs(self) -> Collection[str]:
        return self.convolutions

    def output(self, name: str, states: Tensor) -> Tensor:
        return states[self.edits.rows.sources]
