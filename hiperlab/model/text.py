"""From prompts to text states: tokens with placeholders, embeddings with learnt rows, the CLIP text transformer.

Here one text encoder at a time; `hiperlab.model.text_towers` reads several side by side.
Axes: L cross-attention layers, B prompts, N tokens (77), D text width, K occurrences of placeholders in the batch.
Placeholders are slots, not new tokens: neither the tokenizer nor the embedding matrix is ever changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hiperlab.errors import UserError

log = logging.getLogger(__name__)
ALL = slice(None)  # layers of a text encoder


class Tokens(NamedTuple):
    """Token ids and where learnt vectors go.

    Args:
        ids: (B, N) int64; a slot holds the end token here, which the learnt vector then replaces.
        slots: (B, N) int64; -1 for ordinary tokens, else the number of the learnt vector.
        further: the same prompts as the further text encoders' tokenizers cut them; none for one encoder. Their slots
            are the same ones in the same order, not always at the same positions.
    """

    ids: Tensor
    slots: Tensor
    further: tuple[Tokens, ...] = ()

    def occurrences(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, positions, slots), each (K,), of every slot in the batch, row by row."""
        rows, positions = torch.nonzero(self.slots >= 0, as_tuple=True)
        return rows, positions, self.slots[rows, positions]


def check_placeholder(tokenizer: Any, placeholder: str) -> None:
    """Refuse a placeholder that CLIP already reads as a word of its own.

    Raises:
        UserError: it is empty, has blanks or braces, or is in the vocabulary (transformers 5 no longer reports this).
    """
    if not placeholder or re.search(r"[\s{}]", placeholder):
        raise UserError(f"placeholder={placeholder!r} must be one word without blanks or braces. Try <my-cat>.")
    vocabulary = tokenizer.get_vocab()
    if placeholder.lower() in vocabulary or f"{placeholder.lower()}</w>" in vocabulary:
        raise UserError(f"placeholder={placeholder!r} is already a word of the tokenizer. Try <{placeholder}>.")


def check_identifier(tokenizer: Any, word: str) -> str:
    """The word itself, with a note where CLIP splits it: pieces have meanings of their own, one rare token has none."""
    if len(ids := tokenizer(word, add_special_tokens=False)["input_ids"]) > 1:
        pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
        log.info("method.identifier=%s is %d tokens here: %s. One rare token is best.", word, len(ids), pieces)
    return word


def single_token(tokenizer: Any, word: str) -> int:
    """Id of a class noun that must be one token; of several words the last, the head of the phrase, is taken.

    Raises:
        UserError: the noun splits into several tokens; the message shows them.
    """
    head = word.split()[-1] if word.split() else word
    if head != word:
        log.warning("class noun %r has several words: %r is what its embedding is taken from.", word, head)
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise UserError(
            f"word={word!r} is {len(ids)} tokens {pieces}, but one is needed to start from and to borrow the norm of. "
            "Choose a coarser single word, e.g. cat, dog, toy, object."
        )
    return int(ids[0])


def tokenize(tokenizer: Any, prompts: Sequence[str], slots: Mapping[str, Sequence[int]], warn: bool = True) -> Tokens:
    """Tokenize prompts; each placeholder becomes its slots (several for a concept of several vectors).

    Text around a placeholder is tokenized piece by piece, exactly as an added token would split it.

    Args:
        tokenizer: a CLIP tokenizer; its `model_max_length` (77) and padding token are used.
        prompts: B texts.
        slots: placeholder -> the slot numbers that stand in its place.
        warn: whether to say which words of a prompt are cut; a second tokenizer need not say so again.

    Raises:
        UserError: a placeholder falls beyond the last token. A prompt that only loses ordinary words is warned about.
    """
    length = int(tokenizer.model_max_length)
    pattern = "|".join(re.escape(p) for p in sorted(slots, key=len, reverse=True))
    ids = torch.full((len(prompts), length), int(tokenizer.pad_token_id))
    places = torch.full((len(prompts), length), -1)
    for row, prompt in enumerate(prompts):
        row_ids, row_slots = _pieces(tokenizer, prompt, slots, pattern)
        if len(row_ids) > length - 2:
            _report_cut(tokenizer, prompt, row_ids[length - 2 :], row_slots[length - 2 :], length, warn)
            row_ids, row_slots = row_ids[: length - 2], row_slots[: length - 2]
        count = len(row_ids)
        ids[row, 0] = tokenizer.bos_token_id
        ids[row, 1 : count + 1] = torch.tensor(row_ids, dtype=torch.long)
        places[row, 1 : count + 1] = torch.tensor(row_slots, dtype=torch.long)
        ids[row, count + 1] = tokenizer.eos_token_id
    return Tokens(ids, places)


