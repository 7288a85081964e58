"""Pickled files from outside: size-checked, read with torch's restricted unpickler, no code of theirs runs."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hiperlab.errors import UserError
from hiperlab.formats.disguises import disguise

MOST_BYTES = 2 * 1024**3  # no concept file is larger; a 1.9 MB zip was seen to unpack to 6.3 GB


class Stub:
    """Stands in for a class we do not have: keeps the pickled state, has no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def load(path: Path, stand_ins: Iterable[str] = (), most: int | None = None) -> Any:
    """Read a `.pt`, `.bin` or `.ckpt` file from outside onto the CPU.

    Args:
        path: the file.
        stand_ins: full names of classes to read as a `Stub`.
        most: bytes it may unpack to; None for what a concept may (`MOST_BYTES`).

    Raises:
        UserError: there is no such file, it is too large once unpacked, broken, or holds objects that are not data.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file. Give the path of a saved concept.")
    if what := disguise(path, safetensors=False):
        raise UserError(f"{path.name} {what}.")
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    if size > (most or MOST_BYTES):
        raise UserError(f"{path.name} unpacks to {size / 1e9:.1f} GB, concepts are far smaller: not loaded.")
    # One class per name: torch looks the stand-ins up by class.
    allowed = [(type(name.rsplit(".", 1)[-1], (Stub,), {}), name) for name in stand_ins]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {named[1]}, which is no tensor and no plain value"
        else:
            reason = " ".join(str(error).split()).split(". ")[0][:160]
        raise UserError(f"{path.name} is broken or holds more than tensors, so it is not loaded ({reason}).") from error
