"""Hooks on named layers for the length of one U-Net call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]  # layer, inputs, output -> what stands for the output


@contextmanager
def hooked(module: nn.Module, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
    """While inside, layers give what their hooks make of their outputs; the module itself is not changed.

    Args:
        module: the U-Net.
        hooks: path of a layer and its hook; those of one layer act one after the other.
    """
    found = [(module.get_submodule(name), hook) for name, hook in hooks]
    handles = [layer.register_forward_hook(hook) for layer, hook in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
