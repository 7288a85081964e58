"""Changes of a weight's singular values (SVDiff, Han et al. 2023): its directions stay, how strongly each counts moves.

As svdiff_pytorch/layers.py of the public reimplementation (mkshing/svdiff-pytorch), whose product of three matrices
this equals but for rounding. Axes: r = min(outputs, inputs) singular values of a weight (outputs, inputs).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab.model.offsets import Added, Change

log = logging.getLogger(__name__)
LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)  # whose weights have spectra


@dataclass(frozen=True)
class Spectrum:
    """The reduced singular value decomposition W = left diag(values) right of a weight as a matrix.

    A convolution's matrix is (outputs, inputs h w), a norm layer's weight one row.

    Args:
        left: U, (outputs, r).
        values: sigma, (r,), 0 or more.
        right: V transposed, (r, inputs).
    """

    left: Tensor
    values: Tensor
    right: Tensor


def matrix(weight: Tensor) -> Tensor:
    """A weight of any shape as the matrix that is decomposed: outputs by everything else, a vector as one row."""
    return weight[None] if weight.dim() == 1 else weight.flatten(1)


def decomposed(weight: Tensor) -> Spectrum:
    """The spectrum of a weight of any shape, float32 on the CPU.

    Singular vectors of near singular values differ between libraries, and with them what a shift means: hence always
    the same precision and processor.
    """
    return Spectrum(*torch.linalg.svd(matrix(weight.detach()).cpu().float(), full_matrices=False))


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Spectrum]] = WeakKeyDictionary()


def spectra(module: nn.Module) -> dict[str, Spectrum]:
    """Spectra of all linear, convolution, norm and embedding layers by name, in the module's order.

    They are worked out once per module, on the CPU: minutes for Stable Diffusion.
    """
    if module not in _KNOWN:
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
        log.info("the singular values of %d weights are worked out once; with Stable Diffusion: minutes", len(layers))
        if any(layer.weight.dtype in (torch.float16, torch.bfloat16) for layer in layers.values()):
            log.warning(
                "the weights were rounded to half precision before: what is learnt belongs to this precision, and "
                "files of others fit it badly. precision=fp32 or tf32 keeps the weights."
            )
        _KNOWN[module] = {name: decomposed(layer.weight) for name, layer in layers.items()}
    return _KNOWN[module]


class Spectra(nn.Module):
    """Spectra that go along to the device of the module that holds them, and into no checkpoint.

    Args:
        found: by layer.
    """

    def __init__(self, found: dict[str, Spectrum]) -> None:
        super().__init__()
        self.names = tuple(found)
        for name, spectrum in found.items():
            for part in ("left", "values", "right"):
                self.register_buffer(self._key(name, part), getattr(spectrum, part), persistent=False)

    @staticmethod
    def _key(name: str, part: str) -> str:
        return f"{name.replace('.', '/')}/{part}"

    def __getitem__(self, name: str) -> Spectrum:
        return Spectrum(*(self.get_buffer(self._key(name, part)) for part in ("left", "values", "right")))


@dataclass(frozen=True)
class Shifted(Change):
    """W' = W + U diag(relu(sigma + scale shift) - sigma) V^T, as svdiff_pytorch/layers.py: W itself without a shift.

    Args:
        spectrum: of the frozen W.
        shift: delta, (r,).
        scale: s, factor of the shift.
    """

    spectrum: Spectrum
    shift: Tensor
    scale: float = 1.0

    def apply(self, weight: Tensor) -> Tensor:
        """W', same shape as W; the difference is worked out in the more precise type of shift and spectrum."""
        kept = self.spectrum
        dtype = torch.promote_types(self.shift.dtype, kept.values.dtype)
        left, values, right, shift = (
            each.to(weight.device, dtype) for each in (kept.left, kept.values, kept.right, self.shift)
        )
        moved = F.relu(values + self.scale * shift) - values
        return Added(((left * moved) @ right).reshape(weight.shape)).apply(weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """The shift (r,), then U (outputs, r), sigma (r,) and V^T (r, inputs)."""
        return self.shift, self.spectrum.left, self.spectrum.values, self.spectrum.right

    def settings(self) -> Hashable:
        """The factor."""
        return self.scale

    def joined(self, other: Change) -> Change | None:
        """Two shifts of one spectrum add up inside the rectifier (Han et al. 2023, section 3.2)."""
        if not isinstance(other, Shifted):
            return None
        return Shifted(self.spectrum, self.scale * self.shift + other.scale * other.shift)


def shifts(names: Iterable[str], kept: Spectra) -> nn.ParameterDict:
    """A trainable zero shift (1, r) for each named layer, float32; dots become slashes, as in `offsets.zeros`."""
    return nn.ParameterDict(
        {name.replace(".", "/"): nn.Parameter(torch.zeros(1, len(kept[name].values))) for name in names}
    )
