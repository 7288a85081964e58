"""The U-Net's calls as CUDA graphs: below some rows a GPU waits for the launches of thousands of small kernels.

A graph is recorded for each form of call (shapes, which inputs carry a gradient, which layers have offsets) with
`torch.cuda.make_graphed_callables`, forward and backward, and replayed afterwards: the same kernels on the same
numbers. A graph has one memory for its inputs, its output and what its backward needs, hence two rules: an output is
copied out at once, and a call whose predecessor of the same form has not been taken back yet runs eagerly.
Axes: B rows, C latent channels, H, W latent sides, L cross-attention layers, N tokens, D text width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hiperlab.model.conditioning import Conditioning
from hiperlab.model.row_offsets import RowOffsets

log = logging.getLogger(__name__)
UNet = Callable[[Tensor, Tensor, Conditioning], Tensor]
SEEN = 2  # calls of a form that run eagerly before it is recorded: rare forms are not worth it
OPTIONAL = ("values", "pooled", "sizes")  # tensors that a conditioning may have beside its keys
MOST = 16  # graphs: each keeps the memory of a whole pass


class CudaGraphs:
    """Answers U-Net calls by replaying graphs where that is possible.

    Args:
        unet: (z_t (B, C, H, W), timesteps (B,), conditioning) -> prediction (B, C, H, W), without side effects.
        record: makes a replaying function of a function and example tensors, as `torch.cuda.make_graphed_callables`.
    """

    def __init__(self, unet: UNet, record: Callable[..., Any] = torch.cuda.make_graphed_callables) -> None:
        self.unet, self.record = unet, record
        self.seen: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, Callable[..., Tensor] | None] = {}
        self.waiting: set[Hashable] = set()  # forms whose backward is still to come

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (B, C, H, W), replayed or worked out."""
        assert conditioning.offsets is None and conditioning.control is None, "those calls are no graphs"
        tensors = _tensors(latents, timestep, conditioning)
        gradient = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
        form = _form(tensors, conditioning, gradient)
        self.seen[form] += 1
        if self.seen[form] <= SEEN or form in self.waiting:
            return self.unet(latents, timestep, conditioning)
        if form not in self.graphs:
            self.graphs[form] = self._recorded(tensors, conditioning, gradient)
        graph = self.graphs[form]
        if graph is None:
            return self.unet(latents, timestep, conditioning)
        found = graph(*tensors).clone()
        if gradient:
            self.waiting.add(form)
            found.register_hook(lambda grad: self.waiting.discard(form))
        return found

    def _recorded(self, tensors: Sequence[Tensor], conditioning: Conditioning, gradient: bool) -> Any:
        """A graph of calls of this form; None where there are enough, or it cannot be recorded."""
        if sum(graph is not None for graph in self.graphs.values()) >= MOST:
            log.warning("%d forms of U-Net calls are CUDA graphs: further ones run without.", MOST)
            return None

        def call(*inputs: Tensor) -> Tensor:
            return self.unet(*_restored(inputs, conditioning))

        examples = tuple(each.detach().clone().requires_grad_(each.requires_grad and gradient) for each in tensors)
        try:
            with torch.set_grad_enabled(gradient):
                return self.record(call, examples, allow_unused_input=True)
        except RuntimeError as error:  # of a kernel that cannot be recorded; memory is everybody's affair
            if isinstance(error, torch.OutOfMemoryError):
                raise
            log.warning("a U-Net call cannot be recorded as a CUDA graph (%s): it runs without.", error)
            return None


def _tensors(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> list[Tensor]:
    """All tensors of a call, in one order."""
    found = [latents, timestep, conditioning.keys]
    found += [each for name in OPTIONAL if (each := getattr(conditioning, name)) is not None]
    if (beside := conditioning.row_offsets) is not None:
        found += [beside.scale, beside.which, *(each for tensors in beside.changes.values() for each in tensors)]
    return found


def _restored(tensors: Sequence[Tensor], like: Conditioning) -> tuple[Tensor, Tensor, Conditioning]:
    """The call whose tensors these are; names and flags are those of `like`."""
    latents, timestep, keys, *rest = tensors
    present: dict[str, Any] = {name: None if getattr(like, name) is None else rest.pop(0) for name in OPTIONAL}
    beside = None
    if like.row_offsets is not None:
        scale, which = rest.pop(0), rest.pop(0)
        changes = {name: tuple(rest.pop(0) for _ in each) for name, each in like.row_offsets.changes.items()}
        beside = RowOffsets(changes, scale, which)
    return latents, timestep, replace(like, keys=keys, row_offsets=beside, **present)


def _form(tensors: Sequence[Tensor], conditioning: Conditioning, gradient: bool) -> Hashable:
    """Equal for calls that one graph serves."""
    beside = conditioning.row_offsets
    names = None if beside is None else tuple((name, len(each)) for name, each in beside.changes.items())
    shapes = tuple((tuple(each.shape), each.dtype, gradient and each.requires_grad) for each in tensors)
    present = tuple(getattr(conditioning, name) is None for name in OPTIONAL)
    return gradient, present, conditioning.detach_first, names, shapes
