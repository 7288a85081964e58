"""LoRA files: diffusers (now and before PEFT), PEFT and kohya, read and written; cloneofsimo's are read.

SDXL's have a second text encoder: `text_encoder_2.`, in kohya's form `lora_te1_` and `lora_te2_`.

Key names are left to the converters of diffusers and PEFT. Done here is what these lose: alpha (diffusers #6087), and
the text encoder's old key names.
Letters: A (r, in) "down", B (out, r) "up", W' = W + scale B A with scale = alpha / r (Hu et al. 2021, section 4.1).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import safetensors
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.state_dict_utils import StateDictType
from safetensors.torch import save_file
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.formats import embedding, lora_diffusion, pickles
from hiperlab.hub import first_line

log = logging.getLogger(__name__)

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
PEFT = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"
BLOCKS = SimpleNamespace(
    layers_per_block=2
)  # of every SD U-Net; diffusers needs it for the original checkpoint's names
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_param\.\*|clip_l)")  # the web UIs', OneTrainer's
BUNDLED_PAIR = re.compile(r"bundle_emb\.(.+?)\.(clip_l|clip_g)")  # SDXL's
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
OTHER_KINDS = {  # parts of keys that belong to something else than LoRA
    "dora_scale": "DoRA", "magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
    "lora_mid": "LoCon with a Tucker core",
}  # fmt: skip
OF_SDXL = ("lora_te2_", "text_encoder_2.", ".clip_g")  # parts of keys that SD 1.x and 2.x have no place for
PARTS = ("unet", "text_encoder", "text_encoder_2")

Pairs = dict[str, tuple[Tensor, Tensor]]  # module -> (A, B); convolutions keep their four axes


class Adapter(NamedTuple):
    """What a LoRA file holds, by the modules' names in the U-Net and in the text model, without "text_model.".

    Of SDXL `text` has the encoder's name in front, "text_encoder." or "text_encoder_2.", as `FrozenStack.text_module`.
    The scale is folded into B: W' = W + B A. `words` are learnt embeddings (V, D) that came in the same file.
    """

    unet: Pairs
    text: Pairs
    words: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


def read(path: Path, sdxl: bool = False) -> Adapter:
    """Any LoRA file for Stable Diffusion 1.x, 2.x or, where `sdxl` says so, XL.

    Alpha comes from the file's header (diffusers), a tensor beside each pair (kohya) or `adapter_config.json` beside
    the file (PEFT); without any it is the rank.

    Raises:
        UserError: there is no file, it is broken, unsafe, or holds something else than LoRA.
    """
    if path.suffix.lower() == ".safetensors":
        content, configs = embedding.tensors(path), _header(path)
    else:
        content, configs = pickles.load(path), {}
    words: dict[str, Tensor] = {}
    if lora_diffusion.is_theirs(content):
        content, words = lora_diffusion.named(path.name, content)
        for end in (".text_encoder.pt", ".ti.pt"):  # what its trainer keeps in files of their own
            if path.suffix == ".pt" and (beside := path.with_suffix(end)).is_file() and beside != path:
                more, others = lora_diffusion.named(beside.name, pickles.load(beside))
                content, words = content | more, words | others
    content = pickles.named_tensors(path, content, "a LoRA file")
    for part, kind in OTHER_KINDS.items():
        if any(part in key for key in content):
            raise UserError(f"{path.name} is {kind}, which method=lora does not read. Choose a plain LoRA.")
    if not sdxl and any(part in key for key in content for part in OF_SDXL):
        raise UserError(f"{path.name} is a LoRA for SDXL, which has a second text encoder: load it with model=sdxl.")
    if wrong := [key for key, value in content.items() if key.endswith(".alpha") and value.numel() != 1]:
        raise UserError(f"{path.name} is damaged: {wrong[0]} is {list(content[wrong[0]].shape)}, expected one number.")
    alphas: dict[str, float] = {}
    tensors = {key: value.detach().float() for key, value in content.items()}
    words |= _pairs_of_words(path, tensors) if sdxl else {}
    words |= {match[1]: tensors.pop(key) for key in list(tensors) if (match := BUNDLED.fullmatch(key))}
    words = {word: value.detach().float().reshape(-1, value.shape[-1]) for word, value in words.items()}
    if any(key.startswith("base_model.model.") for key in tensors):
        configs = _beside(path)
    second = path.parent.name.endswith(f"_{PARTS[2]}")  # PEFT's folder of it
    if all(key.startswith(KOHYA) for key in tensors):
        tensors, alphas = _from_kohya(path, tensors)
    tensors = {_full(key, second): value for key, value in tensors.items()}
    alphas |= {key: float(tensors.pop(key)) for key in list(tensors) if key.endswith(".alpha")}
    parts = {part: _named(tensors, part) for part in PARTS}
    _check_patterns(path, parts, configs)
    found = {part: _pairs(path, each, _named(alphas, part), configs.get(part, {})) for part, each in parts.items()}
    if not any(up.any() for pairs in found.values() for _, up in pairs.values()):
        log.warning("%s changes nothing: all its B matrices are zero, as before the first step of training.", path.name)
    text = found[PARTS[1]]
    if sdxl:
        text = {f"{part}.{name}": pair for part in PARTS[1:] for name, pair in found[part].items()}
    return Adapter(found["unet"], text, words)


def _pairs_of_words(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's learnt words (V, D) among a file's tensors, from which they are taken: both encoders' rows side by side.

    Raises:
        UserError: a word has rows of one encoder only.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        if match := BUNDLED_PAIR.fullmatch(key):
            rows = tensors.pop(key)
            found.setdefault(match[1], {})[match[2]] = rows.reshape(-1, rows.shape[-1])
    for word, pair in found.items():
        if pair.keys() != set(embedding.PAIR) or len({len(rows) for rows in pair.values()}) > 1:
            raise UserError(f"{path.name} brings the word {word} for one text encoder only; SDXL has two.")
    return {word: torch.cat([pair[key] for key in embedding.PAIR], dim=1) for word, pair in found.items()}


def _beside(path: Path) -> dict[str, dict[str, Any]]:
    """The settings of a file with PEFT's names, of any file name: `adapter_config.json` in its folder."""
    config = path.parent / CONFIG
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        assert isinstance(values, dict)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{config} is damaged ({first_line(error)}). Take the one that was saved with it.") from error
    return dict.fromkeys(PARTS, values)


