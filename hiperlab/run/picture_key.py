"""The key of a drawn picture: what its pixels depend on, complete by construction, so that none is shown as another's.

Everything that drawing is given goes in: the method's settings but for those it calls training-only or names in its
variants (a path with what its file holds), the concept, the artifact's tensors, all weights of the model, the sampler,
the texts. A setting too many draws a picture again; one too few would show an old picture under a new name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from hiperlab import files
from hiperlab.base.method import Method, Subject
from hiperlab.model.sampler import Sampler
from hiperlab.model.stack import FrozenStack, weights_digest

LONGEST_PATH = 1024  # of a setting that could be one


def model_inputs(stack: FrozenStack, precision: Mapping[str, Any]) -> dict[str, Any]:
    """What of a picture is the model's: all its weights, its schedule, its size, its precision."""
    return {
        "weights": weights_digest((stack.text, stack.unet, stack.vae)),
        "schedule": dict(stack.scheduler_config),
        "size": stack.size,
        "precision": dict(precision),
    }


def sampler_inputs(sampler: Sampler, negative: str | None, stack: FrozenStack) -> dict[str, Any]:
    """What of a picture is the sampler's; an absent negative text is an empty one where the model cannot tell."""
    return {
        "scheduler": sampler.scheduler,
        "options": sampler.options,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "negative": negative if stack.zero_negative else negative or "",
    }


def concept_inputs(
    method: type[Method], settings: Mapping[str, Any], subject: Subject, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What of a picture is the concept's.

    Args:
        method: its class.
        settings: the method's composed configuration.
        subject: the concept.
        tensors: of its artifact, of any shape.
    """
    elsewhere = {*method.training_settings, *method.variant_settings}
    return {
        "settings": {name: with_contents(value) for name, value in settings.items() if name not in elsewhere},
        "subject": asdict(subject),
        "artifact": tensors_digest(tensors),
    }


def with_contents(value: Any) -> Any:
    """A setting, or a list or table of them, in which the path of a file goes with what the file holds now."""
    if isinstance(value, Mapping):
        return {name: with_contents(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_contents(each) for each in value]
    if not isinstance(value, str) or len(value) > LONGEST_PATH or "\0" in value:
        return value
    path = files.expand(value)
    return [value, files.sha256(path)] if path.is_file() else value


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Names tensors, of any shape, by their numbers; a file's bytes also depend on the order of its metadata."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def picture_key(**inputs: Any) -> str:
    """16 hex digits that name everything a picture's pixels depend on.

    Args:
        inputs: plain values: those of model, sampler and concepts, the text, the seed and the variant.
    """
    content = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
