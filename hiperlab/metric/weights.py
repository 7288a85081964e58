"""Where the judges' weights come from: a file the user names, the local hub cache, or one honest download.

The hub's client retries a dead connection for 20 to 50 seconds per file and prints a page of warnings. Here a short
probe decides once per process whether the hub can be reached; if not, the answer is one line that says what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.hub import first_line, hub_problem

CHECKPOINTS = (".safetensors", ".bin", ".pth", ".pt")

log = logging.getLogger(__name__)


class MissingWeightsError(UserError):
    """A judge's weights cannot be had; the message says which file, where to put it and which override names it."""


def hub_file(repo: str, names: Sequence[str], what: str, key: str) -> Path:
    """The first of `names` that the hub repository has, from the cache or downloaded (announced in the log).

    Args:
        repo: hub id, e.g. "timm/vit_small_patch16_224.dino".
        names: file names in order of preference.
        what: how to call the weights in a message.
        key: the config key that takes a local file instead.

    Raises:
        MissingWeightsError: neither cached nor to be had; within about ten seconds where there is no connection.
    """
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            return Path(cached)
    reason = hub_problem()
    for name in names if reason is None else ():
        try:
            log.warning("Downloading the weights of %s (%s from %s), once.", what, name, repo)
            return Path(huggingface_hub.hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it means: the connection broke
            reason = first_line(error)
            break
        except EntryNotFoundError:
            reason = f"{repo} has no {' or '.join(names)}"
        except (HfHubHTTPError, OSError) as error:
            reason = first_line(error)
            break
    raise MissingWeightsError(
        f"weights of {what} are not here ({reason}). Fetch them where there is a connection with "
        f"`hf download {repo} {names[0]}`, or copy that file here and set {key}=<file>."
    )


def local_file(path: str, what: str, key: str) -> Path:
    """The checkpoint at `path`: the file itself, or the one checkpoint in that folder (safetensors preferred).

    Raises:
        MissingWeightsError: no such file, or a folder without a checkpoint.
        UserError: a folder with several checkpoints of the preferred kind.
    """
    given = files.expand(path)
    if given.is_file():
        return given
    if not given.is_dir():
        raise MissingWeightsError(f"{key}={path} does not exist: give the checkpoint file of {what}, or its folder.")
    for suffix in CHECKPOINTS:
        found = sorted(file for file in given.iterdir() if file.suffix == suffix)
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise UserError(f"{key}={path} holds several checkpoints ({listed}): name the file of {what}.")
        if found:
            return found[0]
    raise MissingWeightsError(f"{key}={path} holds no checkpoint ({', '.join(CHECKPOINTS)}): put that of {what} there.")


def read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; pickles only through torch's safe unpickler.

    Raises:
        UserError: the file is broken or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own family of errors; all mean an unusable file
        raise UserError(
            f"{file} cannot be read as weights of {what} ({first_line(error)}): "
            "give a safetensors file or a plain state dict."
        ) from error
    for inner in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(inner), dict):
            loaded = loaded[inner]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{file} is no state dict: give the weights of {what} as safetensors or a plain state dict.")
    return {name.removeprefix("module."): value for name, value in loaded.items()}
