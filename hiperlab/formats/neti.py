"""Checkpoints of the authors' NeTI code (checkpoint_handler.py): `mapper-*.pt` and `learned_embeds-*.bin`."""

from __future__ import annotations

import math
import sys
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hiperlab.errors import UserError
from hiperlab.formats import pickles

MODULE = "models.positional_encoding"
ENCODERS = (f"{MODULE}.NeTIPositionalEncoding", f"{MODULE}.BasicEncoder")


_READ: dict[str, tuple[tuple[type, ...], str]] = {
    "target_norm": ((int, float), "a number"),
    "use_positional_encoding": ((bool,), "true or false"),
    "output_bypass": ((bool,), "true or false"),
    "num_pe_time_anchors": ((int,), "a whole number"),
}


class Checkpoint(NamedTuple):
    """What one of the authors' checkpoints holds.

    Args:
        state: their mapper's tensors by their names, without the repeated `net.0.*`.
        w: positional frequencies (F, 2), or None for the variant without encoding.
        cfg: their nested settings, plain values.
    """

    state: dict[str, Tensor]
    w: Tensor | None
    cfg: dict[str, Any]


def read(path: Path) -> Checkpoint:
    """Read a `mapper-*.pt` without running any code of it.

    Raises:
        UserError: it is missing, unsafe, or not a NeTI mapper.
    """
    content = pickles.load(path, stand_ins=ENCODERS)
    if not isinstance(content, Mapping) or not {"state_dict", "cfg", "encoder"} <= content.keys():
        raise UserError(f"{path.name} is no NeTI mapper: expected the keys state_dict, cfg and encoder.")
    cfg, encoder = content["cfg"], content["encoder"]
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("model", {}), Mapping):
        raise UserError(f"{path.name} is no NeTI mapper: its cfg is no table of settings.")
    if not isinstance(encoder, pickles.Stub):
        raise UserError(f"{path.name} is no NeTI mapper: its encoder is a {type(encoder).__name__}.")
    # `encoder.w` gets in when the authors save after resuming; `net.0.*` is `input_layer.*` once more.
    skipped = ("encoder.", "net.0.")
    named = pickles.named_tensors(path, content["state_dict"], "a NeTI mapper")
    state = {name: value for name, value in named.items() if not name.startswith(skipped)}
    w = encoder.__dict__.get("w")
    if w is not None and not (isinstance(w, Tensor) and w.dim() == 2):
        raise UserError(f"{path.name} is no NeTI mapper: its positional frequencies are no table [F, 2].")
    _check_settings(path, dict(cfg.get("model", {})))
    return Checkpoint(state, None if w is None else w.detach().float().cpu(), dict(cfg))


def _check_settings(path: Path, model: Mapping[Any, Any]) -> None:
    """The few of their settings that are read.

    Raises:
        UserError: one is of another type.
    """
    for name, (types_, what) in _READ.items():
        value = model.get(name)
        wrong = not isinstance(value, types_) or (isinstance(value, bool) and bool not in types_)
        if value is not None and (wrong or (isinstance(value, float) and not math.isfinite(value))):
            raise UserError(f"{path.name} is no NeTI mapper: its cfg.model.{name} is {value!r:.40}, expected {what}.")


class NeTIPositionalEncoding(nn.Module):
    """The object that the authors' loader expects to unpickle; it only carries numbers."""

    def __init__(self, sigma_t: float, sigma_l: float, w: Tensor) -> None:
        super().__init__()
        self.sigma_t, self.sigma_l, self.num_w = sigma_t, sigma_l, len(w)
        self.w = w


class BasicEncoder(nn.Module):
    """The same for the variant without positional encoding."""

    def __init__(self, num_timesteps: int, num_layers: int) -> None:
        super().__init__()
        self.normalized_timesteps = torch.arange(num_timesteps) / (num_timesteps - 1) * 2 - 1
        self.normalized_unet_layers = torch.arange(num_layers) / (num_layers - 1) * 2 - 1


def write(folder: Path, steps: str, checkpoint: Checkpoint, placeholder: str, word_row: Tensor) -> list[Path]:
    """Write both files so that the authors' unmodified loader takes them.

    Args:
        folder: where; must exist.
        steps: ending of the names, e.g. "steps-1000".
        checkpoint: state (their names), w and cfg (only keys their parser knows).
        placeholder: the one key of the embeds file.
        word_row: (D,) the class noun's embedding; it only carries the placeholder's name.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in checkpoint.state.items():
        state[name] = value.detach().cpu().clone()
    for name in ("weight", "bias"):
        if f"input_layer.{name}" in state:
            state[f"net.0.{name}"] = state[f"input_layer.{name}"]
    encoder: nn.Module
    if checkpoint.w is None:
        encoder = BasicEncoder(1000, 16)
    else:
        sigmas = checkpoint.cfg["model"]["pe_sigmas"]
        encoder = NeTIPositionalEncoding(sigmas["sigma_t"], sigmas["sigma_l"], checkpoint.w.detach().cpu().clone())
    mapper, embeds = folder / f"mapper-{steps}.pt", folder / f"learned_embeds-{steps}.bin"
    with _as_their_module():
        torch.save({"state_dict": state, "cfg": checkpoint.cfg, "encoder": encoder}, mapper)
    torch.save({placeholder: word_row.detach().cpu().clone()}, embeds)
    return [mapper, embeds]


class _as_their_module:
    """While open, our two encoder classes answer to the authors' module name, which pickle writes into the file."""

    def __enter__(self) -> None:
        module = types.ModuleType(MODULE)
        for cls in (NeTIPositionalEncoding, BasicEncoder):
            cls.__module__ = MODULE
            setattr(module, cls.__name__, cls)
        self.before = {name: sys.modules.get(name) for name in ("models", MODULE)}
        sys.modules["models"] = types.ModuleType("models")
        sys.modules[MODULE] = module

    def __exit__(self, *_: object) -> None:
        for name, before in self.before.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
        for cls in (NeTIPositionalEncoding, BasicEncoder):
            cls.__module__ = __name__
