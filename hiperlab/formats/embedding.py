"""Embedding files of Textual Inversion: diffusers, CompVis and A1111; of SDXL's two text encoders side by side.

CompVis' are written by EmbeddingManager.save in the authors' ldm/modules/embedding_manager.py, diffusers' by
examples/textual_inversion/textual_inversion.py; A1111's add a name to CompVis' keys.
Axes: V vectors, D text width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.formats import pickles
from hiperlab.formats.disguises import disguise

SAFE = "learned_embeds.safetensors"  # the name that diffusers' scripts give it
SECOND = "learned_embeds_2.safetensors"  # of the second encoder, beside it (textual_inversion_sdxl.py)
PAIR = ("clip_l", "clip_g")  # keys of SDXL's encoders in one file; the first is SD 1.x's encoder
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
MOST_BYTES = 64 * 1024**2  # of an embedding: 77 vectors of width 2048 are 0.6 MB
NUMBERED = re.compile(r"(.+?)>?(?:_v?(\d+))?>?")  # a word and which of its vectors


def read(path: Path) -> Tensor:
    """The learnt vectors (V, D), float32, of any embedding file that is around.

    Accepts a dict with one key and a tensor [D] or [V, D] (diffusers, `emb_params`), one with a word's vectors under
    numbered keys (`<cat>`, `<cat>_1`, ..., as diffusers names the tokens of several vectors, or `<cat>_v0`, ..., as
    Cross Initialization's train_cross_init.py does), `string_to_param` with any single key (CompVis, A1111), and a
    bare tensor.

    Raises:
        UserError: there is no file, it is broken or unsafe, or it holds something else.
    """
    return _rows(path, _content(path))


def _content(path: Path) -> Any:
    """What a file holds, in any of the forms."""
    if path.suffix.lower() == ".safetensors":
        return tensors(path)
    return pickles.load(path, stand_ins=[PARAMETER_DICT], most=MOST_BYTES)


def _rows(path: Path, content: Any) -> Tensor:
    """The learnt vectors (V, D), float32, in a file's content.

    Raises:
        UserError: it holds something else.
    """
    tensor = _single(_parameters(content))
    if tensor is None or tensor.dim() not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        found = ", ".join(map(str, content))[:80] if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{path.name} is no embedding file: expected one tensor [D] or [V, D], found {found}.")
    return tensor.detach().float().reshape(-1, tensor.shape[-1])


def read_like(path: Path, own: Tensor, setting: str, widths: Sequence[int] = ()) -> Tensor:
    """`read`, of the shape (V, D) of a method's own rows.

    Args:
        path: the file; of SDXL's encoders the pair, or either of the two that diffusers' script writes side by side.
        own: the rows that it is to replace, (V, D).
        setting: for messages, what gives a run as many rows as the file, "{}" for their number.
        widths: of each text encoder, where there are several.

    Raises:
        UserError: as `read`, or the file has another number of rows or another width.
    """
    parts = _of_both(path)
    if len(parts) > 1 and len(widths) < 2:
        raise UserError(
            f"{path.name} is an embedding for SDXL, which has a second text encoder: half of it would be left out. "
            "Choose model=sdxl."
        )
    if len(parts) < len(widths) and len(parts[0]) == len(own):
        raise UserError(
            f"{path.name} holds the rows of one text encoder, and this model has two: put diffusers' other file beside "
            f"it, so that both {SAFE} and {SECOND} are there, or give a file with {' and '.join(PAIR)}."
        )
    theirs, wanted = [rows.shape[1] for rows in parts], list(widths) or [own.shape[1]]
    count = len(parts[0])
    if theirs != wanted or any(len(rows) != len(own) for rows in parts):
        width, needed = ("+".join(map(str, each)) for each in (theirs, wanted))
        here = f"{len(own)} of {needed}" if len(widths) > 1 else tuple(own.shape)
        what = [f"set {setting.replace('{}', str(count))}"] if any(len(rows) != len(own) for rows in parts) else []
        what += [f"load a base model of text width {width}"] if theirs != wanted else []
        remedy = " and ".join(what)
        raise UserError(
            f"{path.name} holds {count} rows of width {width}, this run {here}: {remedy[0].upper()}{remedy[1:]}."
        )
    return torch.cat(parts, dim=1)


def read_each(path: Path, widths: Sequence[int]) -> Tensor:
    """`read`, of every text encoder of these widths: (V, D), of the first alone where the file holds no others."""
    return torch.cat(_of_both(path), dim=1) if len(widths) > 1 else read(path)


def write_each(folder: Path, placeholder: str, vectors: Tensor, widths: Sequence[int]) -> list[Path]:
    """`write_safe` for every text encoder of these widths, whose vectors stand side by side in (V, D)."""
    parts = vectors.split(list(widths), dim=-1)
    return [write_safe(folder, placeholder, rows, file) for rows, file in zip(parts, (SAFE, SECOND), strict=False)]


def _of_both(path: Path) -> list[Tensor]:
    """The vectors (V, d) of each of SDXL's encoders; of the first alone where the file holds no others."""
    content = _content(path)
    if path.suffix.lower() == ".safetensors" and content.keys() == set(PAIR):
        return [content[key].float().reshape(-1, content[key].shape[-1]) for key in PAIR]
    rows = _rows(path, content)
    if path.name == SAFE and (second := path.with_name(SECOND)).is_file():
        return [rows, read(second)]
    if path.name == SECOND and (first := path.with_name(SAFE)).is_file():
        return [read(first), rows]
    return [rows]


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors, of any shape, of another tool's safetensors file.

    Raises:
        UserError: it is missing or broken, or holds numbers that are not finite.
    """
    if path.is_file() and (what := disguise(path, safetensors=True)):
        raise UserError(f"{path.name} {what}.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.name} cannot be read as safetensors ({error}).") from error
    pickles.check_numbers(path, found)
    return found


def _parameters(content: Any) -> Any:
    if isinstance(content, Mapping) and "string_to_param" in content:
        content = content["string_to_param"]
    if isinstance(content, pickles.Stub):  # a ParameterDict of any torch version keeps its tensors here
        content = content.__dict__.get("_parameters", {})
    return content


def _single(content: Any) -> Tensor | None:
    if isinstance(content, Tensor):
        return content
    if not isinstance(content, Mapping):
        return None
    found = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if found.keys() == set(PAIR):
        return found[PAIR[0]]
    return next(iter(found.values())) if len(found) == 1 else _numbered(found)


def _numbered(found: Mapping[str, Tensor]) -> Tensor | None:
    """The vectors of one word under `<cat>`, `<cat>_1`, ... (or `<cat_1>`, `<cat>_v0`) in their order, (V, D)."""
    parts = [NUMBERED.fullmatch(key) for key in found]
    rows = {int(part[2] or 0): value.reshape(-1) for part, value in zip(parts, found.values(), strict=True) if part}
    complete = sorted(rows) == list(range(len(found)))
    if not complete or len({part[1] for part in parts if part}) != 1 or len({len(row) for row in rows.values()}) != 1:
        return None
    return torch.stack([rows[number] for number in range(len(rows))])


def write(
    folder: Path, name: str, placeholder: str, vectors: Tensor, base: str, widths: Sequence[int] = ()
) -> list[Path]:
    """Write all three forms into `folder`: diffusers' safetensors and `.bin`, A1111's `.pt`.

    Of two text encoders: `<name>.safetensors` with both, as everybody loads them, and diffusers' two files.

    Args:
        folder: where; must exist.
        name: the concept's name, A1111's trigger word and file name.
        placeholder: diffusers' token; several vectors become `<x>`, `<x>_1`, ... there.
        vectors: (V, D).
        base: name of the base model, kept by A1111.
        widths: of each text encoder, where there are several.
    """
    if len(widths) > 1:
        pair = [_plain(part) for part in vectors.split(list(widths), dim=-1)]
        both = folder / f"{name}.safetensors"
        save_file(dict(zip(PAIR, pair, strict=True)), both, metadata={"format": "pt"})
        return [both, *write_each(folder, placeholder, vectors, widths)]
    safe = write_safe(folder, placeholder, vectors)
    vectors = _plain(vectors)
    binary, webui = folder / "learned_embeds.bin", folder / f"{name}.pt"
    torch.save({placeholder: vectors}, binary)
    torch.save(
        {
            "string_to_token": {"*": torch.tensor(265)},  # CLIP's "*"; A1111 and diffusers ignore the number
            "string_to_param": {"*": vectors},
            "name": name,  # without it diffusers refuses the file
            "step": 0,
            "sd_checkpoint": None,
            "sd_checkpoint_name": base,
        },
        webui,
    )
    return [safe, binary, webui]


def write_safe(folder: Path, placeholder: str, vectors: Tensor, file: str = SAFE) -> Path:
    """Write diffusers' safetensors alone, under the name `file`; other arguments as `write`."""
    path = folder / file
    save_file({placeholder: _plain(vectors)}, path, metadata={"format": "pt"})
    return path


def _plain(vectors: Tensor) -> Tensor:
    """Rows as files hold them: float32, in memory of their own."""
    return vectors.detach().cpu().float().contiguous().clone()
