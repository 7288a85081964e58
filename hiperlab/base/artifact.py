"""One file per learnt concept: safetensors with everything needed to use it again, and a card that says how.

The file's metadata: format number, the method's class and settings, base model, concept. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from hiperlab import files
from hiperlab.base.capability import Exportable
from hiperlab.base.method import Method, Subject
from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.model.stack import Base

log = logging.getLogger(__name__)
MOVED = {  # what settings in artifacts of 2026 name -> where it is now
    "hiperlab.prior.Prior": "hiperlab.base.prior_preservation.Prior",
    "hiperlab.editing.PromptToPrompt": "hiperlab.edit.prompt_to_prompt.PromptToPrompt",
}
FORMAT = "hiperlab/3"
CHECKSUM = "sha256"
EARLIER = ("hiperlab/1", "hiperlab/2")  # of November 2026: other names of tensors, in checkpoints too; no checksum
RENAMED = {"place": "path_step", "made": "num_updates"}


@dataclass(frozen=True)
class Artifact:
    """A learnt concept as read from its file.

    Args:
        tensors: the method's own, without the concept axis.
        settings: the method's composed configuration, plain values, "_target_" included.
        base: the model it was learnt on.
        subject: name, placeholder and class noun.
        steps: optimizer steps behind it.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    base: Base
    subject: Subject
    steps: int


def write(
    path: Path, method: Method, index: int, settings: Mapping[str, Any], steps: int, *, half: bool = False
) -> None:
    """Write concept `index` of a trained method, whole or not at all.

    Args:
        path: `<name>.safetensors`.
        method: holds the concept.
        index: which concept.
        settings: the method's composed configuration (plain containers).
        steps: optimizer steps taken.
        half: floating numbers as float16, half the size, three digits; loading puts them into the method's type.

    Raises:
        UserError: a number is too large for float16.
    """
    subject = asdict(method.concepts[index])
    del subject["edit_settings"]  # of the data, not of what was learnt
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(settings),
        "base": json.dumps(method.model.base.as_dict()),
        "subject": json.dumps(subject),
        "steps": str(steps),
    }
    tensors = {name: value.contiguous() for name, value in method.artifact(index).items()}
    if half:
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
            raise UserError(f"{bad[0]} does not fit into float16: set fit.half_artifacts=false.")
    files.atomic_write(path, save(tensors, metadata | {CHECKSUM: _checksum(tensors, metadata)}))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over all tensors, of any shape, and all metadata but itself."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {CHECKSUM}):
        digest.update(f"{key}={metadata[key]}\n".encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path) -> Artifact:
    """Read and check a concept file; one of an earlier version carries no checksum, which is said.

    Raises:
        UserError: it is missing, torn, damaged, of another format, or holds numbers that are not finite.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"artifact {path} cannot be read ({error}). Give a .safetensors file of a hiperlab run."
        ) from error
    if CHECKSUM in metadata or metadata.get("format") == FORMAT:
        if metadata.get(CHECKSUM) != _checksum(tensors, metadata):
            raise UserError(f"artifact {path} is damaged: its content is not what its checksum says. Fetch it again.")
    elif metadata.get("format") in EARLIER:
        log.info("%s carries no checksum: an earlier version wrote it.", path)
    if metadata.get("format") == EARLIER[0]:
        tensors = {RENAMED.get(name, name): value for name, value in tensors.items()}
    elif metadata.get("format") not in (FORMAT, *EARLIER):
        raise UserError(
            f"{path} is no hiperlab artifact (format {metadata.get('format')!r}, expected {FORMAT!r}). Files of other "
            "tools load too, under their own names: learned_embeds.safetensors, *.bin, *.pt."
        )
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"artifact {path} holds NaN or infinite numbers in {', '.join(bad)}: its training had failed.")
    try:
        base, subject, settings = (json.loads(metadata[key]) for key in ("base", "subject", "settings"))
        if not isinstance(settings, dict):
            raise TypeError("settings are no mapping")
        base |= {name: tuple(base[name]) for name in ("fingerprint", "widths") if name in base}
        return Artifact(
            tensors,
            with_todays_names(settings),
            Base(**base),
            Subject(**{**subject, "targets": tuple(subject.get("targets", ()))}),
            int(metadata["steps"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"artifact {path}: its metadata are damaged ({first_line(error)}).") from error


def with_todays_names(settings: Any) -> Any:
    """Settings of an artifact with every `_target_` that has moved since under its name of today."""
    if isinstance(settings, dict):
        return {
            key: MOVED.get(value, value) if key == "_target_" else with_todays_names(value)
            for key, value in settings.items()
        }
    return [with_todays_names(each) for each in settings] if isinstance(settings, list) else settings


def is_own(path: Path) -> bool:
    """Whether a file carries our format mark; anything else is another tool's."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            return "format" in (file.metadata() or {}) and str(file.metadata()["format"]).startswith("hiperlab/")
    except safetensors.SafetensorError:
        return False


