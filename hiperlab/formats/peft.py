"""Adapter files of huggingface/peft: `adapter_model.safetensors` and `adapter_config.json`, for all its tuners.

Without a prefix the layers' names are those of diffusers' `add_adapter`; `get_peft_model(...).save_pretrained` writes
"base_model.model." before them. The scale and much else stands in the config only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.hub import first_line

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
UNSUPPORTED: dict[str, Any] = {  # settings that change what the tensors mean, and the only value that is read
    "rank_pattern": {}, "alpha_pattern": {}, "n_frequency_pattern": {}, "modules_to_save": None,
    "layer_replication": None, "lora_bias": False, "fan_in_fan_out": False, "use_effective_conv2d": False,
}  # fmt: skip


def write(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], prefix: str = ""
) -> Path:
    """Write both files; returns the weights'.

    Args:
        folder: where; made if it is missing.
        tensors: by layer and parameter.
        config: PEFT's settings, `peft_type` among them; layers are added in full.
        prefix: before every layer's name, "" or `PREFIX`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states = {
        f"{prefix}{layer}.{key}": value.detach().float().cpu().contiguous().clone()
        for layer, own in tensors.items()
        for key, value in own.items()
    }
    save_file(states, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {"inference_mode": True, **config, "target_modules": sorted(tensors)}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder / WEIGHTS


def read(path: Path, keys: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by layer and parameter, and the config beside them.

    Args:
        path: the weights, of any file name.
        keys: the parameters that a layer may have.

    Raises:
        UserError: a file is missing or broken, or holds something else.
    """
    config = path.parent / CONFIG
    if not config.is_file():
        raise UserError(f"{path.name}: {CONFIG} is not beside it, and without that the tensors have no scale.")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        assert isinstance(settings, dict)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{config} is damaged ({first_line(error)}). Take the one that was saved with it.") from error
    for key, only in UNSUPPORTED.items():
        if key in settings and settings[key] != only and settings[key]:
            raise UserError(f"{config}: {key}={settings[key]} is not read, expected {only}.")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{config}: bias={settings['bias']} is not read, expected none.")
    found: dict[str, dict[str, Tensor]] = {}
    ends = sorted(keys, key=len, reverse=True)
    for name, value in embedding.tensors(path).items():
        bare = name.removeprefix(PREFIX)
        end = next((end for end in ends if bare.endswith(f".{end}")), None)
        if end is None:
            raise UserError(f"{path.name}: {name} is none of {', '.join(ends)}: another tuner's file.")
        found.setdefault(bare.removesuffix(f".{end}"), {})[end] = value.float()
    return found, settings
