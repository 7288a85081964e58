"""E4T's multiplicative weight offsets (Gal et al. 2023), W' = W (1 + delta), in their exact rank-3 form.

As e4t/weightoffsets.py of the public reimplementation (mkshing/e4t-diffusion), whose direct form this equals.
Axes: c outputs and r inputs of a projection; W is (c, r).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hiperlab.errors import UserError

INITS = ("linear", "zero")


class WeightOffset(nn.Module):
    """One projection's offset: a learnt constant, two linear maps, their outer product, a map of each axis.

    Parameters are named as in the public reimplementation. Everything is affine, so delta never needs the (c, r)
    matrices in between: delta = (Wr vy)(Wc vx)^T + (Wr 1) bc^T + br 1^T.

    Args:
        inputs: r.
        outputs: c.
        init: "linear" (the reimplementation: torch's own, delta is about 0.2 in size from the start) or "zero" (delta
            starts at 0, gradients reach the row map).

    Raises:
        UserError: another init.
    """

    def __init__(self, inputs: int, outputs: int, init: str = "linear") -> None:
        super().__init__()
        if init not in INITS:
            raise UserError(f"offset init {init!r} is unknown. Choose {' or '.join(INITS)}.")
        self.v = nn.Parameter(torch.ones(1))
        self.linear1 = nn.Linear(1, inputs)
        self.linear2 = nn.Linear(1, outputs)
        self.linear_column = nn.Linear(inputs, inputs)  # acts on the input axis, whatever its name
        self.linear_row = nn.Linear(outputs, outputs)
        if init == "zero":
            nn.init.zeros_(self.linear_row.weight)
            nn.init.zeros_(self.linear_row.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Factors (c, 3) and (r, 3) whose product, left right^T, is delta."""
        vx, vy = self.linear1(self.v), self.linear2(self.v)
        column, row = self.linear_column, self.linear_row
        left = torch.stack([row.weight @ vy, row.weight.sum(1), row.bias], dim=1)
        right = torch.stack([column.weight @ vx, column.bias, torch.ones_like(vx)], dim=1)
        return left, right
