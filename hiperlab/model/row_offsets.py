"""Offsets that differ from row to row of one U-Net call: they run beside the layers, which keep the frozen weights.

Nothing in Stable Diffusion's U-Net mixes the rows of a batch, so that several concepts' offsets share one pass of the
frozen network, and each row gives what a call with its own changed weights would (but for rounding).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab.model.layer_hooks import hooked


@dataclass(frozen=True)
class RowOffsets:
    """Offsets of K concepts: row b of a layer reads scale[k] * delta[k] beside its own weight or bias, k = which[b].

    Args:
        changes: parameter name -> delta (K, out, in, ...) of a weight or (K, out) of a bias, as `Added` has them in
            `hiperlab.model.offsets`; or for a weight A (K, r, in, ...) and B (K, out, r, ...), as `LowRank`.
        scale: (K,) factor of each concept's changes.
        which: (B,) int64, the concept of each row.
    """

    changes: Mapping[str, tuple[Tensor, ...]]
    scale: Tensor
    which: Tensor

    def rows(self, index: Tensor) -> RowOffsets:
        """The offsets of R chosen rows, numbers (R,) in [0, B); repeats are allowed."""
        return RowOffsets(self.changes, self.scale, self.which[index.to(self.which.device)])

    def form(self) -> Hashable:
        """Equal for offsets whose rows can share a call: pairs of any layers and ranks, or whole deltas."""
        kinds = {len(tensors) for tensors in self.changes.values()}
        if len(kinds) == 1:
            return kinds.pop()
        return tuple((name, *(tuple(each.shape[1:]) for each in tensors)) for name, tensors in self.changes.items())

    def same(self, other: RowOffsets) -> bool:
        """Whether both are of the same layers, the same memory and the same factors, for whatever rows."""
        return (
            self.changes.keys() == other.changes.keys()
            and all(
                mine.data_ptr() == theirs.data_ptr()
                for name, tensors in self.changes.items()
                for mine, theirs in zip(tensors, other.changes[name], strict=True)
            )
            and torch.equal(self.scale, other.scale)
        )

    @contextmanager
    def beside(self, module: nn.Module) -> Iterator[None]:
        """While inside, the module's named layers give their offsets too; the module itself is not changed."""
        hooks = [(name.rpartition(".")[0], partial(self._add, tensors)) for name, tensors in self.changes.items()]
        token = _ACTIVE.set((self, module))
        try:
            with hooked(module, hooks):
                yield
        finally:
            _ACTIVE.reset(token)

    def _add(self, tensors: tuple[Tensor, ...], layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (B, ...) with each row's product, worked out in the more precise of the two types."""
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, tensors[0].dtype))
        *first, last = (each[self.which].to(x) for each in tensors)
        last = last * self.scale[self.which].to(x).view(-1, *[1] * (last.dim() - 1))  # far fewer numbers than x
        if last.dim() == 2:  # of a bias
            shape = [-1, 1, 1] if isinstance(layer, nn.Conv2d) else [*[1] * (output.dim() - 2), -1]
            return (output.to(x) + last.view(len(last), *shape)).to(output.dtype)
        if isinstance(layer, nn.Conv2d) and not first:
            summed = output.flatten(2).to(x) + _convolved(x, last, layer)
        elif isinstance(layer, nn.Conv2d):
            summed = torch.baddbmm(output.flatten(2).to(x), last.flatten(2), _convolved(x, first[0], layer))
        else:
            x = x.reshape(len(x), -1, x.shape[-1])
            reduced = torch.bmm(x, first[0].mT) if first else x
            summed = torch.baddbmm(output.reshape(*x.shape[:2], -1).to(x), reduced, last.mT)
        return summed.view(output.shape).to(output.dtype)


def _convolved(x: Tensor, down: Tensor, layer: nn.Conv2d) -> Tensor:
    """A x (B, r, H' W') of x (B, in, H, W), each row's A (B, r, in, h, w) as a convolution of the layer's own form."""
    count, rank = down.shape[:2]
    assert layer.groups == 1 and layer.padding_mode == "zeros", "as all of Stable Diffusion's are"
    reduced = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, count
    )
    return reduced.view(count, rank, -1)


_ACTIVE: ContextVar[tuple[RowOffsets, nn.Module] | None] = ContextVar("row offsets of the running call", default=None)


def active() -> tuple[RowOffsets, nn.Module] | None:
    """What the running call adds beside its layers, for `resumed`."""
    return _ACTIVE.get()


def resumed(kept: tuple[RowOffsets, nn.Module] | None) -> AbstractContextManager[None]:
    """The same offsets for a block that is replayed when its call is over; in the first pass they are there already."""
    return nullcontext() if kept is None or _ACTIVE.get() is not None else kept[0].beside(kept[1])


def joined(parts: Sequence[tuple[RowOffsets | None, int]]) -> RowOffsets | None:
    """The offsets of rows set side by side.

    Args:
        parts: offsets and number of rows of each. A part without any (guidance's unconditional half) takes those of the
            others, in their order: it has as many rows as they have together.

    Raises:
        ValueError: offsets of different forms, or a part without any of another number of rows.
    """
    own = [offsets for offsets, _ in parts if offsets is not None]
    if not own:
        return None
    distinct: list[RowOffsets] = []
    places = []  # where each part's concepts stand among those of all
    for offsets in own:
        if offsets.form() != own[0].form():
            raise ValueError("rows whose offsets are of other layers or ranks need calls of their own")
        number = next((number for number, known in enumerate(distinct) if offsets.same(known)), len(distinct))
        if number == len(distinct):
            distinct.append(offsets)
        places.append(sum(len(known.scale) for known in distinct[:number]))
    numbers = [offsets.which + place for offsets, place in zip(own, places, strict=True)]
    together, remaining, which = torch.cat(numbers), iter(numbers), []
    for part, count in parts:
        if part is None and count != len(together):
            raise ValueError(f"{count} rows without offsets beside {len(together)} rows with")
        which.append(together if part is None else next(remaining))
    if len(distinct) == 1:
        return RowOffsets(own[0].changes, own[0].scale, torch.cat(which))
    names = dict.fromkeys(name for known in distinct for name in known.changes)
    changes = {name: _side_by_side(name, distinct) for name in names}
    return RowOffsets(changes, torch.cat([known.scale for known in distinct]), torch.cat(which))


def _side_by_side(name: str, offsets: Sequence[RowOffsets]) -> tuple[Tensor, ...]:
    """The changes of one parameter for all concepts: zeros where one has none, or a smaller rank."""
    every = [known.changes[name] for known in offsets if name in known.changes]
    rank = max(tensors[0].shape[1] for tensors in every)
    found = []
    for known in offsets:
        tensors = known.changes.get(name) or tuple(
            each.new_zeros(len(known.scale), *each.shape[1:]) for each in every[0]
        )
        if len(tensors) == 2:  # A (K, r, in, ...) and B (K, out, r, ...)
            tensors = _padded(tensors[0], 1, rank), _padded(tensors[1], 2, rank)
        found.append(tensors)
    return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))


def _padded(tensor: Tensor, axis: int, length: int) -> Tensor:
    """The tensor with zeros behind it along an axis, so that it is `length` long there."""
    shape = list(tensor.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor
