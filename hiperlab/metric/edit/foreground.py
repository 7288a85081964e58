"""The soft foreground mask of NS-LPIPS, from cross-attention maps that somebody recorded; knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hiperlab.errors import UserError, near

SIDE = 256


def released_token(prompt: str, word: str) -> int:
    """The token that StyleDiffusion's script takes for a word: 1 + its place among words, whatever their tokens.

    After a word of several tokens that is another word's; give `foreground` the word's own tokens to mend it.

    Raises:
        UserError: the prompt lacks the word.
    """
    words = prompt.split(" ")
    if word not in words:
        raise UserError(f"the prompt {prompt!r} lacks the word {word!r}.{near(word, words)}")
    return 1 + words.index(word)


def foreground(maps: Sequence[Tensor], tokens: Sequence[int], released_heads: bool) -> Image.Image:
    """Where a word is in the source picture, as StyleDiffusion's `storemask` script draws it.

    Args:
        maps: cross-attention of one prompt, averaged over the inversion's steps; each layer (heads, pixels, tokens),
            all of one square resolution (the paper: the five layers of 16 x 16).
        tokens: the word's tokens; their maps are averaged.
        released_heads: keep the last half of each layer's heads only, as the script does by a slip.

    Returns:
        Grey picture of SIDE x SIDE, the brightest place 255; the background is its complement.

    Raises:
        UserError: the maps are of several resolutions, or there is no such token.
    """
    shapes = {tuple(each.shape[1:]) for each in maps}
    pixels, length = next(iter(shapes), (0, 0))
    side = int(pixels**0.5)
    if len(shapes) != 1 or side * side != pixels:
        raise UserError(f"maps of (pixels, tokens) {sorted(shapes)}: a mask needs one square resolution.")
    if not tokens or not all(0 <= token < length for token in tokens):
        raise UserError(f"tokens {list(tokens)} are not among the {length} of the maps.")
    heads = torch.cat([each[len(each) // 2 :] if released_heads else each for each in maps])
    seen = heads.float().mean(0)[:, list(tokens)].mean(-1).reshape(side, side).cpu()
    grey = (255 * seen / seen.max()).to(torch.uint8)  # cut off, not rounded
    return Image.fromarray(grey.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