def _check_patterns(path: Path, parts: Mapping[str, Mapping[str, Any]], configs: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a pattern that names no module of the file: its strength would be lost."""
    modules = {part: [_module(key) for key in values] for part, values in parts.items()}
    shared = configs.get("unet") is configs.get("text_encoder")
    for part, config in configs.items():
        names = [name for each in (modules if shared else (part,)) for name in modules.get(each, ())]
        for pattern in config.get("alpha_pattern") or {}:
            if not any(_matches(pattern, name) for name in names):
                raise UserError(f"{path.name}: alpha_pattern names {pattern!r}, and no layer of the file is called so.")


def _module(key: str) -> str:
    return key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """PEFT settings per part from a safetensors header; a header without prefixes speaks of the U-Net."""
    with safetensors.safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(HEADER)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        found: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for key, value in values.items():
            part, _, name = key.rpartition(".")
            found[part or "unet"][name] = value
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path.name}: its header {HEADER!r} is damaged ({error!r}). Save the file again.") from error
    return found


def _from_kohya(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # it loads peft, which only LoRA files need

    try:
        return StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=BLOCKS)
    except (ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:160]
        raise UserError(f"{path.name} is no LoRA that diffusers can convert ({first}).") from error


def _full(key: str, second: bool) -> str:
    """A key with its part in front, which PEFT's own files do not name, and the matrices' names of PEFT.

    Args:
        key: of a file.
        second: whether a text encoder that is not named is SDXL's second.
    """
    key = key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
    if key.startswith(tuple(f"{part}." for part in PARTS)):  # with the dot: one name begins like another
        return key
    bare = key.removeprefix("base_model.model.")
    return f"{PARTS[2 if second else 1] if 'encoder.layers.' in bare else 'unet'}.{bare}"


def _named(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    """One part's values by PEFT's names, "<module>.lora_A.weight", and alphas by "<module>.lora_A.weight.alpha"."""
    mine = {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
    if part == "unet":
        return convert_unet_state_dict_to_peft(mine)
    if any(re.search(r"\.to_(q|k|v|out)_lora\.|lora_linear_layer", key) for key in mine):
        mine = convert_state_dict_to_peft(mine, StateDictType.DIFFUSERS_OLD)  # also knows the names that followed
    return {key.removeprefix("text_model."): value for key, value in mine.items()}


def _pairs(path: Path, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], config: Mapping[str, Any]) -> Pairs:
    """(A, B) per module with the scale folded into B."""
    ends = (".lora_A.weight", ".lora_B.weight")
    strange = [key for key in tensors if not key.endswith(ends)]
    modules = list(dict.fromkeys(key.removesuffix(ends[0]).removesuffix(ends[1]) for key in tensors))
    strange += [module for module in modules if any(f"{module}{end}" not in tensors for end in ends)]
    if strange:
        raise UserError(f"{path.name} is no LoRA file: {strange[0]!r} is not one of a pair of LoRA matrices.")
    by_module = {key.split(".lora_A")[0].removesuffix(".alpha"): value for key, value in alphas.items()}
    found = {}
    for module in modules:
        down, up = (tensors[f"{module}{end}"] for end in ends)
        if down.dim() not in (2, 4) or up.dim() != down.dim() or up.shape[1] != down.shape[0]:
            raise UserError(
                f"{path.name}: {module} has matrices {list(down.shape)} and {list(up.shape)}, expected [r, in] and "
                "[out, r]. The file is damaged or of another kind."
            )
        rank = down.shape[0]
        alpha = by_module.get(module, _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
        found[module] = (down, up * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)))
    return found


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern names a module: a regular expression for the end of its name (PEFT's get_pattern_key).

    The text model's modules are called with and without "text_model.", as transformers changed its mind.
    """
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in (module, f"text_model.{module}"))
    except re.error:
        return module == pattern or module.endswith(f".{pattern}")