def load_into(method: Method, index: int, path: Path) -> None:
    """Put a concept file, ours or another tool's, in place `index` of a method.

    Raises:
        UserError: wrong method, base, shapes or settings, or an unreadable file.
    """
    if not is_own(path):
        if not path.is_file():
            raise UserError(f"artifact={path} does not exist.")
        if not isinstance(method, Exportable):
            raise UserError(f"{path.name}: {type(method).__name__} reads hiperlab's own artifacts (.safetensors) only.")
        method.load_foreign(index, path)
        return
    artifact = read(path)
    mine = f"{type(method).__module__}.{type(method).__qualname__}"
    theirs = artifact.settings.get("_target_", mine)
    if theirs != mine:
        raise UserError(f"{path} was learnt by {theirs}, this run uses {mine}. Choose that method: method=…")
    method.model.base.check(artifact.base, str(path))
    for name in method.fixed_settings:
        learnt, here = artifact.settings.get(name, getattr(method, name)), getattr(method, name)
        if learnt != here:
            raise UserError(f"{path} was learnt with method.{name}={learnt}, this run has {here}: set it to the same.")
    method.load_artifact(index, artifact.tensors)


class Written(NamedTuple):
    """What a run wrote of a concept.

    Attributes:
        subject: the concept.
        names: of its files in other tools' formats.
        said: what the prompts of other tools say in the placeholder's place.
    """

    subject: Subject
    names: list[str]
    said: str


def card(method: str, base: Base, note: str, steps: Sequence[int], run: str, written: Sequence[Written]) -> str:
    """Markdown that tells a stranger what the files beside it are and how to use them.

    Args:
        method: the method's name.
        base: the model the concepts belong to.
        note: what must be known of that model, "" for nothing.
        steps: optimizer steps behind the concepts' files; they may differ.
        run: command that trained them.
        written: each concept's files.
    """
    taken = " to ".join(str(each) for each in sorted({min(steps), max(steps)}))
    lines = [
        f"# {method} on {base.name}",
        "",
        f"Trained for {taken} steps with hiperlab: `{run}`",
        *([f"\n**Note:** {note}"] if note else []),
        "",
        "| concept | placeholder | class noun | file | for other tools | whose prompts say |",
        "|---|---|---|---|---|---|",
    ]
    for subject, names, said in written:
        others = ", ".join(f"`{name}`" for name in names) or "none"
        lines.append(
            f"| {subject.name} | `{subject.placeholder}` | {subject.word} | `{subject.name}.safetensors` | {others} | "
            f"{f'`{said}`' if names else '–'} |"
        )
    lines += [
        "",
        "Sample it again, with your own prompts:",
        "",
        "```",
        'python -m hiperlab.run run_dir=<this run> stages=[sample,score,summary] data.prompts=["{} on a boat"]',
        "```",
        "",
        f"It belongs to a base model of text width {'+'.join(map(str, base.widths or [base.width]))}, {base.layers} "
        f"cross-attention layers, {base.prediction_type} prediction. Other bases are refused.",
        "",
    ]
    if base.pooled_at == "end":
        lines += [
            "A learnt word is pooled at the end token here (`model.pooled_at=end`); with diffusers and the released "
            "configuration at the word itself, so its pictures differ there. `model.pooled_at=argmax` is as theirs.",
            "",
        ]
    return "\n".join(lines)
