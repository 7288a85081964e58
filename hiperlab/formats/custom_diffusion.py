"""Files of Custom Diffusion: the authors' `delta.bin`, and diffusers' weights with a word beside.

The authors' come from src/diffusers_model_pipeline.py and src/compress.py (adobe-research/custom-diffusion), diffusers'
from examples/custom_diffusion/train_custom_diffusion.py.
Weights are named as in the U-Net, "<attention>.attn2.to_k.weight"; diffusers' files add ".processor" and
"_custom_diffusion", and an empty dict for every self-attention.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.formats import embedding, pickles

MOST_OF_A_WORD = 1_000_000  # bytes of a word's file
log = logging.getLogger(__name__)
DELTA, WEIGHTS = "delta.bin", "pytorch_custom_diffusion_weights.bin"


class Concept(NamedTuple):
    """What a file (and the word's file beside it) holds.

    Args:
        weights: whole weights by the U-Net's names, float32.
        factors: (u, v) of compressed ones: W = W_0 + u v.
        words: learnt words, each (D,).
    """

    weights: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]
    words: dict[str, Tensor]


def read(path: Path) -> Concept:
    """A `delta.bin` (also compressed), or diffusers' weights or word file with the other one beside it.

    Raises:
        UserError: a file is missing, broken, unsafe, or holds something else.
    """
    content = _load(path)
    if isinstance(content.get("unet"), Mapping):
        return _delta(path, content)
    if "state_dict" in content:
        raise UserError(f"{path.name} is a CompVis checkpoint, which is not read. Give the concept's {DELTA}.")
    if _is_weights(content):
        words = _words_beside(path)
        if not words:
            raise UserError(f"{path.name} needs the word it was trained with: put that <word>.bin beside it.")
        return _checked(path, Concept(_whole(content), {}, words))
    weights = path.parent / WEIGHTS
    if not weights.is_file():
        weights = weights.with_suffix(".safetensors")
    if not weights.is_file():
        raise UserError(f"{path.name} holds a word only: put the {WEIGHTS} of its training beside it.")
    return _checked(path, Concept(_whole(_load(weights)), {}, dict(content)))


def _words_beside(path: Path) -> dict[str, Any]:
    """Learnt words in files beside the weights, each called by its word, with or without brackets."""
    words: dict[str, Any] = {}
    for file in sorted(path.parent.iterdir()):
        if file == path or file.suffix not in (".bin", ".safetensors") or file.stat().st_size > MOST_OF_A_WORD:
            continue
        content = _load(file) if file.stem.startswith("<") else _other(file)
        words |= {word: vector for word, vector in content.items() if word == file.stem or file.stem.startswith("<")}
    return words


def _other(file: Path) -> dict[str, Any]:
    """What a file without brackets in its name holds; nothing where it is of another kind."""
    try:
        return _load(file)
    except UserError as problem:
        log.info("%s lies beside the weights and is no word of theirs: %s", file.name, problem)
        return {}


def _load(path: Path) -> dict[str, Any]:
    content = embedding.tensors(path) if path.suffix.lower() == ".safetensors" else pickles.load(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path.name} is no file of Custom Diffusion: expected {DELTA} or {WEIGHTS}.")
    return dict(content)


def _is_weights(content: Mapping[str, Any]) -> bool:
    return any("_custom_diffusion" in str(key) for key in content)


def _whole(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Diffusers' entries by the U-Net's names, without the empty ones."""
    return {
        str(key).replace(".processor.", ".").replace("_custom_diffusion", ""): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


def _delta(path: Path, content: Mapping[str, Any]) -> Concept:
    if "text_encoder" in content:
        raise UserError(f"{path.name} changes the text encoder too, which method=custom_diffusion does not read.")
    for key in ("unet", "modifier_token"):
        if not isinstance(content.get(key), Mapping | None):
            raise UserError(f"{path.name} is no file of Custom Diffusion: its {key} is no table.")
    weights = {name: value for name, value in content["unet"].items() if isinstance(value, Tensor)}
    factors = {
        name: (value["u"], value["v"])
        for name, value in content["unet"].items()
        if isinstance(value, Mapping) and value.keys() >= {"u", "v"}
    }
    return _checked(path, Concept(weights, factors, dict(content.get("modifier_token") or {})))


def _checked(path: Path, concept: Concept) -> Concept:
    """Float32 tensors.

    Raises:
        UserError: they are not.
    """
    tensors = [*concept.weights.values(), *concept.words.values(), *sum(concept.factors.values(), ())]
    if not concept.words or not all(isinstance(each, Tensor) and each.is_floating_point() for each in tensors):
        raise UserError(f"{path.name} is no file of Custom Diffusion: a word's embedding or a weight is missing.")
    return Concept(
        {name: value.detach().float() for name, value in concept.weights.items()},
        {name: (u.detach().float(), v.detach().float()) for name, (u, v) in concept.factors.items()},
        {word: vector.detach().float().reshape(-1) for word, vector in concept.words.items()},
    )


def compressed(delta: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """U (out, r) and v (r, in) with u v close to `delta` (out, in): its first singular values.

    Args:
        delta: W - W_0.
        share: as many of them as sum up to this share of all, above 0 to 1; the authors' src/compress.py has 0.6.
    """
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    rank = int((s.cumsum(0) < share * s.sum()).sum()) + 1
    return u[:, :rank] * s[:rank], v[:rank]


def write(
    folder: Path,
    word: str,
    vector: Tensor,
    weights: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    compress: float | None,
) -> list[Path]:
    """Write `delta.bin`, `pytorch_custom_diffusion_weights.bin` and `<word>.bin` into `folder`.

    Args:
        folder: where; must exist.
        word: the placeholder, as prompts name it.
        vector: its embedding (D,).
        weights: whole weights by the U-Net's names.
        frozen: the base model's, by the same names.
        compress: share of singular values kept in `delta.bin`, or None for whole weights.
    """
    kept = {name: _plain(value) for name, value in weights.items()}
    unet: dict[str, Any] = dict(kept)
    if compress is not None:
        for name, value in kept.items():
            if value.dim() == 2:
                u, v = compressed(value - frozen[name].detach().float().cpu(), compress)
                unet[name] = {"u": _plain(u), "v": _plain(v)}
    theirs: dict[str, Any] = {}
    for name, value in kept.items():
        layer, end = re.fullmatch(r"(.*\.)attn2\.(.*)", name).groups()  # type: ignore[union-attr]
        theirs.setdefault(f"{layer}attn1.processor", {})
        projection, _, rest = end.partition(".")
        theirs[f"{layer}attn2.processor.{projection}_custom_diffusion.{rest}"] = value
    token = {word: _plain(vector)}
    written = []
    for name, content in ((DELTA, {"unet": unet, "modifier_token": token}), (WEIGHTS, theirs), (f"{word}.bin", token)):
        path = folder / name
        with files.atomic_open(path) as file:
            torch.save(content, file)
        written.append(path)
    return written


def _plain(value: Tensor) -> Tensor:
    return value.detach().float().cpu().contiguous().clone()
