"""IP-Adapter (Ye et al. 2023): a picture as prompt, by weights that others trained once; nothing is trained here.

Follows the authors' ip_adapter/ip_adapter.py (tencent-ailab/IP-Adapter): IPAdapter for "base" files, IPAdapterPlus for
"plus" ones, which the file itself tells apart.
Symbols: T (tokens of the picture), s (scale).
Axes: K concepts (always 1 here), R rows, N text tokens, M picture tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab import files
from hiperlab.base.capability import ReadsPicture
from hiperlab.base.method import Method, Step, Subject
from hiperlab.base.variants import value_of, variants_of
from hiperlab.errors import UserError
from hiperlab.formats import ip_adapter as formats
from hiperlab.model import vision_loader as towers
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.decoupled_attention import DecoupledAttention, projected
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_cache import TextCache
from hiperlab.model.vision_tower import VisionTower, clip_pixels

log = logging.getLogger(__name__)


class IPAdapter(Method, ReadsPicture):
    """The concept's first picture as M more tokens for every text; the placeholder is its class noun.

    Each cross-attention layer adds s times what it attends to among them, with keys and values of their own. Kept is
    what the picture encoder sees, so that a concept is drawn with any adapter of the same kind.

    Args:
        model: the frozen stack.
        concepts: what the picture shows.
        optimizer: unused, nothing is trained.
        seed: unused.
        weights: the adapter's file, `.bin` or `.safetensors`; None for a random one, on a model that is random, too.
        image_encoder: folder or hub id of the picture encoder it was trained with.
        scale: s; several draw one picture for each, the first is the plain one. 0 is the text alone.

    Raises:
        UserError: no file or encoder is named, or they do not fit the model or one another.
    """

    stacks_concepts = False
    why_no_early_stop = "this method trains nothing"
    sampling_settings = ("weights", "scale")

    features: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        weights: str | None,
        image_encoder: str | None,
        scale: Sequence[float],
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        if not scale or min(scale) < 0:
            raise UserError(f"method.scale={list(scale)}: give one number or several, 0 or more, e.g. [0.5].")
        self.scale = float(scale[0])
        self.variants = variants_of("scale", scale)
        self.encode = TextCache(model)
        self._tower: list[VisionTower] = []  # not a module of this one: it is frozen, and large
        self._adapter, self._encoder = self._found(weights, image_encoder)
        self._picture: Tensor | None = None
        self.register_buffer("features", torch.zeros(1, 2, 0))  # (K, 2, …): what is seen of the picture, and of none

    def _found(self, weights: str | None, image_encoder: str | None) -> tuple[formats.Adapter, str | None]:
        """The adapter, and where its picture encoder is; both random where the model is."""
        unet, layers = self.model.unet, self.model.cross_attention
        if weights is None and not self.model.trained:
            log.warning("method.weights is null: the adapter is random, as model=%s is.", self.model.name)
            tower = towers.tiny_tower(0, projection=True)
            self._tower.append(tower)
            return formats.random_adapter(0, unet, layers, tower.width, self.model.width), None
        if weights is None:
            raise UserError(
                f"method.weights is null: IP-Adapter draws with weights that others trained, {self.model.name} brings "
                "none. Give method.weights=<ip-adapter_sd15.safetensors> for SD 1.x; there are none for the miniature."
            )
        if image_encoder is None:
            raise UserError(
                "method.image_encoder is null: give the folder of the picture encoder that the adapter was trained "
                "with (models/image_encoder of the published weights)."
            )
        adapter = formats.read(files.expand(weights), layers, unet)
        if adapter.width != self.model.width:
            widths = f"tokens of width {adapter.width}, {self.model.name} reads {self.model.width}"
            raise UserError(f"{weights} gives {widths}. Load the base model it was made for.")
        return adapter, image_encoder

    # ---- the picture -------------------------------------------------------------------------------------------------

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Take the picture (3, H, H) in [-1, 1]; the encoder sees it when that is first needed."""
        self._picture = picture.detach().cpu().float()
        self.features = self.features.new_zeros(1, 2, 0)

    @torch.no_grad()
    def _see(self) -> None:
        """Fill `features`: CLIP's embedding and zeros, or its last but one layer of the picture and of the mean colour.

        Raises:
            UserError: there is no picture, or the encoder is another than the adapter's.
        """
        if self.features.shape[2]:
            return
        if self._picture is None:
            raise UserError("IP-Adapter has no picture: call set_reference(0, picture), or load an artifact.")
        if not self._tower:
            assert self._encoder is not None, "refused at the door"
            self._tower.append(towers.load(self._encoder, "method.image_encoder", projection=True))
        tower = self._tower[0].to(self.features.device).eval().requires_grad_(False)
        pixels = clip_pixels(self._picture[None], tower.size, tower.mean, tower.std).to(self.features.device)
        if self._adapter.kind == "base":
            seen = tower.projected(pixels)
            empty = torch.zeros_like(seen)
        else:
            seen, empty = tower.last_but_one(pixels), tower.last_but_one(torch.zeros_like(pixels))
        if seen.shape[-1] != self._adapter.features:
            raise UserError(
                f"method.image_encoder gives {seen.shape[-1]} features, the adapter reads {self._adapter.features}: "
                "name the encoder it was trained with."
            )
        self.features = torch.cat([seen, empty])[None].to(self.features)

    @torch.no_grad()
    def tokens(self) -> Tensor:
        """T of the picture and of none, (2, M, D), float32."""
        self._see()
        tokens: Tensor = self._adapter.prompt.to(self.features.device)(self.features[0].float())
        return tokens

    def _beside(self, picture: bool, rows: int, variant: str) -> DecoupledAttention:
        """The tokens of the picture, or of none, for R rows."""
        scale = value_of(variant, self.scale)
        tokens = self.tokens()[0 if picture else 1].expand(rows, -1, -1)
        weights = [(key.to(tokens), value.to(tokens)) for key, value in self._adapter.weights]
        return projected(tokens, weights, tokens.new_full((rows,), scale))

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def condition(self, step: Step) -> Conditioning:
        """The texts with the class noun (1, R, N, D), and the picture beside them."""
        texts = [self.concepts[0].with_class_noun(prompt) for prompt in step.prompts]
        return replace(self.encode.condition(texts), decoupled=self._beside(True, len(texts), step.variant))

    def negative_condition(self, text: str, variant: str, concepts: Sequence[int]) -> Conditioning:
        """The negative text (1, 1, N, D), and beside it the tokens of no picture, which are not zeros."""
        return replace(self.encode.condition([text]), decoupled=self._beside(False, 1, variant))

    @property
    def finished(self) -> bool:
        """There is nothing to train."""
        return True

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """`features` (1, 2, …), seen by now."""
        self._see()
        return super().trainable_state()

    def load_artifact(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Take the features that `artifact` gave; no encoder is needed then.

        Raises:
            UserError: they are not what this adapter reads.
        """
        found = tensors.get("features")
        dims = 2 if self._adapter.kind == "base" else 3
        kind, width = self._adapter.kind, self._adapter.features
        if tensors.keys() != {"features"} or found is None or found.dim() != dims or len(found) != 2:
            raise UserError(f"the artifact does not fit IPAdapter with a {kind} adapter: its features are another's.")
        if found.shape[-1] != width:
            raise UserError(
                f"the artifact does not fit IPAdapter: its picture encoder gives {found.shape[-1]} features, the "
                f"adapter reads {width}."
            )
        self.features = found[None].to(self.features)