def _pattern(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    """PEFT's per-module setting: the first pattern that names the module."""
    return next((value for pattern, value in (patterns or {}).items() if _matches(pattern, module)), otherwise)


def write(folder: Path, name: str, adapter: Adapter, scale: float, text_prefixes: Sequence[str]) -> list[Path]:
    """Write `pytorch_lora_weights.safetensors` (diffusers), `<name>.safetensors` (kohya) and `peft/` (PEFT).

    Every file carries alpha: diffusers forgets it unless its metadata are given, and its kohya converter writes the
    rank whatever alpha is.

    Args:
        folder: where; must exist.
        name: the concept's name; A1111 calls a LoRA by its file name.
        adapter: matrices of one rank, as they are trained: the scale is NOT folded in.
        scale: alpha / r.
        text_prefixes: of each text encoder "text_model." where the installed transformers names its modules so, else
            ""; two are SDXL's.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    sdxl = len(text_prefixes) > 1
    parts = {"unet": adapter.unet, **({} if sdxl else {PARTS[1]: adapter.text})}
    for part in PARTS[1:] if sdxl else ():
        own = {key: pair for key, pair in adapter.text.items() if key.startswith(f"{part}.")}
        parts[part] = {key.removeprefix(f"{part}."): pair for key, pair in own.items()}
    # "text_model." is the name that older stacks know, too.
    states = {part: _peft(pairs, "" if part == "unet" else "text_model.") for part, pairs in parts.items()}
    settings = {part: _config(pairs, scale) for part, pairs in parts.items()}
    mixin: Any = StableDiffusionXLLoraLoaderMixin if sdxl else StableDiffusionLoraLoaderMixin
    mixin.save_lora_weights(
        folder,
        weight_name=DIFFUSERS,
        **{f"{part}_lora_layers": _diffusers(part, own) if own else None for part, own in states.items()},
        **{f"{part}_lora_adapter_metadata": how and how.to_dict() for part, how in settings.items()},
    )
    written = [folder / DIFFUSERS, _write_kohya(folder / f"{name}.safetensors", states, scale)]
    prefixes = ("", *text_prefixes)
    for (part, pairs), prefix in zip(parts.items(), prefixes, strict=True):
        if pairs:
            subfolder = folder / ("peft" if part == "unet" else f"peft_{part}")
            settings[part].save_pretrained(str(subfolder))
            named = {f"base_model.model.{key}": value for key, value in _peft(pairs, prefix).items()}
            save_file(named, subfolder / PEFT, metadata={"format": "pt"})
            written.append(subfolder / PEFT)
    return written


def _diffusers(part: str, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' names of the matrices; its converter leaves a text model's fc1 and fc2, and then cannot read them."""
    if part == "unet":
        return convert_state_dict_to_diffusers(states)  # type: ignore[no-any-return]
    names = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}
    return {
        next((key.replace(old, new) for old, new in names.items() if old in key), key): value
        for key, value in convert_state_dict_to_diffusers(states).items()
    }


