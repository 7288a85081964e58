"""AttnDreamBooth (Pang et al. 2024): a new word's cross-attention made statistically like that of its class word.

Axes: B rows, H heads, S image positions, N tokens, n rows of the word.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def map_statistics(probabilities: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over heads and positions together, of chosen tokens' maps.

    Args:
        probabilities: a layer's cross-attention map (B, H, S, N).
        tokens: (B, m) int64, which tokens of each row.

    Returns:
        Two of shape (B, m), in the map's type.
    """
    heads, pixels = probabilities.shape[1:3]
    chosen = tokens[:, None, None].expand(-1, heads, pixels, -1)
    found = probabilities.gather(3, chosen)
    return found.mean((1, 2)), found.var((1, 2))


def attention_regulariser(
    maps: Iterable[Tensor], word: Tensor, class_token: Tensor, mean_weight: float, variance_weight: float
) -> Tensor:
    """The mean over layers of weighted squared differences of `map_statistics`, of each row (B,).

    As `attn_loss` of the authors' train_attndreambooth.py (lyuPang/AttnDreamBooth), which adds up its batch's rows. No
    side is held: both are pulled together.

    Args:
        maps: cross-attention maps (B, H, S, N) of the layers, S and H may differ.
        word: (B, n) int64, the tokens of the new word.
        class_token: (B,) int64, the first token of the class noun.
        mean_weight: of the means' mean squared difference over the n tokens.
        variance_weight: of the variances' (not of the standard deviations').
    """
    tokens = torch.cat([word, class_token[:, None]], dim=1)
    found = []
    for probabilities in maps:
        means, variances = map_statistics(probabilities, tokens)
        apart = [(each[:, :-1] - each[:, -1:]).square().mean(1) for each in (means, variances)]
        found.append(mean_weight * apart[0] + variance_weight * apart[1])
    return torch.stack(found).mean(0)
