"""Pickled files from outside: size-checked, read with torch's restricted unpickler, no code of theirs runs."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hiperlab.errors import UserError
from hiperlab.formats.disguises import disguise

MOST_BYTES = 2 * 1024**3  # no concept file is larger


class Stub:
    """Stands in for a class we do not have: keeps the pickled state, has no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def check_archive(path: Path) -> None:
    """Refuse what would take more memory than the file's own size; looked up in its directory, nothing is unpacked.

    Raises:
        UserError: a compressed archive, which torch never writes: 2 MB of it may hold 2 GB.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # torch's own reader says what is broken
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path.name} is a compressed archive ({unpacked / 1e9:.1f} GB), as torch writes none.")


def check_numbers(path: Path, content: Any) -> None:
    """Look at every tensor in nested containers.

    Raises:
        UserError: one is not finite, not of plain real numbers, or shows one number many times, so that a copy of it
            may be larger than any memory.
    """
    waiting = [content]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            if each.layout != torch.strided or each.is_complex() or each.is_quantized or each.is_meta:
                raise UserError(f"{path.name} holds a tensor of an unusual kind ({each.dtype}, {each.layout}).")
            if each.numel() * each.element_size() > each.untyped_storage().nbytes():
                raise UserError(f"{path.name} holds {tuple(each.shape)} out of fewer numbers: not loaded.")
            if not torch.isfinite(each).all():
                raise UserError(f"{path.name} holds NaN or infinite numbers: the training that wrote it had failed.")
        elif isinstance(each, Stub):
            waiting += each.__dict__.values()
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each


def named_tensors(path: Path, content: Any, what: str) -> dict[str, torch.Tensor]:
    """The content as named tensors.

    Args:
        path: of the file, for messages.
        content: what was read.
        what: what the file should be, "a LoRA file".

    Raises:
        UserError: it is something else.
    """
    if isinstance(content, Mapping):
        wrong = [
            key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))
        ]
        if content and not wrong:
            return dict(content)
        found = f"no tensor under {wrong[0]!r}" if wrong else "nothing"
    else:
        found = type(content).__name__
    raise UserError(f"{path.name} is not {what}: expected named tensors, found {found}.")


def load(path: Path, stand_ins: Iterable[str] = (), most: int | None = None) -> Any:
    """Read a `.pt`, `.bin` or `.ckpt` file from outside onto the CPU.

    Args:
        path: the file.
        stand_ins: full names of classes to read as a `Stub`.
        most: bytes it may have; None for what a concept may (`MOST_BYTES`).

    Raises:
        UserError: there is no such file, it is too large, compressed, broken, holds objects that are not data, or
            tensors that `check_numbers` refuses.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file. Give the path of a saved concept.")
    if what := disguise(path, safetensors=False):
        raise UserError(f"{path.name} {what}.")
    check_archive(path)
    size = path.stat().st_size
    if size > (most or MOST_BYTES):
        raise UserError(f"{path.name} has {size / 1e9:.1f} GB, concepts are far smaller: not loaded.")
    # One class per name: torch looks the stand-ins up by class.
    allowed = [(type(name.rsplit(".", 1)[-1], (Stub,), {}), name) for name in stand_ins]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_numbers(path, content)
        return content
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {named[1]}, which is no tensor and no plain value"
        else:
            reason = " ".join(str(error).split()).split(". ")[0][:160]
        raise UserError(f"{path.name} is broken or holds more than tensors, so it is not loaded ({reason}).") from error
