"""Files of StyleDiffusion: a list of T mapping networks saved by torch (the authors' stylediffusion.py, main).

The first release saves whole modules, a later one their state dicts. Both are read as data: torch's own module classes
are replaced by stand-ins without behaviour, so no trust is needed. Written are state dicts.
Axes: T timesteps, O rows of a network, P picture tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.formats import pickles

MODULES = tuple(
    f"torch.nn.modules.{name}"
    for name in (
        "container.ModuleDict", "container.ModuleList", "container.Sequential", "conv.Conv1d",
        "batchnorm.BatchNorm1d", "activation.LeakyReLU",
    )
)  # fmt: skip
NAMES = {  # theirs -> ours; a convolution's kernel of one has an axis more
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "conv_start": "conv_start", "conv_block.0.0": "conv_block", "conv_block.0.1": "norm", "conv_end": "conv_end",
    }.items()
    for kind in ("weight", "bias")
}  # fmt: skip


def read(path: Path) -> dict[str, Tensor]:
    """Their networks as `layer.mapping.MappingNetworks`'s tensors, stacked over time; running statistics are not used.

    Args:
        path: `model-inner{N}-epoch{E}-learnv[...].pth`.

    Raises:
        UserError: it is missing, broken, holds more than networks, or other networks.
    """
    content = pickles.load(path, stand_ins=MODULES)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path.name} is no StyleDiffusion file: expected a list of one mapping network per timestep.")
    states = [dict(_tensors(each)) for each in content]
    for step, state in enumerate(states):
        if missing := sorted(NAMES.keys() - state.keys()):
            raise UserError(f"{path.name} is no StyleDiffusion file: network {step} lacks {missing[0]}.")
    found = {}
    for theirs, ours in NAMES.items():
        values = [state[theirs].detach().float() for state in states]
        if len({value.shape for value in values}) > 1:
            raise UserError(f"{path.name}: the networks differ in the shape of {theirs}.")
        stacked = torch.stack(values)
        found[ours] = stacked.squeeze(-1) if stacked.dim() == 4 else stacked
    return found


def write(path: Path, networks: Mapping[str, Tensor]) -> Path:
    """Write T networks as the later release does, a list of state dicts by the authors' names.

    Args:
        path: of the file.
        networks: the tensors of `layer.mapping.MappingNetworks`, (T, ...) each.
    """
    steps = len(networks["conv_end.bias"])
    states = []
    for step in range(steps):
        state = {}
        for theirs, ours in NAMES.items():
            value = networks[ours][step].detach().float().cpu().clone()
            state[theirs] = value[..., None] if value.dim() == 2 else value
        rows = len(state["conv_end.bias"])
        # Batch norm's buffers: never used, but their loader is strict.
        state["conv_block.0.1.running_mean"], state["conv_block.0.1.running_var"] = torch.zeros(rows), torch.ones(rows)
        state["conv_block.0.1.num_batches_tracked"] = torch.tensor(0)
        states.append(state)
    files.atomic_write(path, lambda file: torch.save(states, file))
    return path


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of a module whose class was replaced by a stand-in."""
    if isinstance(module, Mapping):
        yield from ((name, value) for name, value in module.items() if isinstance(value, Tensor))
        return
    inside = vars(module) if isinstance(module, pickles.Stub) else {}
    for name, value in inside.get("_parameters", {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
    for name, child in inside.get("_modules", {}).items():
        yield from _tensors(child, f"{prefix}{name}.")
