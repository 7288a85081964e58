"""Adam's fused kernel: the same update but for rounding, and only where nobody chose another form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from hiperlab.optim.fused import fused


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 32), (3, 5, 7), (2, 4, 3, 3, 3), (1,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_update_is_the_same(kind) -> None:
    """Also after a state has been kept and loaded; gradients as backward leaves them, in their parameter's layout."""
    plain, quick = parameters(), parameters()
    optimizers = [kind(plain, lr=1e-2, weight_decay=0.1), fused(kind(quick, lr=1e-2, weight_decay=0.1))]
    assert optimizers[1].param_groups[0]["fused"]
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for mine, theirs in zip(plain, quick, strict=True):
            wanted = torch.randn(mine.shape[::-1], generator=generator)
            for each in (mine, theirs):
                each.grad = None
                (each.permute(*range(each.dim())[::-1]) * wanted).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        if step == 2:
            state = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = fused(kind(quick, lr=1e-2, weight_decay=0.1))
            optimizers[1].load_state_dict(state)
    for mine, theirs in zip(plain, quick, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_a_choice_is_kept() -> None:
    assert fused(Adam(parameters(), fused=False)).param_groups[0]["fused"] is False
    assert fused(AdamW(parameters(), foreach=True)).param_groups[0]["fused"] is None
    assert fused(SGD(parameters(), lr=1.0)).param_groups[0]["fused"] is None