def _pieces(tokenizer: Any, prompt: str, slots: Mapping[str, Sequence[int]], pattern: str) -> tuple[list, list]:
    ids: list[int] = []
    places: list[int] = []
    for piece in re.split(f"({pattern})", prompt) if pattern else [prompt]:
        if piece in slots:
            ids += [tokenizer.eos_token_id] * len(slots[piece])
            places += list(slots[piece])
        elif piece.strip():
            words = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += words
            places += [-1] * len(words)
    return ids, places


def _report_cut(tokenizer: Any, prompt: str, ids: list, slots: list, length: int, warn: bool) -> None:
    if any(slot >= 0 for slot in slots):
        raise UserError(
            f"prompt {prompt[:60]!r}… needs more than the {length} tokens CLIP reads and its placeholder falls off. "
            "Shorten it or move the placeholder to the front."
        )
    cut = tokenizer.decode(ids)
    level = logging.WARNING if warn else logging.DEBUG
    log.log(level, "prompt %r… is cut to %d tokens; not read: %r", prompt[:40], length, cut)


def inner(text: nn.Module) -> Any:
    """The module that holds `embeddings`, `encoder` and `final_layer_norm` (transformers before and after 5.6)."""
    return getattr(text, "text_model", text)


def embed(text: nn.Module, ids: Tensor, vectors: Tensor | None = None, places: tuple | None = None) -> Tensor:
    """Token plus position embeddings with learnt vectors put in.

    Args:
        text: the CLIP text model.
        ids: (B, N).
        vectors: (L, K, D) learnt rows, one per layer (or L = 1) and occurrence.
        places: (rows, positions), each (K,): where the K occurrences stand.

    Returns:
        (L, B, N, D); L is 1 without vectors.
    """
    embeddings = inner(text).embeddings
    tokens = embeddings.token_embedding(ids)[None]
    if vectors is not None and places is not None:
        tokens = tokens.expand(vectors.shape[0], -1, -1, -1)
        layer = torch.arange(vectors.shape[0], device=ids.device)[:, None]
        tokens = tokens.index_put((layer, places[0][None], places[1][None]), vectors.to(tokens.dtype))
    return tokens + embeddings.position_embedding.weight[: ids.shape[1]]


def transform(text: nn.Module, states: Tensor, part: slice = ALL) -> Tensor:
    """Run the causal CLIP transformer on embeddings (..., N, D); the result, same shape, is BEFORE the final norm.

    There is no padding mask: in Stable Diffusion the padding reads the prompt, and the U-Net reads the padding.
    Written on the modules' own projections because no version of transformers takes embeddings in the same way.

    Args:
        text: the CLIP text model.
        states: embeddings, or what the layers before `part` gave.
        part: which of its layers; SDXL reads the states before the last one.
    """
    shape = states.shape
    states = states.flatten(0, -3)
    for layer in list(inner(text).encoder.layers)[part]:
        attention = layer.self_attn
        normed = layer.layer_norm1(states)
        query, key, value = (
            projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + attention.out_proj(attended.transpose(1, 2).flatten(2))
        states = states + layer.mlp(layer.layer_norm2(states))
    return states.reshape(shape)


def final_norm(text: nn.Module, states: Tensor) -> Tensor:
    """CLIP's final layer norm, applied to (..., N, D): same shape."""
    return inner(text).final_layer_norm(states)


class _Holder(nn.Module):
    """Holds a module while a piece of work uses it with other weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def with_weights(module: nn.Module, weights: Mapping[str, Tensor], work: Callable[[], Any]) -> Any:
    """The result of `work`, during which `module` has other weights; afterwards it has its own again.

    Args:
        module: any, such as `FrozenStack.text_module`.
        weights: by their names in it, same shape as its own.
        work: what to do.
    """
    return functional_call(_Holder(module), {f"module.{name}": weight for name, weight in weights.items()}, (work,))


def numbered_slots(placeholders: Sequence[str], num_vectors: int = 1) -> dict[str, list[int]]:
    """Slot numbers when each placeholder stands for `num_vectors` learnt vectors: concept-major, from 0."""
    return {word: list(range(i * num_vectors, (i + 1) * num_vectors)) for i, word in enumerate(placeholders)}
