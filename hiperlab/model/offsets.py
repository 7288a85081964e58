"""Changes of U-Net weights as values: added for one call, while the frozen stack keeps its own numbers.

A change knows how to make the weight that a call uses out of the frozen one, so that dense differences, low-rank ones
and ones of single rows or columns are the same thing to the stack.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hiperlab.errors import UserError
from hiperlab.model.row_offsets import active, resumed

log = logging.getLogger(__name__)
PARTS = {  # which parameters a choice of `weights` means, by a part of their name
    "cross": (".attn2.",),
    "attention": (".attn1.", ".attn2."),
    "all": ("",),
}


class Change(ABC):
    """How one weight is changed; subclasses are frozen dataclasses of tensors that may require grad."""

    @abstractmethod
    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight W', same shape, type and device as the frozen W, which stays as it is."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it is made of, of any shape, always in the same order."""

    def settings(self) -> Hashable:
        """What it depends on beside its tensors."""
        return None

    def joined(self, other: Change) -> Change | None:
        """Both at once as one change; None where that is what each does to the frozen weight, added up."""
        return None


@dataclass(frozen=True)
class Added(Change):
    """W' = W + delta, a full tensor of the weight's shape (what fine-tuning W itself would learn)."""

    delta: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """W', same shape as W; summed in the more precise of the two types: half precision would lose a small delta."""
        dtype = torch.promote_types(weight.dtype, self.delta.dtype)
        return (weight.to(dtype) + self.delta.to(weight.device, dtype)).to(weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """The difference, same shape as W."""
        return (self.delta,)


@dataclass(frozen=True)
class LowRank(Change):
    """W' = W + scale * up down (LoRA, Hu et al. 2021, section 4.1; B and A there, scale = alpha / r).

    Args:
        down: A, (r, in) or for a convolution (r, in, h, w).
        up: B, (out, r) or (out, r, 1, 1).
        scale: factor of the product.
    """

    down: Tensor
    up: Tensor
    scale: float

    def apply(self, weight: Tensor) -> Tensor:
        """W', same shape as W, as an adapter beside the layer gives it but for rounding; see `Added` for the type."""
        delta = self.scale * (self.up.flatten(1) @ self.down.flatten(1))
        return Added(delta.reshape(weight.shape)).apply(weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """A (r, in, ...), then B (out, r, ...)."""
        return self.down, self.up

    def settings(self) -> Hashable:
        """The factor."""
        return self.scale


@dataclass(frozen=True)
class Offsets:
    """Changes by the module's own parameter names, e.g. "mid_block.attentions.0. ... .attn2.to_k.weight"."""

    changes: Mapping[str, Change]

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The changed weights, same shape as the module's own, by its names, for `torch.func.functional_call`.

        Raises:
            KeyError: a name that the module does not have.
        """
        frozen = dict(module.named_parameters())
        return {name: change.apply(frozen[name]) for name, change in self.changes.items()}

    def same(self, other: Offsets) -> bool:
        """Whether both are the same numbers in the same memory (values are not compared: they may be gigabytes)."""
        if self is other:
            return True
        return self.changes.keys() == other.changes.keys() and all(
            mine.data_ptr() == theirs.data_ptr()
            and mine.shape == theirs.shape
            and change.settings() == other.changes[name].settings()
            for name, change in self.changes.items()
            for mine, theirs in zip(change.tensors(), other.changes[name].tensors(), strict=True)
        )


def modules_named(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Linear and convolution layers whose names end in one of `targets`, as PEFT matches them, in the module's order.

    Raises:
        UserError: a target that no layer's name ends in.
    """
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"no layer's name ends in {target!r}. U-Net: to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, "
                "proj_in, proj_out, conv1, conv2; text encoder: q_proj, k_proj, v_proj, out_proj, fc1, fc2."
            )
    return [name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)]


def parameter_names(unet: nn.Module, weights: str) -> list[str]:
    """The U-Net's parameters that a choice of weights means, in the U-Net's order.

    Args:
        unet: the U-Net.
        weights: "cross" (cross-attention), "attention" (self-attention too) or "all".

    Raises:
        UserError: another choice.
    """
    if weights not in PARTS:
        raise UserError(f"weights={weights!r} is unknown. Choose {', '.join(PARTS)}.")
    return [name for name, _ in unet.named_parameters() if any(part in name for part in PARTS[weights])]


def zeros(module: nn.Module, names: Iterable[str], concepts: int = 1) -> nn.ParameterDict:
    """A trainable zero offset (K, *shape) for each named parameter, float32; the first axis is the concept's.

    Dots become slashes: a module's tensors cannot have dots in their names.
    """
    shapes = {name: weight.shape for name, weight in module.named_parameters()}
    return nn.ParameterDict(
        {name.replace(".", "/"): nn.Parameter(torch.zeros(concepts, *shapes[name])) for name in names}
    )


def added(offsets: nn.ParameterDict, index: int = 0) -> Offsets:
    """What `zeros` made and training filled, of concept `index`, by the module's own names."""
    return Offsets({name.replace("/", "."): Added(value[index]) for name, value in offsets.items()})


def log_cost(count: int, smaller: str, setting: str = "method.weights=all") -> None:
    """Warn of the memory that fitting `count` weights takes.

    Counted are the offset, its gradient, two Adam moments and the changed weight, float32.

    Args:
        count: number of weights.
        smaller: what to say of a smaller choice.
        setting: what asked for it.
    """
    log.warning(
        "%s fits %.1f million weights: %.1f GB besides the model while training, %.1f GB for the "
        "artifact and three times that for every checkpoint (fit.checkpoint_every). %s",
        setting, count / 1e6, 20 * count / 1e9, 4 * count / 1e9, smaller,
    )  # fmt: skip


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """Gradient checkpointing that replays a block with the weights it had in the forward pass.

    The plain form replays `module` after the call's weights are gone, with the frozen ones: torch refuses, or the
    gradients are wrong.
    """
    now: dict[str, Tensor] = dict(module.named_parameters())  # under functional_call these are the changed ones
    beside = active()

    def block(*inputs: Any) -> Any:
        with resumed(beside):
            return functional_call(module, now, inputs)

    return checkpoint(block, *args, use_reentrant=False)
