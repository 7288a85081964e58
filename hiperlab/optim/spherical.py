"""Gradient descent on unit spheres, as Directional Textual Inversion trains directions (Kim et al. 2026).

Follows SphericalSGD of the authors' src/dti/optim.py (kunheek/dti). Everything happens row by row, a row being a
parameter's last axis, so that stacked concepts and several rows of one word do not see one another.
Symbols: v (a unit row), g (its gradient), s (running mean of |g|^2, one number per row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.errors import UserError


class SphericalSGD(Optimizer):
    """Riemannian gradient descent: tangent gradient, one step size per row, back onto the sphere.

    With beta 0 the tangent gradient is scaled to length 1: lr is then the tangent of the angle per step, whatever the
    loss, the batch or the length that the rows are used with.

    Args:
        params: tensors (..., D) of unit rows, float32 or more: a half-precision entry of 1 / sqrt(D) loses a third of
            a step of 1e-2.
        lr: step size.
        beta: share of the past in s, in [0, 1).
        eps: added to the root of s.

    Attributes:
        pulls: parameter -> vector (..., D) that is subtracted from its gradient first: kappa mu, the gradient of the
            log-density of a von Mises-Fisher prior around mu. It is no part of the loss.

    Raises:
        UserError: a number is out of its range.
    """

    def __init__(self, params: Iterable[Any], lr: float, beta: float, eps: float) -> None:
        for name, value, holds, range_ in (
            ("lr", lr, lr > 0, "above 0"),
            ("beta", beta, 0 <= beta < 1, "0 to below 1"),
            ("eps", eps, eps > 0, "above 0"),
        ):
            if not holds or not math.isfinite(value):
                raise UserError(f"method.optimizer.{name}={value} is out of range. Choose a number, {range_}.")
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})
        self.pulls: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every row that has a gradient; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for rows in group["params"]:
                if rows.grad is not None:
                    self._turn(rows, group)
        return loss

    def _turn(self, v: Tensor, group: dict[str, Any]) -> None:
        state, beta, g = self.state[v], group["beta"], v.grad
        assert g is not None
        count = state["step"] = state.get("step", 0) + 1
        s = state.setdefault("square", torch.zeros_like(v[..., :1]))
        if v in self.pulls:
            g = g - self.pulls[v].to(g)  # before the projection: only what turns the row is left of it
        g = g - (g * v).sum(-1, keepdim=True) * v
        s.mul_(beta).add_(g.square().sum(-1, keepdim=True), alpha=1 - beta)
        g = g / ((s / (1 - beta**count)).sqrt() + group["eps"])
        v.sub_(g, alpha=group["lr"])
        v.div_(v.norm(dim=-1, keepdim=True))
