"""Recorded training prompts as texts, for methods whose placeholder stands for several tokens in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def texts(tokenizer: Any, ids: Tensor, placeholder_ids: Sequence[int], placeholder: str) -> list[str]:
    """The prompts whose tokens `ids` (R, N) are, decoded run by run: words of several tokens stay whole."""
    return [_text(tokenizer, row.tolist(), list(placeholder_ids), placeholder) for row in ids]


def filled(method: Any, prompts: Sequence[str], placeholder_ids: Sequence[int]) -> Tensor:
    """What the method tokenizes, (R, N), with the authors' ids in its slots."""
    tokens = method.model.tokenize(prompts, method.slots)
    ids = tokens.ids.clone()
    rows, positions, slots = tokens.occurrences()
    ids[rows, positions] = slots + placeholder_ids[0]
    return ids


def _text(tokenizer: Any, row: list[int], placeholder_ids: list[int], placeholder: str) -> str:
    def plain(tokens: list[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(tokens)).replace("</w>", " ").strip()

    parts: list[str] = []
    words: list[int] = []
    for token in row[1 : row.index(tokenizer.eos_token_id)]:
        if token not in placeholder_ids:
            words.append(token)
        elif token == placeholder_ids[0]:
            parts.append(plain(words))
            words = []
    return f" {placeholder} ".join([*parts, plain(words)]).strip()
