"""Weight files of IP-Adapter (tencent-ailab/IP-Adapter, ip_adapter/ip_adapter.py, IPAdapter.load_ip_adapter).

A `.bin` holds {"image_proj": {...}, "ip_adapter": {...}}, a `.safetensors` the same names, flat, behind these.
Layers are numbered as diffusers' `unet.attn_processors` lists them: down, up, the middle block last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.formats import embedding, pickles
from hiperlab.layer.image_prompt import HEAD_WIDTH, LinearPrompt, Resampler

PARTS = ("image_proj", "ip_adapter")


class Adapter(NamedTuple):
    """What a file holds.

    Attributes:
        kind: "base" (one projected CLIP embedding) or "plus" (all tokens of CLIP's last but one layer).
        prompt: from CLIP's features to tokens, see `hiperlab.layer.image_prompt`.
        weights: W_k and W_v (C_l, D) of each cross-attention layer, in the order of `layers` that it was read for.
    """

    kind: str
    prompt: LinearPrompt | Resampler
    weights: list[tuple[Tensor, Tensor]]

    @property
    def features(self) -> int:
        """F, the width of what the picture encoder must give."""
        entry = self.prompt.proj if isinstance(self.prompt, LinearPrompt) else self.prompt.proj_in
        return entry.in_features

    @property
    def width(self) -> int:
        """D, of the tokens."""
        norm = self.prompt.norm if isinstance(self.prompt, LinearPrompt) else self.prompt.norm_out
        return len(norm.weight)


def read(path: Path, layers: Sequence[str], unet: Any) -> Adapter:
    """The adapter in a file, float32.

    Args:
        path: `.bin` or `.safetensors`.
        layers: paths of the U-Net's cross-attention layers, in the order wanted.
        unet: the U-Net they are of.

    Raises:
        UserError: the file is missing, broken, unsafe, of another kind or of another base model.
    """
    found = _parts(path)
    state = {name: value.detach().float() for name, value in found["image_proj"].items()}
    kind, prompt = _prompt(path, state)
    try:
        prompt.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path.name} is no {kind} IP-Adapter ({reason}).") from error
    numbers = {name.removesuffix(".processor"): place for place, name in enumerate(unet.attn_processors)}
    own = found["ip_adapter"]
    weights, used = [], set()
    for layer in layers:
        pair = []
        for which in ("k", "v"):
            name, module = f"{numbers[layer]}.to_{which}_ip.weight", unet.get_submodule(layer)
            value, shape = own.get(name), getattr(module, f"to_{which}").weight.shape
            if value is None or value.shape != shape:
                has = "is missing" if value is None else f"is {list(value.shape)}, the layer's {list(shape)}"
                raise UserError(f"{path.name} is of another base model: ip_adapter.{name} {has}.")
            pair.append(value.detach().float())
            used.add(name)
        weights.append((pair[0], pair[1]))
    if extra := sorted(own.keys() - used):
        raise UserError(f"{path.name} is of another base model: it has ip_adapter.{extra[0]} besides.")
    return Adapter(kind, prompt.eval().requires_grad_(False), weights)


def _parts(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of both parts, by their names in it."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    if path.suffix.lower() == ".safetensors":
        for name, value in embedding.tensors(path).items():
            part, _, rest = name.partition(".")
            if part not in found:
                raise UserError(f"{path.name} is no IP-Adapter: it holds {name}.")
            found[part][rest] = value
    else:
        content = pickles.load(path)
        if not isinstance(content, Mapping) or set(content) != set(PARTS):
            raise UserError(f"{path.name} is no IP-Adapter: it should hold {' and '.join(PARTS)}.")
        found = {part: pickles.named_tensors(path, content[part], "an IP-Adapter") for part in PARTS}
    if empty := [part for part in PARTS if not found[part]]:
        raise UserError(f"{path.name} is no IP-Adapter: {empty[0]} is missing.")
    return found


def _prompt(path: Path, state: Mapping[str, Tensor]) -> tuple[str, LinearPrompt | Resampler]:
    """The kind that the names mean, and a module of the tensors' sizes."""
    if {"proj.weight", "norm.weight"} <= state.keys() and state["proj.weight"].dim() == 2:
        width = len(state["norm.weight"])
        outputs, features = state["proj.weight"].shape
        return "base", LinearPrompt(features, width, outputs // width)
    first = ("latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")
    if set(first) <= state.keys() and state["latents"].dim() == 3:
        latents, entry, out, query, hidden = (state[name] for name in first)
        depth = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        sizes = (entry.shape[1], latents.shape[2], len(out), latents.shape[1])
        return "plus", Resampler(*sizes, len(query) // HEAD_WIDTH, depth, len(hidden))
    raise UserError(
        f"{path.name} is an IP-Adapter of a kind that is not read here (image_proj holds {', '.join(sorted(state)[:3])}"
        "): give a base or a plus one, e.g. ip-adapter_sd15.safetensors."
    )


def random_adapter(seed: int, unet: Any, layers: Sequence[str], features: int, width: int) -> Adapter:
    """A base adapter with random weights, for checks with `model=tiny`; the global random state is left as it was.

    Args:
        seed: of its weights.
        unet: the U-Net.
        layers: paths of its cross-attention layers.
        features: width of the picture encoder's embedding.
        width: of the text states.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prompt = LinearPrompt(features, width, 4)
        weights = []
        for layer in layers:
            shape = unet.get_submodule(layer).to_k.weight.shape
            weights.append((torch.randn(shape) / width**0.5, torch.randn(shape) / width**0.5))
    return Adapter("base", prompt.eval().requires_grad_(False), weights)
