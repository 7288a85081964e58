"""Several methods trained in one loop: each step, the U-Net calls of all of them are joined.

Each keeps what it is alone: its concepts, seed, settings, draws, loss, clipping, optimizer and checkpoint. Only the
frozen network's pass is shared, so every one of them learns what it would alone (but for rounding), and any setting may
differ between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from hiperlab.base.method import Method
from hiperlab.data.batch import Batch
from hiperlab.model.shared_calls import together

HOOKS = ("on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_after_backward")


class SideBySide(pl.LightningModule):
    """A LightningModule of several methods around the same frozen stack.

    Args:
        methods: what is trained.
        read: the content of the checkpoint that method n goes on from.

    Attributes:
        active: numbers of those that are still trained.
        failed: why one of them was left out, by number.
        losses: the newest loss of each, 0-d, by number.
    """

    def __init__(self, methods: Sequence[Method], read: Callable[[int], dict[str, Any]]) -> None:
        super().__init__()
        self.methods = nn.ModuleList(methods)
        self.active = list(range(len(methods)))
        self.failed: dict[int, Exception] = {}
        self.losses: dict[int, Tensor] = {}
        self.writing = 0  # whose checkpoint is written
        self._read = read
        self._optimizers: _Optimizers | None = None

    def method(self, number: int) -> Method:
        """One of the methods."""
        found = self.methods[number]
        assert isinstance(found, Method)
        return found

    def leave(self, number: int, error: Exception | None = None) -> None:
        """Train it no further: it has finished, or failed with `error`."""
        if number in self.active:
            self.active.remove(number)
        if error is not None:
            self.failed[number] = error
        if not self.active:
            self.trainer.should_stop = True

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batches: Sequence[Batch], index: int) -> Tensor:
        """The sum, 0-d, of the losses of all that are still trained."""
        numbers = list(self.active)
        found = together(
            self.method(0).model,
            [self.method(number).step_calls(batches[number]) for number in numbers],
            failed=lambda place, error: self._drop(numbers[place], error),
        )
        self.losses = {number: loss for number, loss in zip(numbers, found, strict=True) if loss is not None}
        losses = list(self.losses.values())
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device, requires_grad=True)

    def _drop(self, number: int, error: Exception) -> None:
        """What goes wrong inside one method is its own affair; memory is everybody's."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        self.leave(number, error)

    def configure_optimizers(self) -> Optimizer:
        """Each method's own optimizer, stepped together."""
        own = [self.method(number).configure_optimizers() for number in range(len(self.methods))]
        self._optimizers = _Optimizers(own, self.active, self._drop)
        return self._optimizers

    def optimizer_of(self, number: int) -> Optimizer:
        """One method's own optimizer."""
        assert self._optimizers is not None, "Lightning asks for them first"
        return self._optimizers.own[number]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Each method clips its own gradients."""
        for number in self.active:
            own = self.optimizer_of(number)
            self.method(number).configure_gradient_clipping(own, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Show the mean loss; each method's own metrics go to its own loggers."""
        if self.losses:
            self.log("loss", torch.stack([loss.detach() for loss in self.losses.values()]).mean(), prog_bar=True)

    # ---- hooks that methods may have -------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Each method's own; they may ask for the trainer."""
        for number in range(len(self.methods)):
            self.method(number).trainer = self.trainer
        self._forward("on_fit_start")

    def on_fit_end(self) -> None:
        """Each method's own."""
        self._forward("on_fit_end")

    def on_train_start(self) -> None:
        """Each method's own."""
        self._forward("on_train_start")

    def on_train_end(self) -> None:
        """Each method's own."""
        self._forward("on_train_end")

    def on_after_backward(self) -> None:
        """Each method's own."""
        self._forward("on_after_backward")

    def _forward(self, hook: str) -> None:
        for number in range(len(self.methods)):
            if number not in self.failed:
                getattr(self.method(number), hook)()

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **how: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: each method has a checkpoint of its own, see `on_save_checkpoint`."""
        return {}

    def load_state_dict(self, *args: Any, **how: Any) -> _IncompatibleKeys:
        """Nothing: see `on_load_checkpoint`."""
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make it the checkpoint of method `writing`, as a training of that one alone would write it."""
        method = self.method(self.writing)
        checkpoint["state_dict"] = method.state_dict()
        checkpoint["optimizer_states"] = [self.optimizer_of(self.writing).state_dict()]
        method.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load each method's own tensors; their optimizers follow when Lightning asks for it.

        Raises:
            UserError: a checkpoint is not of its method, or they stand at different steps.
        """
        states = []
        for number in range(len(self.methods)):
            own = self._read(number)
            assert own["global_step"] == checkpoint["global_step"], "only trainings at the same step go on together"
            states.append(own["optimizer_states"][0])
            self.method(number).on_load_checkpoint(own)
            self.method(number).load_state_dict(own["state_dict"])
        checkpoint["optimizer_states"] = [{"own": states}]


def shares_passes(method: type[Method]) -> bool:
    """Whether trainings of a method can share passes.

    Not if it says why it trains alone, if it does not train through `training_calls`, or has a Lightning hook that
    `SideBySide` passes over.
    """
    if method.why_alone or method.training_step is not Method.training_step:
        return False
    passed = (*HOOKS, "on_before_optimizer_step", "on_save_checkpoint", "on_load_checkpoint")
    own = {name for each in method.__mro__ if issubclass(each, Method) for name in vars(each) if name.startswith("on_")}
    return own <= set(passed)


class _Optimizers(Optimizer):
    """The optimizers of several methods as one: it steps those that are still trained.

    Args:
        own: one per method.
        active: whose turn it is; shared with `SideBySide`, which takes numbers out.
        failed: told the number of one whose step raised an error.
    """

    def __init__(self, own: Sequence[Optimizer], active: list[int], failed: Callable[[int, Exception], None]) -> None:
        self.own, self.active, self.failed = list(own), active, failed
        groups = [group for optimizer in own for group in optimizer.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups  # the very ones: a method may change its rate

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each that is still trained once the closure has been run."""
        value = None if closure is None else closure()
        for number in list(self.active):
            try:
                self.own[number].step()
            except Exception as error:
                self.failed(number, error)
        return value

    def state_dict(self) -> dict[str, Any]:
        """States of all, in their order."""
        return {"own": [optimizer.state_dict() for optimizer in self.own]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its own; `param_groups` are the new ones afterwards."""
        for optimizer, state in zip(self.own, state_dict["own"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.own for group in optimizer.param_groups]
