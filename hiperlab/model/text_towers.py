"""The text encoders of one Stable Diffusion side by side: one in SD 1.x and 2.x, two in SDXL.

Their states are joined on width, so that a learnt vector, a state or an embedding is one row (D,) whose parts are the
encoders'. SDXL's U-Net reads the states before the last layer, without a final norm, and beside them one pooled row of
the second encoder (Podell et al. 2023, section 2.1; encode_prompt in diffusers' pipeline_stable_diffusion_xl.py).
Axes: L cross-attention layers, B prompts, N tokens (77), D text width (the encoders' widths together), K occurrences of
placeholders in the batch, P width of the pooled row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hiperlab.model import text as clip
from hiperlab.model.text import Tokens

NAMES = ("text_encoder", "text_encoder_2")  # as diffusers calls them, in folders and in files of weights
POOLED_AT = ("end", "argmax")  # where the pooled row is taken, see `pooled_places`


class TextPart(NamedTuple):
    """How one text encoder's parameters are called, in `module_of` and in the model of its own that files are of.

    Attributes:
        name: as diffusers' folders and files call it.
        within: beginning of its names in `module_of`; "" for a single encoder.
        prefix: beginning of its names in its own model: "text_model." where transformers has that level.
    """

    name: str
    within: str
    prefix: str

    def own(self, name: str) -> str | None:
        """A name in `module_of` as its own model calls it; None where it is another encoder's."""
        if name.startswith("text_projection."):
            return name if self.name == NAMES[-1] else None
        return f"{self.prefix}{name.removeprefix(self.within)}" if name.startswith(self.within) else None


class TextTower(NamedTuple):
    """One text encoder with its tokenizer.

    Attributes:
        tokenizer: CLIP tokenizer; towers of one model have the same words and may pad differently.
        text: CLIP text model, with a `text_projection` if it has a pooled row.
        skip: last layers that the U-Net's states leave out; 0 means none, and the final norm after them.
    """

    tokenizer: Any
    text: nn.Module
    skip: int = 0

    @property
    def table(self) -> Tensor:
        """The token embeddings (words, d) of this encoder."""
        weight: Tensor = clip.inner(self.text).embeddings.token_embedding.weight
        return weight

    @property
    def width(self) -> int:
        """d, the width of its states."""
        return int(self.table.shape[1])


def side_by_side(tokenizers: Sequence[Any], texts: Sequence[nn.Module]) -> list[TextTower]:
    """The towers of a model: of two, SDXL's, the U-Net reads the states before the last layer."""
    skip = 1 if len(texts) > 1 else 0
    return [TextTower(tokenizer, text, skip) for tokenizer, text in zip(tokenizers, texts, strict=True)]


def widths(towers: Sequence[TextTower]) -> list[int]:
    """The width of each encoder; their sum is D."""
    return [tower.width for tower in towers]


def module_of(towers: Sequence[TextTower]) -> nn.Module:
    """The module whose parameter names offsets use: a single encoder's own, of several with `NAMES` in front.

    It holds what the U-Net reads: of SDXL's first encoder not the last layer, which would never get a gradient.
    """
    if len(towers) == 1:
        return clip.inner(towers[0].text)  # type: ignore[no-any-return]
    parts: dict[str, nn.Module] = {name: _without_last(tower) for name, tower in zip(NAMES, towers[:-1], strict=False)}
    last = towers[-1].text
    parts |= {NAMES[-1]: clip.inner(last), "text_projection": last.text_projection}  # type: ignore[dict-item]
    return nn.ModuleDict(parts)


def _without_last(tower: TextTower) -> nn.Module:
    """An encoder's embeddings and the layers that the U-Net reads, the same modules under the same names."""
    whole = clip.inner(tower.text)
    part, part.encoder = nn.Module(), nn.Module()
    part.embeddings, part.encoder.layers = whole.embeddings, nn.ModuleList(list(whole.encoder.layers)[: _read(tower)])
    return part


def parts_of(towers: Sequence[TextTower]) -> list[TextPart]:
    """How the encoders' parameters are called."""
    return [
        TextPart(
            name, f"{name}." if len(towers) > 1 else "", "" if clip.inner(tower.text) is tower.text else "text_model."
        )
        for name, tower in zip(NAMES, towers, strict=False)
    ]


