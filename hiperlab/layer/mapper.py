"""NeTI's mapper: (timestep, layer) -> vectors, one set of weights per concept.

As NeTIMapper in the authors' models/neti_mapper.py; the architecture is drawn in Alaluf et al. 2023, fig. 3.
Axes: K concepts, n pairs (t, l), U hidden units (128), F frequencies, O outputs (2D with bypass, else D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab.errors import UserError
from hiperlab.layer import fourier
from hiperlab.layer.nested_dropout import keep_first
from hiperlab.layer.per_concept import StackedLayerNorm, StackedLinear

HIDDEN = 128  # the authors' constants, models/neti_mapper.py
NUM_W = 1024


class Mapper(nn.Module):
    """Fourier code -> anchors layer -> two hidden layers -> output; names as in the authors' state dict.

    Args:
        num_concepts: K.
        outputs: O.
        num_layers: L, cross-attention layers (16).
        num_timesteps: T (1000).
        seed: of the initialisation.
        positional_encoding: False for the variant that reads (t, l) scaled to [-1, 1].
        sigma_t: deviation of the time frequencies.
        sigma_l: deviation of the layer frequencies.
        num_time_anchors: time anchors of the first layer; must divide T.

    Raises:
        UserError: num_time_anchors does not divide T.
    """

    w: Tensor

    def __init__(
        self,
        num_concepts: int,
        outputs: int,
        *,
        num_layers: int,
        num_timesteps: int,
        seed: int,
        positional_encoding: bool,
        sigma_t: float,
        sigma_l: float,
        num_time_anchors: int,
    ) -> None:
        super().__init__()
        if num_time_anchors < 1 or num_timesteps % num_time_anchors:
            raise UserError(f"num_time_anchors={num_time_anchors} must divide {num_timesteps}. Choose 8, 10 or 20.")
        self.outputs, self.num_layers, self.num_timesteps = outputs, num_layers, num_timesteps
        self.positional_encoding = positional_encoding

        def linear(inputs: int, outputs: int, name: str) -> StackedLinear:
            return StackedLinear(num_concepts, inputs, outputs, seed=seed, purpose=f"neti/{name}")

        inputs = 2
        if positional_encoding:
            w = fourier.frequencies(seed, NUM_W, sigma_t, sigma_l)
            self.register_buffer("w", w.repeat(num_concepts, 1, 1))  # frozen; kept with the concept
            codes = fourier.anchors(w, num_time_anchors, num_layers, num_timesteps)
            inputs = len(codes)
            self.input_layer = linear(2 * NUM_W, inputs, "input_layer")
            with torch.no_grad():  # only a start value: this layer is trained like the rest
                self.input_layer.weight.copy_(codes.expand(num_concepts, -1, -1))
        self.net = nn.ModuleDict(
            {
                "1": linear(inputs, HIDDEN, "net.1"),
                "2": StackedLayerNorm(num_concepts, HIDDEN),
                "4": linear(HIDDEN, HIDDEN, "net.4"),
                "5": StackedLayerNorm(num_concepts, HIDDEN),
            }
        )
        self.output_layer = nn.ModuleDict({"0": linear(HIDDEN, outputs, "output_layer.0")})

    def encode(self, t: Tensor, layer: Tensor, concept: int) -> Tensor:
        """The code of pairs (t, l), both (n,): (n, 2F), or (n, 2) without positional encoding.

        Args:
            t: timesteps in [0, 1000), (n,).
            layer: cross-attention layers in [0, L), (n,).
            concept: whose frequencies.
        """
        if self.positional_encoding:
            return fourier.encode(t, layer, self.w[concept])
        return fourier.normalised_pair(t, layer, self.num_timesteps, self.num_layers)

    def hidden(self, t: Tensor, layer: Tensor, concept: int) -> Tensor:
        """h2 (n, U), before nested dropout."""
        x = self.encode(t, layer, concept)
        if self.positional_encoding:
            x = self.input_layer(x, concept)
        for linear, norm in (("1", "2"), ("4", "5")):
            x = F.leaky_relu(self.net[norm](self.net[linear](x, concept), concept))
        return x

    def forward(self, t: Tensor, layer: Tensor, concept: int, keep: Tensor | None) -> Tensor:
        """O (n, O): the raw output, before rescaling.

        Args:
            t: (n,) timesteps in [0, 1000).
            layer: (n,) cross-attention layers in [0, L).
            concept: whose weights.
            keep: (n,) units to keep (nested dropout or truncation); None keeps all.
        """
        hidden = self.hidden(t, layer, concept)
        return self.output_layer["0"](hidden if keep is None else keep_first(hidden, keep), concept)