def _peft(pairs: Pairs, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{module}.lora_{letter}.weight": value.detach().float().cpu().contiguous().clone()
        for module, both in pairs.items()
        for letter, value in zip("AB", both, strict=True)
    }


def _config(pairs: Pairs, scale: float) -> Any:
    """PEFT's settings for these modules, each named in full; None without any."""
    from peft import LoraConfig

    if not pairs:
        return None
    (rank,) = {down.shape[0] for down, _ in pairs.values()}
    return LoraConfig(
        r=rank, lora_alpha=_whole(scale * rank), target_modules=sorted(pairs), init_lora_weights="gaussian"
    )


def _whole(value: float) -> Any:
    """4.0 as 4, as everybody writes alpha; 0.5 stays."""
    return int(value) if value == int(value) else value


def _original_block(key: str) -> str:
    """A kohya key of SDXL's U-Net with the original layout's name of its transformer, as most files have it.

    Three to a level: a level's resampling, or the entry, comes first (_maybe_map_sgm_blocks_to_diffusers in diffusers'
    loaders/lora_conversion_utils.py).
    """
    if match := re.match(r"lora_unet_(down|up)_blocks_(\d)_attentions_(\d)_", key):
        level, place, kind = int(match[2]), int(match[3]), match[1]
        block = f"input_blocks_{3 * level + place + 1}" if kind == "down" else f"output_blocks_{3 * level + place}"
        return f"lora_unet_{block}_1_{key[match.end() :]}"
    return key.replace("lora_unet_mid_block_attentions_0_", "lora_unet_middle_block_1_")


def _write_kohya(path: Path, parts: Mapping[str, Mapping[str, Tensor]], scale: float) -> Path:
    named = {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}
    converted = convert_state_dict_to_kohya(named)
    if PARTS[2] in parts:
        states = {_original_block(key): value for key, value in converted.items()}
    else:  # "lora_te1_" is SDXL's name of it; A1111 and others look for "lora_te_" with SD 1 and 2
        states = {key.replace("lora_te1_", "lora_te_", 1): value for key, value in converted.items()}
    rank = next(value.shape[0] for key, value in states.items() if key.endswith(".lora_down.weight"))
    alpha = _whole(scale * rank)
    states = {key: torch.tensor(float(alpha)) if key.endswith(".alpha") else value for key, value in states.items()}
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0"} if PARTS[2] in parts else {}
    save_file(states, path, metadata=metadata)
    return path