def unread(towers: Sequence[TextTower]) -> tuple[str, ...]:
    """Beginnings of names that files of several encoders have and `module_of` lacks, as nothing reads those layers."""
    found = []
    for name, tower in zip(NAMES, towers[:-1], strict=False):
        count = len(clip.inner(tower.text).encoder.layers)
        found += [f"{name}.encoder.layers.{number}." for number in range(count - tower.skip, count)]
        found.append(f"{name}.final_layer_norm.")
    return tuple(found)


def tokenize(towers: Sequence[TextTower], prompts: Sequence[str], slots: Mapping[str, Sequence[int]]) -> Tokens:
    """Token ids and slots (B, N) of each encoder; see `hiperlab.model.text.tokenize`."""
    first, *others = (clip.tokenize(tower.tokenizer, prompts, slots, warn=tower is towers[0]) for tower in towers)
    return first._replace(further=tuple(others))


def word_embedding(towers: Sequence[TextTower], word: str) -> Tensor:
    """The (D,) input embedding of a single-token word, float32."""
    index = clip.single_token(towers[0].tokenizer, word)
    return torch.cat([tower.table[index].detach().float() for tower in towers])


def hidden_states(towers: Sequence[TextTower], tokens: Tokens, vectors: Tensor | None = None) -> list[Tensor]:
    """Each encoder's states (L, B, N, d) after the layers that the U-Net reads, before the final norm.

    Args:
        towers: the encoders.
        tokens: B prompts.
        vectors: (L, K, D) learnt rows, one per layer (or L = 1) and occurrence; None for none.
    """
    found = []
    parts = [None] * len(towers) if vectors is None else vectors.split(widths(towers), dim=-1)
    for tower, own, part in zip(towers, (tokens, *tokens.further), parts, strict=True):
        rows, positions, _ = own.occurrences()
        states = clip.embed(tower.text, own.ids, part, (rows, positions))
        found.append(clip.transform(tower.text, states, slice(_read(tower))))
    return found


def _read(tower: TextTower) -> int | None:
    """Number of the layers that the U-Net reads, None for all."""
    return -tower.skip or None


def normalise(towers: Sequence[TextTower], states: Tensor) -> Tensor:
    """The encoders' final norms on joined states (..., N, D), same shape; where layers are left out there is none."""
    parts = states.split(widths(towers), dim=-1)
    made = [
        part if tower.skip else clip.final_norm(tower.text, part) for tower, part in zip(towers, parts, strict=True)
    ]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def pooled_places(tokenizer: Any, tokens: Tokens, at: str) -> Tensor:
    """The position (B,) of each prompt's pooled row.

    Args:
        tokenizer: CLIP tokenizer.
        tokens: of that tokenizer, B prompts.
        at: "end": the first end token. "argmax": the row of the largest id, where learnt words are added tokens and
            thus beat the end token; transformers takes it for configurations with `eos_token_id: 2`, as released ones
            are (CLIPTextTransformer.forward; diffusers #10754).
    """
    if at == "argmax":
        added = len(tokenizer) + tokens.slots
        return torch.where(tokens.slots >= 0, added, tokens.ids).argmax(dim=-1)
    ends = (tokens.ids == tokenizer.eos_token_id) & (tokens.slots < 0)  # a slot holds the end token's id, too
    return ends.int().argmax(dim=-1)


def pooled(tower: TextTower, tokens: Tokens, hidden: Tensor, at: str) -> Tensor:
    """The pooled row (B, P) of an encoder: its remaining layers, final norm and projection of one position.

    Args:
        tower: an encoder with a projection.
        tokens: of its tokenizer, B prompts.
        hidden: what `hidden_states` gave for it (1, B, N, d).
        at: see `pooled_places`.
    """
    last = clip.transform(tower.text, hidden, slice(_read(tower), None)) if tower.skip else hidden
    rows = torch.arange(len(tokens.ids), device=hidden.device)
    chosen = clip.final_norm(tower.text, last[0])[rows, pooled_places(tower.tokenizer, tokens, at)]
    projected: Tensor = tower.text.text_projection(chosen)  # type: ignore[operator]
    return projected
