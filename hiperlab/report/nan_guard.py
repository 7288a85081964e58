"""A step whose loss or gradient is not finite is never taken: the weights stay those of the step before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.errors import StoppedError
from hiperlab.report.checkpoint import StepCheckpoints
from hiperlab.report.signals import exit_code


class _Micro(NamedTuple):
    """What one micro batch would be named by, kept until its step is judged."""

    loss: Tensor
    batch: Any
    timesteps: Tensor | None


class FiniteGuard(Callback):
    """Judges loss and gradient once per optimizer step, after unscaling and before clipping.

    One number is read from the device per step. With a gradient scaler only the loss is judged: an infinite gradient
    is how the scaler finds its scale, and it skips that step by itself.

    Args:
        checkpoints: names the last good checkpoint in the message; None leaves it out.
    """

    def __init__(self, checkpoints: StepCheckpoints | None = None) -> None:
        self.checkpoints = checkpoints
        self._batch: Any = None
        self._micros: list[_Micro] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember whose loss comes next."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, 0-d, and its names; nothing is read from the device here."""
        names = self._batch._replace(pixels=None) if hasattr(self._batch, "pixels") else None
        self._micros.append(_Micro(loss.detach(), names, getattr(pl_module, "last_timesteps", None)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop here if anything is not finite.

        Raises:
            StoppedError: naming step, concepts, views, sample numbers and timesteps; exit code 1.
        """
        micros, self._micros = self._micros, []
        judged = [torch.stack([micro.loss.float() for micro in micros])] if micros else []
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            judged += [norm.float()[None] for norm in torch._foreach_norm(gradients)] if gradients else []
        if not judged:
            return
        device = judged[0].device
        wrong = (~torch.cat([value.to(device) for value in judged]).isfinite()).any().float()
        if trainer.world_size > 1:  # all ranks stop together, or the healthy ones would wait for ever
            wrong = trainer.strategy.reduce(wrong, reduce_op="max")
        if wrong.item():
            raise StoppedError(self._message(trainer, pl_module, micros), exit_code(trainer, 1))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the last batch."""
        self._batch, self._micros = None, []

    def _message(self, trainer: Trainer, module: LightningModule, micros: list[_Micro]) -> str:
        """One line: which step, what was wrong, of whom, and what is left. Only ever built on failure."""
        finding = _finding(module, micros)
        findings: list[Any] = [finding]
        if trainer.world_size > 1:  # every rank is here; the rank with the bad loss knows the names
            findings = [None] * trainer.world_size
            torch.distributed.all_gather_object(findings, finding)
        culprit = max(range(len(findings)), key=lambda rank: findings[rank][0])  # the first of the guiltiest
        _, what, whom = findings[culprit]
        rank = f" on rank {culprit}" if trainer.world_size > 1 else ""
        kept = self.checkpoints.last_good if self.checkpoints else None
        left = f"The last good checkpoint is {kept}." if kept else "There is no earlier checkpoint."
        return (
            f"step {trainer.global_step + 1}{rank}: {what} ({whom or 'batch unnamed'}). "
            f"The step was not taken. {left} A lower learning rate or precision=fp32 may help."
        )


def _finding(module: LightningModule, micros: list[_Micro]) -> tuple[bool, str, str]:
    """Whether a loss was bad here, what was bad, and whose rows they were."""
    bad = [micro for micro in micros if not micro.loss.isfinite()]
    what = f"loss is {', '.join(str(micro.loss.item()) for micro in bad)}" if bad else _gradient_names(module)
    return bool(bad), what, "; ".join(filter(None, (_describe(module, micro) for micro in bad or micros)))


def _describe(module: LightningModule, micro: _Micro) -> str:
    """Each concept of a micro batch with its numbers: `cats views 0, 3 samples 8, 9 timesteps 981, 3`."""
    batch = micro.batch
    if batch is None:
        return ""
    parts = []
    for index in dict.fromkeys(batch.concept.tolist()):
        rows = (batch.concept == index).nonzero().flatten()
        values = {"views": batch.view[rows], "samples": batch.sample[rows]}
        if micro.timesteps is not None and len(micro.timesteps) == len(batch.concept):
            values["timesteps"] = micro.timesteps.to(rows.device)[rows]
        numbers = " ".join(f"{name} {', '.join(str(v) for v in value.tolist())}" for name, value in values.items())
        parts.append(f"{_concept_name(module, index)} {numbers}")
    return "; ".join(parts)


def _concept_name(module: LightningModule, index: int) -> str:
    concepts = getattr(module, "concepts", ())
    return getattr(concepts[index], "name", str(concepts[index])) if index < len(concepts) else f"concept {index}"


def _gradient_names(module: LightningModule) -> str:
    """The parameters whose gradient is not finite, with the concepts they are stacked by."""
    concepts = getattr(module, "concepts", ())
    names = []
    for name, parameter in module.named_parameters():
        if parameter.grad is None or parameter.grad.isfinite().all():
            continue
        stacked = parameter.dim() > 0 and len(parameter) == len(concepts) > 1
        rows = (~parameter.grad.isfinite()).flatten(1).any(1).nonzero().flatten().tolist() if stacked else []
        names.append(name + (f" ({', '.join(_concept_name(module, row) for row in rows)})" if rows else ""))
    listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"the gradient of {listed} is not finite" if names else "a gradient is not finite"
