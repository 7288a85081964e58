"""Which tokens a word became, and how the tokens of one prompt lie on another's (Prompt-to-Prompt, Hertz et al. 2022).

As the authors' seq_aligner.py and ptp_utils.py (google/prompt-to-prompt); equal to their tables where those are right.
Axes: N tokens CLIP reads (77). Words are what single spaces part: "dog," is another word than "dog".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hiperlab.errors import UserError, near

Window = float | Sequence[float]  # a share of the steps: tau means (0, tau)


def words(prompt: str) -> list[str]:
    """The prompt's words."""
    return prompt.split(" ")


def word_tokens(prompt: str, tokenizer: Any) -> list[list[int]]:
    """Token positions of every word; 0 is the start token (ptp_utils.py, get_word_inds).

    Raises:
        UserError: the words cannot be followed through the tokens, or there are more tokens than CLIP reads.
    """
    ids = encode(prompt, tokenizer)[1:-1]
    if "#" in prompt or "" in words(prompt):
        raise UserError(f"prompt {prompt!r}: words are not found in texts with '#' or blanks in a row. Leave them out.")
    found: list[list[int]] = [[] for _ in words(prompt)]
    word, length = 0, 0
    for position, index in enumerate(ids):
        if word < len(found):
            found[word].append(position + 1)
            length += len(tokenizer.decode([index]).strip("#"))
            if length >= len(words(prompt)[word]):
                word, length = word + 1, 0
    if word != len(found):
        raise UserError(f"prompt {prompt!r}: its tokens do not spell {words(prompt)[word]!r}. Use plain letters.")
    return found


def encode(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids with start and end.

    Raises:
        UserError: more tokens than CLIP reads, of which the last would have no attention map.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if len(ids) > tokenizer.model_max_length:
        raise UserError(
            f"prompt {prompt[:60]!r}… is {len(ids)} tokens long, attention maps have {tokenizer.model_max_length}. "
            "Shorten it."
        )
    return ids


def word_indices(prompt: str, word: str, tokenizer: Any) -> list[int]:
    """Token positions of all occurrences of a word.

    Raises:
        UserError: the prompt has no such word (the authors' code silently does nothing then); see `word_tokens`.
    """
    places = [place for place, each in enumerate(words(prompt)) if each == word]
    if not places:
        raise UserError(f"the word {word!r} is not in {prompt!r}.{near(word, words(prompt))} Words end at blanks only.")
    tokens = word_tokens(prompt, tokenizer)
    return [position for place in places for position in tokens[place]]


def replacement(source: str, target: str, tokenizer: Any, align_tail: bool = False) -> Tensor:
    """(N, N) such that a_source @ mapper lies on the target's tokens (seq_aligner.py, get_replacement_mapper).

    For prompts of equally many words.

    A replaced word of another number of tokens gives each target token the mean share of its own tokens.

    Args:
        source: the source prompt.
        target: the target prompt.
        tokenizer: CLIP's.
        align_tail: keep the tokens behind the last replaced word on their own; the authors read them from the target's
            positions, which shifts them where token counts differ.

    Raises:
        UserError: the prompts have different numbers of words.
    """
    if len(words(source)) != len(words(target)):
        raise UserError(
            f"mode=replace needs equally many words: {source!r} has {len(words(source))}, {target!r} has "
            f"{len(words(target))}. Use mode=refine."
        )
    length = int(tokenizer.model_max_length)
    before, after = word_tokens(source, tokenizer), word_tokens(target, tokenizer)
    changed = [k for k, (old, new) in enumerate(zip(words(source), words(target), strict=True)) if old != new]
    mapper = torch.zeros(length, length, dtype=torch.float64)
    i = j = 0
    for word in changed:
        for _ in range(before[word][0] - i):
            mapper[i, j] = 1
            i, j = i + 1, j + 1
        old, new = torch.tensor(before[word]), torch.tensor(after[word])
        if len(old) == len(new):
            mapper[old, new] = 1
        else:
            mapper[old[:, None], new] = 1 / len(new)
        i, j = i + len(old), j + len(new)
    while i < length and j < length:
        mapper[i if align_tail else j, j] = 1
        i, j = i + 1, j + 1
    return mapper.float()


def refinement(source: str, target: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Where each target token comes from: alignment by Needleman and Wunsch (1970), match 1, mismatch -1, gap 0.

    As get_refinement_mapper in seq_aligner.py.

    Returns:
        (N,) int64 source positions, -1 for an inserted token; (N,) 1 where there is a source token, 0 where not.
    """
    old, new = encode(source, tokenizer), encode(target, tokenizer)
    length = int(tokenizer.model_max_length)
    score = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    origin = [["left"] * (len(new) + 1)] + [["up", *[""] * len(new)] for _ in old]
    for i, here in enumerate(old, 1):
        for j, there in enumerate(new, 1):
            ways = {  # in this order at equal scores, as the authors
                "left": score[i][j - 1],
                "up": score[i - 1][j],
                "diagonal": score[i - 1][j - 1] + (1 if here == there else -1),
            }
            origin[i][j] = max(ways, key=lambda way: ways[way])
            score[i][j] = ways[origin[i][j]]
    found = torch.arange(length)
    i, j = len(old), len(new)
    while j > 0:
        way = origin[i][j]
        if way != "up":
            found[j - 1] = i - 1 if way == "diagonal" else -1
            j -= 1
        if way != "left":
            i -= 1
    return found, (found >= 0).float()


def equalizer(target: str, factors: Mapping[str, float], tokenizer: Any) -> Tensor:
    """(N,) factors of the target's maps: 1 but for the named words (get_equalizer in the authors' notebook)."""
    found = torch.ones(int(tokenizer.model_max_length))
    for word, factor in factors.items():
        found[word_indices(target, word, tokenizer)] = float(factor)
    return found


def time_table(target: str, steps: int, window: Window, of_words: Mapping[str, Window], tokenizer: Any) -> Tensor:
    """(T+1, N): 1 where the source's cross-attention map is taken at a step, else 0.

    As get_time_words_attention_alpha in ptp_utils.py.

    Args:
        target: the target prompt.
        steps: T; shares are of T + 1 here, as the authors have it.
        window: of all tokens.
        of_words: other windows of single words of the target.
        tokenizer: CLIP's.
    """
    table = torch.zeros(steps + 1, int(tokenizer.model_max_length))
    chosen: list[tuple[Window, Any]] = [(window, slice(None))]
    chosen += [(each, word_indices(target, word, tokenizer)) for word, each in of_words.items()]
    for each, tokens in chosen:
        start, end = bounds(each)
        column = torch.zeros(steps + 1)
        column[int(start * (steps + 1)) : int(end * (steps + 1))] = 1
        table[:, tokens] = column[:, None]
    return table


def bounds(window: Window) -> tuple[float, float]:
    """Start and end of a window.

    Raises:
        UserError: not a share of the steps, or not in order.
    """
    start, end = (0.0, window) if isinstance(window, (int, float)) else window
    if not 0 <= start <= end <= 1:
        raise UserError(f"window {window} is no share of the steps: give tau in 0 to 1, or [start, end].")
    return float(start), float(end)
