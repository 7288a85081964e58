"""More changes of weights: E4T's product with (1 + a matrix of low rank), several in turn or added up, a ready weight.

Every `apply` keeps the shape, type and device of the frozen weight; tensors have any shape where none is named.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hiperlab.model.offsets import Change, Offsets


@dataclass(frozen=True)
class Multiplied(Change):
    """W' = W (1 + left right^T), elementwise product (E4T, Gal et al. 2023; see `hiperlab.layer.weight_offset`).

    Args:
        left: (outputs, k).
        right: (inputs, k).
    """

    left: Tensor
    right: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """W' (outputs, inputs): worked out in the more precise of the two types, then given the weight's."""
        dtype = torch.promote_types(weight.dtype, self.left.dtype)
        delta = (self.left @ self.right.mT).to(weight.device, dtype)
        return (weight.to(dtype) * (1 + delta)).to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors, (outputs, k) and (inputs, k)."""
        return self.left, self.right


@dataclass(frozen=True)
class Sequential(Change):
    """Changes of one weight in turn: each changes what the one before made.

    Args:
        parts: first to last.
    """

    parts: tuple[Change, ...]

    def apply(self, weight: Tensor) -> Tensor:
        """W', same shape as W; the more precise type is kept between the parts, as the weight's would round twice."""
        dtype = weight.dtype
        for each in self.parts[0].tensors():
            dtype = torch.promote_types(dtype, each.dtype)
        made = weight.to(dtype)
        for part in self.parts:
            made = part.apply(made)
        return made.to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all parts, of any shape."""
        return tuple(each for part in self.parts for each in part.tensors())

    def settings(self) -> Hashable:
        """The settings of all parts."""
        return tuple(part.settings() for part in self.parts)


@dataclass(frozen=True)
class Sum(Change):
    """Changes of one weight that know nothing of one another: W' = W + sum over i of (W'_i - W).

    Args:
        parts: in any order.
    """

    parts: tuple[Change, ...]

    def apply(self, weight: Tensor) -> Tensor:
        """W', same shape as W; added in the most precise type of all parts."""
        dtype = weight.dtype
        for each in self.tensors():
            dtype = torch.promote_types(dtype, each.dtype)
        frozen = weight.to(dtype)
        return (frozen + sum(part.apply(frozen).to(dtype) - frozen for part in self.parts)).to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all parts, of any shape."""
        return tuple(each for part in self.parts for each in part.tensors())

    def settings(self) -> Hashable:
        """The settings of all parts."""
        return tuple(part.settings() for part in self.parts)


@dataclass(frozen=True)
class Materialised(Change):
    """A weight that was worked out before, so that several U-Net calls share it and its gradient graph.

    Args:
        weight: what the call uses.
    """

    weight: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """The weight it holds, same shape as W; the frozen one is not read."""
        return self.weight

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight it holds, of any shape."""
        return (self.weight,)


def materialise(offsets: Offsets, module: nn.Module) -> Offsets:
    """The same changes, with every changed weight worked out now."""
    return Offsets({name: Materialised(weight) for name, weight in offsets.weights(module).items()})


def sum_changes(several: Sequence[Offsets | None]) -> Offsets | None:
    """Several methods' changes at once: a weight that several of them change gets the sum; None if none changes any."""
    by_name: dict[str, list[Change]] = {}
    for offsets in several:
        for name, change in offsets.changes.items() if offsets else ():
            by_name.setdefault(name, []).append(change)
    if not by_name:
        return None
    return Offsets({name: _at_once(each) for name, each in by_name.items()})


def _at_once(several: Sequence[Change]) -> Change:
    """All changes of one weight: those that have a form for that are joined, the others added up."""
    found: list[Change] = []
    for change in several:
        for place, known in enumerate(found):
            if (both := known.joined(change)) is not None:
                found[place] = both
                break
        else:
            found.append(change)
    return found[0] if len(found) == 1 else Sum(tuple(found))
