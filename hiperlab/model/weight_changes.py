"""A weight times (1 + a matrix of low rank), E4T's change of a projection; changes in turn, added up, and done."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hiperlab.model.offsets import Change, Offsets


@dataclass(frozen=True)
class Multiplied(Change):
    """W' = W (1 + left right^T), elementwise product (E4T, methods/e4t.md section 3).

    Args:
        left: (outputs, k).
        right: (inputs, k).
    """

    left: Tensor
    right: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """In the more precise of the two types, then in the weight's."""
        kind = torch.promote_types(weight.dtype, self.left.dtype)
        delta = (self.left @ self.right.mT).to(weight.device, kind)
        return (weight.to(kind) * (1 + delta)).to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.left, self.right


@dataclass(frozen=True)
class InTurn(Change):
    """Changes of one weight, each of what the one before made.

    Args:
        parts: first to last.
    """

    parts: tuple[Change, ...]

    def apply(self, weight: Tensor) -> Tensor:
        """Between the parts in the more precise type: the weight's would round twice."""
        kind = weight.dtype
        for each in self.parts[0].tensors():
            kind = torch.promote_types(kind, each.dtype)
        made = weight.to(kind)
        for part in self.parts:
            made = part.apply(made)
        return made.to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Of all parts."""
        return tuple(each for part in self.parts for each in part.tensors())

    def settings(self) -> Hashable:
        """Of all parts."""
        return tuple(part.settings() for part in self.parts)


@dataclass(frozen=True)
class Summed(Change):
    """Changes of one weight that know nothing of one another: W' = W + sum over i of (W'_i - W).

    Args:
        parts: in any order.
    """

    parts: tuple[Change, ...]

    def apply(self, weight: Tensor) -> Tensor:
        """Added in the most precise type of all parts."""
        kind = weight.dtype
        for each in self.tensors():
            kind = torch.promote_types(kind, each.dtype)
        frozen = weight.to(kind)
        return (frozen + sum(part.apply(frozen).to(kind) - frozen for part in self.parts)).to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Of all parts."""
        return tuple(each for part in self.parts for each in part.tensors())

    def settings(self) -> Hashable:
        """Of all parts."""
        return tuple(part.settings() for part in self.parts)


@dataclass(frozen=True)
class Done(Change):
    """A weight that was worked out before, so that several calls of a step share it (and its graph).

    Args:
        weight: what the call uses.
    """

    weight: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """The one it holds."""
        return self.weight

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)


def work_out(offsets: Offsets, module: nn.Module) -> Offsets:
    """The same changes with every weight made now."""
    return Offsets({name: Done(weight) for name, weight in offsets.weights(module).items()})


def add_up(several: Sequence[Offsets | None]) -> Offsets | None:
    """Several methods' changes at once: a weight that one of them changes is its, others are sums; None for none."""
    by_name: dict[str, list[Change]] = {}
    for offsets in several:
        for name, change in offsets.changes.items() if offsets else ():
            by_name.setdefault(name, []).append(change)
    if not by_name:
        return None
    return Offsets({name: each[0] if len(each) == 1 else Summed(tuple(each)) for name, each in by_name.items()})
