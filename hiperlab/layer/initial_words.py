"""The words that several learnt rows start from, one row per token. Axes: K concepts, V tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiperlab.errors import UserError

MOST = 60  # rows of one word: CLIP reads 77, and the prompt needs some


def token_ids(tokenizer: Any, words: Sequence[str]) -> Tensor:
    """Token ids int64 (K, V) of each concept's initial words, without begin and end; their number decides V.

    Args:
        tokenizer: a CLIP tokenizer.
        words: one text of any number of words per concept.

    Raises:
        UserError: words have no tokens, more than 60, or not as many as another concept's.
    """
    ids = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in words]
    counts = [len(each) for each in ids]
    if not all(1 <= count <= MOST for count in counts) or len(set(counts)) > 1:
        found = ", ".join(f"{word!r} {count}" for word, count in zip(words, counts, strict=True))
        raise UserError(
            f"initial words have {found} tokens: one run needs the same number, 1 to {MOST}, for all of its concepts. "
            "Set method.initializer, or train them apart."
        )
    return torch.tensor(ids)
