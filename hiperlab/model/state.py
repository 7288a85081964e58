"""Whether named tensors are those of a module: asked of artifacts, checkpoints and files of other tools."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def misfits(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names that only one side has, then those whose shapes differ; empty where all fits. Tensors of any shape."""
    shared = sorted(own.keys() & theirs.keys())
    return sorted(own.keys() ^ theirs.keys()) + [name for name in shared if own[name].shape != theirs[name].shape]
