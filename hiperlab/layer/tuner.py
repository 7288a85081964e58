"""Ways to change a layer's weight with few numbers, each as an exact difference W' - W of the frozen W.

They are those of huggingface/peft, whose files under peft/tuners name the formulas, the starts and the parameters; the
code is ours. Differences, not weights: a fresh adapter then leaves W as it is bit for bit where the formula says so.
Axes: o outputs, i inputs of a layer, r rank, b block size; a convolution's W is the matrix (o, i h w).
"""

from __future__ import annotations

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hiperlab import draws
from hiperlab.errors import UserError, near

log = logging.getLogger(__name__)
Own = Mapping[str, Tensor]  # an adapter's tensors by the name that files have behind the layer's


def matrix(weight: Tensor) -> Tensor:
    """W (o, i) of a linear layer, or of a convolution as (o, i h w)."""
    return weight.flatten(1)


def uniform(seed: int, name: str, shape: Sequence[int], fan: int) -> Tensor:
    """Uniform on +-1 / sqrt(fan), float32: torch's and PEFT's kaiming_uniform_ with a = sqrt(5)."""
    drawn = draws.generator(seed, f"tuner {name}").random(tuple(shape), dtype="float32")
    return (2 * torch.from_numpy(drawn) - 1) / math.sqrt(fan)


@dataclass(frozen=True)
class Tuner(ABC):
    """One way, with its settings; the tensors of each layer are kept by who uses it.

    Args:
        targets: ends of the names of the layers that it changes.
    """

    targets: Sequence[str]

    peft_type: ClassVar[str]  # as adapter_config.json calls it
    frozen: ClassVar[tuple[str, ...]] = ()  # of the tensors, those that no training changes
    needed: ClassVar[dict[str, Any]] = {}  # of PEFT's settings, those that a file's shapes do not tell: their defaults
    convolutions: ClassVar[str] = "all"  # which it can change: "all", "1x1" or "none"
    linear_in_strength: ClassVar[bool] = True  # False: at strength 0 it is not the frozen W

    @abstractmethod
    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Its tensors before training, float32.

        Args:
            seed: of the draws.
            name: the layer's; part of their key.
            weight: the frozen W as the layer has it.

        Raises:
            UserError: the settings do not fit this layer.
        """

    @abstractmethod
    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """W' - W, same shape as W as the layer has it, at a strength (1 as trained)."""

    def bias_difference(self, bias: Tensor, own: Own, strength: float) -> Tensor | None:
        """C' - c of the layer's bias c (o,), or None where it stays."""
        return None

    def numbers(self) -> dict[str, float]:
        """Settings without which the tensors mean nothing and which their shapes do not tell, by name."""
        return {}

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings as PEFT's adapter_config.json names them, without the layers."""

    def to_file(self, own: Own) -> dict[str, Tensor]:
        """The tensors that a file holds for a layer."""
        return dict(own)

    def from_file(self, found: Own) -> dict[str, Tensor]:
        """The tensors that a file's tensors of a layer stand for."""
        return dict(found)

    def refuse(self, name: str, weight: Tensor) -> None:
        """Refuse a layer that it cannot change.

        Raises:
            UserError: naming the layer.
        """
        kernel = weight.shape[2:].numel() if weight.dim() == 4 else 0
        if (self.convolutions == "none" and kernel) or (self.convolutions == "1x1" and kernel > 1):
            which = "linear layers" if self.convolutions == "none" else "linear layers and 1x1 convolutions"
            raise UserError(
                f"{type(self).__name__} changes {which} only, {name} is a convolution "
                f"{'x'.join(map(str, weight.shape[2:]))}: take its name's end out of the targets."
            )


def _above(value: float, setting: str) -> None:
    if value <= 0:
        raise UserError(f"{setting}={value}: expected above 0.")


# ---- low rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRA(Tuner):
    """W' = W + alpha / r B A (Hu et al. 2021, section 4.1; peft/tuners/lora/layer.py).

    Args:
        targets: see `Tuner`.
        rank: r.
        alpha: see above.
        init: of A, B being 0: "uniform" on +-1 / sqrt(i) (PEFT), or "gaussian", N(0, 1 / r^2) (diffusers' scripts).
    """

    rank: int
    alpha: float
    init: str
    peft_type: ClassVar[str] = "LORA"
    needed: ClassVar[dict[str, Any]] = {"lora_alpha": 8, "use_rslora": False, "use_dora": False}

    def __post_init__(self) -> None:
        _above(self.rank, "rank")
        _above(self.alpha, "alpha")
        if self.init not in ("uniform", "gaussian"):
            raise UserError(f"init={self.init!r} is unknown.{near(self.init, ('uniform', 'gaussian'))}")

    @property
    def scale(self) -> float:
        """S, the factor of B A."""
        return self.alpha / self.rank

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """A (r, i, ...) at random, B (o, r, ...) zero."""
        shape = (self.rank, *weight.shape[1:])
        if self.init == "gaussian":
            down = draws.normal(seed, f"tuner {name}", [0], shape)[0] / self.rank
        else:
            down = uniform(seed, name, shape, weight.shape[1:].numel())
        ones = [1] * (weight.dim() - 2)
        return {"lora_A.weight": down, "lora_B.weight": torch.zeros(len(weight), self.rank, *ones)}

    def product(self, weight: Tensor, own: Own) -> Tensor:
        """S B A, same shape as W."""
        product = own["lora_B.weight"].flatten(1) @ own["lora_A.weight"].flatten(1)
        return (self.scale * product).view(weight.shape)

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength s B A."""
        return strength * self.product(weight, own)

    def numbers(self) -> dict[str, float]:
        """Alpha."""
        return {"alpha": self.alpha}

    def config(self) -> dict[str, Any]:
        """As LoraConfig."""
        return {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": False, "use_dora": False, "bias": "none"}


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA with alpha / sqrt(r) (Kalajdzievski 2023; `use_rslora` in peft/tuners/lora/layer.py)."""

    @property
    def scale(self) -> float:
        """S, the factor of B A."""
        return self.alpha / math.sqrt(self.rank)

    def config(self) -> dict[str, Any]:
        """As LoraConfig."""
        return {**super().config(), "use_rslora": True}


@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m X / |X| with X = W + s B A, row by row; |X| is a constant for the gradient (Liu et al. 2024, section 4.3).

    Follows peft/tuners/lora/dora.py: a strength multiplies s, and m stays.
    """

    linear_in_strength: ClassVar[bool] = False

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """LoRA's, and m (o,), or (1, o, 1, 1) of a convolution: the rows' lengths."""
        lengths = matrix(weight.detach()).float().norm(dim=1).cpu()
        return {
            **super().start(seed, name, weight),
            "lora_magnitude_vector": lengths if weight.dim() == 2 else lengths.view(1, -1, 1, 1),
        }

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """(d - 1) W + d s B A, where d = m / |X|."""
        change = matrix(strength * self.product(weight, own))
        lengths = (matrix(weight) + change).detach().norm(dim=1)
        factor = (own["lora_magnitude_vector"].flatten() / lengths)[:, None]
        return ((factor - 1) * matrix(weight) + factor * change).view(weight.shape)

    def config(self) -> dict[str, Any]:
        """As LoraConfig."""
        return {**super().config(), "use_dora": True}


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from W's r largest singular values, which W loses: W' = W + s (B A - B0 A0) (Meng et al. 2024).

    As pissa_init of peft/tuners/lora/layer.py. Files hold the difference to the start, a LoRA of rank 2r: A and B alone
    are wrong on an unmodified base.
    """

    frozen: ClassVar[tuple[str, ...]] = ("start_A", "start_B")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """A = sqrt(sigma / s) V^T (r, i, ...), B = U sqrt(sigma / s) (o, r, ...), and the same as A0, B0."""
        least = min(matrix(weight).shape)
        if self.rank > least:
            raise UserError(f"rank={self.rank}: {name} has {least} singular values.")
        left, values, right = torch.linalg.svd(matrix(weight.detach()).float().cpu(), full_matrices=False)
        root = (values[: self.rank] / self.scale).sqrt()
        down = (root[:, None] * right[: self.rank]).view(self.rank, *weight.shape[1:])
        up = (left[:, : self.rank] * root).view(len(weight), self.rank, *[1] * (weight.dim() - 2))
        return {"lora_A.weight": down, "lora_B.weight": up, "start_A": down.clone(), "start_B": up.clone()}

    def product(self, weight: Tensor, own: Own) -> Tensor:
        """S (B A - B0 A0), same shape as W."""
        first = {"lora_A.weight": own["start_A"], "lora_B.weight": own["start_B"]}
        return super().product(weight, own) - super().product(weight, first)

    def config(self) -> dict[str, Any]:
        """As LoraConfig, of the difference: the same alpha / r."""
        return {**super().config(), "r": 2 * self.rank, "lora_alpha": 2 * self.alpha}

    def to_file(self, own: Own) -> dict[str, Tensor]:
        """A over A0 (2r, i, ...), B beside -B0 (o, 2r, ...)."""
        return {
            "lora_A.weight": torch.cat([own["lora_A.weight"], own["start_A"]]),
            "lora_B.weight": torch.cat([own["lora_B.weight"], -own["start_B"]], dim=1),
        }

    def from_file(self, found: Own) -> dict[str, Tensor]:
        """Any LoRA of rank 2r, in two halves."""
        downs, ups = found["lora_A.weight"].chunk(2), found["lora_B.weight"].chunk(2, dim=1)
        return {"lora_A.weight": downs[0], "start_A": downs[1], "lora_B.weight": ups[0], "start_B": -ups[1]}


@dataclass(frozen=True)
class LoHa(Tuner):
    """W' = W + alpha / r (a1 b1) * (a2 b2), elementwise (Hyeon-Woo et al. 2022; peft/tuners/loha/layer.py).

    Args:
        targets: see `Tuner`.
        rank: r.
        alpha: see above.
    """

    rank: int
    alpha: float
    peft_type: ClassVar[str] = "LOHA"
    needed: ClassVar[dict[str, Any]] = {"alpha": 8}

    def __post_init__(self) -> None:
        _above(self.rank, "rank")
        _above(self.alpha, "alpha")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """a1, a2 (o, r) and b1 (r, i) at random, b2 (r, i) zero."""
        rows, columns = matrix(weight).shape
        up, down = (rows, self.rank), (self.rank, columns)
        return {
            "hada_w1_a": uniform(seed, f"{name} a1", up, self.rank),
            "hada_w1_b": uniform(seed, f"{name} b1", down, columns),
            "hada_w2_a": uniform(seed, f"{name} a2", up, self.rank),
            "hada_w2_b": torch.zeros(down),
        }

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength alpha / r (a1 b1) * (a2 b2)."""
        product = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        return (strength * self.alpha / self.rank * product).view(weight.shape)

    def numbers(self) -> dict[str, float]:
        """Alpha."""
        return {"alpha": self.alpha}

    def config(self) -> dict[str, Any]:
        """As LoHaConfig."""
        return {"r": self.rank, "alpha": self.alpha, "use_effective_conv2d": False}


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a layer's side, as `factorization` of peft/tuners/lokr/layer.py.

    Args:
        size: the side.
        factor: the first of them, if it divides the side; else the bound of the smaller one, which stands first, -1
            for none.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(part for part in range(most, 0, -1) if size % part == 0)
    return small, size // small


@dataclass(frozen=True)
class LoKr(Tuner):
    """W' = W + alpha / r kron(w1, w2), w2 = a b or whole (Yeh et al. 2023; peft/tuners/lokr/layer.py).

    Args:
        targets: see `Tuner`.
        rank: r; from half of w2's longer side on, w2 is kept whole.
        alpha: see above; it counts for a whole w2, too.
        factor: how sides are split, see `split`.
        decompose_both: whether w1 is a product, too, where r is below half of its longer side.
        init: "zero_w1" (PEFT), or "lycoris": w1 at random, b (or the whole w2) zero.
    """

    rank: int
    alpha: float
    factor: int
    decompose_both: bool
    init: str
    peft_type: ClassVar[str] = "LOKR"
    needed: ClassVar[dict[str, Any]] = {"alpha": 8}

    def __post_init__(self) -> None:
        _above(self.rank, "rank")
        _above(self.alpha, "alpha")
        if self.factor != -1:
            _above(self.factor, "factor (or -1)")
        if self.init not in ("zero_w1", "lycoris"):
            raise UserError(f"init={self.init!r} is unknown.{near(self.init, ('zero_w1', 'lycoris'))}")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`lokr_w1` (o1, i1) or its factors, and `lokr_w2` (o2, i2, ...) or its factors: one of them zero."""
        (o1, o2), (i1, i2) = split(len(weight), self.factor), split(weight.shape[1], self.factor)
        kernel, rank, found = weight.shape[2:], self.rank, {}

        def drawn(key: str, *shape: int) -> None:
            found[f"lokr_{key}"] = uniform(seed, f"{name} {key}", shape, math.prod(shape[1:]))

        if self.decompose_both and rank < max(o1, i1) / 2:
            drawn("w1_a", o1, rank)
            drawn("w1_b", rank, i1)
        else:
            drawn("w1", o1, i1)
        if rank >= max(o2, i2) / 2:
            drawn("w2", o2, i2, *kernel)
        else:
            drawn("w2_a", o2, rank)
            drawn("w2_b", rank, i2 * kernel.numel())
        zero = ("lokr_w2", "lokr_w2_b") if self.init == "lycoris" else ("lokr_w1", "lokr_w1_a")
        return {key: torch.zeros_like(value) if key in zero else value for key, value in found.items()}

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength alpha / r kron(w1, w2)."""
        first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        second = own["lokr_w2"].flatten(1) if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
        return (strength * self.alpha / self.rank * torch.kron(first, second)).view(weight.shape)

    def numbers(self) -> dict[str, float]:
        """Alpha, and the rank, which a whole w2 does not tell."""
        return {"alpha": self.alpha, "rank": self.rank}

    def config(self) -> dict[str, Any]:
        """As LoKrConfig."""
        return {
            "r": self.rank,
            "alpha": self.alpha,
            "decompose_both": self.decompose_both,
            "decompose_factor": self.factor,
            "use_effective_conv2d": False,
        }


# ---- rotations -------------------------------------------------------------------------------------------------------


def turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """W D^T (o, i) of a block diagonal D, blocks (i / b, b, b)."""
    count, size, _ = blocks.shape
    return torch.einsum("obj,bkj->obk", weight.view(len(weight), count, size), blocks).reshape(weight.shape)


def _divisor(size: int, wanted: int) -> int:
    """The divisor of a layer's side that is nearest to the wanted one, of two the smaller."""
    return min((part for part in range(1, size + 1) if size % part == 0), key=lambda part: (abs(part - wanted), part))


@dataclass(frozen=True)
class OFT(Tuner):
    """W' = W R^T, R block diagonal and nearly orthogonal (Qiu et al. 2023; peft/tuners/oft/layer.py).

    A block is I + 2Q + 2Q^2 + ... + Q^(k - 1) of a skew Q: the cut series of (I + Q)(I - Q)^-1. As PEFT's code has it,
    k = 3 is k = 4, and k = 2 is I + 2Q. A k x k convolution is refused: PEFT sums overlapping patches and is wrong
    already at zero.

    Args:
        targets: see `Tuner`.
        block: b; where it does not divide a layer's inputs, the nearest divisor is taken, with a warning.
        terms: k.
    """

    block: int
    terms: int
    peft_type: ClassVar[str] = "OFT"
    convolutions: ClassVar[str] = "1x1"
    needed: ClassVar[dict[str, Any]] = {
        "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False, "block_share": False,
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.block < 2 or self.terms < 2:
            raise UserError(f"block={self.block}, terms={self.terms}: expected 2 or more (PEFT: 32 and 5).")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`oft_R.weight` (i / b, b (b - 1) / 2), zeros: the upper triangles of Q, row by row."""
        inputs = weight.shape[1]
        size = _divisor(inputs, self.block)
        if size != self.block:
            log.warning("block=%d does not divide the %d inputs of %s: %d is taken", self.block, inputs, name, size)
        return {"oft_R.weight": torch.zeros(inputs // size, size * (size - 1) // 2)}

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength W (R - I)^T."""
        upper, w = own["oft_R.weight"], matrix(weight)
        size = w.shape[1] // len(upper)
        rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
        skew = upper.new_zeros(len(upper), size, size)
        skew[:, rows, columns] = upper
        skew = skew - skew.mT
        power, change = skew, torch.zeros_like(skew)
        for _ in range(max(self.terms, 4) - 2 if self.terms > 2 else 0):
            change, power = change + 2 * power, power @ skew
        power = 2 * power if self.terms == 2 else power
        return (strength * turned(w, change + power)).view(weight.shape)

    def numbers(self) -> dict[str, float]:
        """The number of terms."""
        return {"terms": self.terms}

    def config(self) -> dict[str, Any]:
        """As OFTConfig."""
        return {
            "r": 0, "oft_block_size": self.block, "coft": False, "block_share": False, "use_cayley_neumann": True,
            "num_cayley_neumann_terms": self.terms, "bias": "none",
        }  # fmt: skip


@dataclass(frozen=True)
class BOFT(Tuner):
    """W' = s (W B^T), rows times s, B of orthogonal blocks (Liu et al. 2024; peft/tuners/boft/layer.py), one factor.

    A block is (I - S)(I + S)^-1 with S = (R - R^T) / 2. More than one butterfly factor needs PEFT's CUDA extension,
    without which PEFT takes one whatever is asked; here it is refused.

    Args:
        targets: see `Tuner`.
        block: b, or None to divide the inputs into `blocks`.
        blocks: their number, or None.
        factors: m, which is 1.
    """

    block: int | None
    blocks: int | None
    factors: int
    peft_type: ClassVar[str] = "BOFT"

    def __post_init__(self) -> None:
        if self.factors != 1:
            raise UserError(f"factors={self.factors}: only one butterfly factor is offered.")
        if (self.block is None) == (self.blocks is None):
            raise UserError(f"block={self.block}, blocks={self.blocks}: give one of the two, the other is null.")
        _above(self.block or self.blocks or 0, "block or blocks")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`boft_R` (1, i / b, b, b) zeros, `boft_s` (o, 1) ones, of a convolution (1, o)."""
        inputs = matrix(weight).shape[1]
        given = self.block or self.blocks
        assert given
        if inputs % given:
            raise UserError(f"{name} has {inputs} inputs, which {given} does not divide: choose another block size.")
        count = inputs // self.block if self.block else given
        size = inputs // count
        ones = torch.ones(len(weight), 1) if weight.dim() == 2 else torch.ones(1, len(weight))
        return {"boft_R": torch.zeros(1, count, size, size), "boft_s": ones}

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength ((s - 1) W + s W (B - I)^T)."""
        w, factor, raw = matrix(weight), own["boft_s"].view(-1, 1), own["boft_R"][0]
        skew = (raw - raw.mT) / 2
        eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device).expand_as(skew)
        change = torch.linalg.solve(eye + skew, -2 * skew, left=False)
        return (strength * ((factor - 1) * w + factor * turned(w, change))).view(weight.shape)

    def config(self) -> dict[str, Any]:
        """As BOFTConfig."""
        return {
            "boft_block_size": self.block or 0, "boft_block_num": self.blocks or 0, "boft_n_butterfly_factor": 1,
            "boft_dropout": 0.0, "bias": "none",
        }  # fmt: skip


@dataclass(frozen=True)
class HRA(Tuner):
    """W' = W H1 ... Hr, reflections H = I - 2 u u^T / |u|^2 (Yuan et al. 2024; peft/tuners/hra/layer.py).

    Args:
        targets: see `Tuner`.
        rank: r; even, or the start is not the frozen model.
    """

    rank: int
    peft_type: ClassVar[str] = "HRA"
    needed: ClassVar[dict[str, Any]] = {"apply_GS": False}

    def __post_init__(self) -> None:
        _above(self.rank, "rank")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`hra_u` (i, r): random columns, each twice, so that reflections cancel; with odd r each once."""
        inputs, half = matrix(weight).shape[1], self.rank // 2
        if self.rank % 2:
            log.warning("rank=%d is odd: reflections do not cancel, %s starts elsewhere.", self.rank, name)
            return {"hra_u": uniform(seed, name, (inputs, self.rank), self.rank)}
        return {"hra_u": uniform(seed, name, (inputs, half), half).repeat_interleave(2, dim=1)}

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength (W H1 ... Hr - W)."""
        w = matrix(weight)
        turned_so_far = w
        for column in torch.nn.functional.normalize(own["hra_u"], dim=0).unbind(1):
            turned_so_far = turned_so_far - 2 * torch.outer(turned_so_far @ column, column)
        return (strength * (turned_so_far - w)).view(weight.shape)

    def config(self) -> dict[str, Any]:
        """As HRAConfig."""
        return {"r": self.rank, "apply_GS": False, "bias": "none"}


# ---- others ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IA3(Tuner):
    """W' = l W and c' = l c, rows times l; as a feed-forward layer W' = W l, columns (Liu et al. 2022).

    Follows peft/tuners/ia3/layer.py.

    Args:
        targets: see `Tuner`.
        feedforward: ends of the names of those targets whose inputs are scaled, and not their outputs and bias.
    """

    feedforward: Sequence[str]
    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        if strange := sorted(set(self.feedforward) - set(self.targets)):
            raise UserError(f"feedforward={strange[0]} is none of the targets.{near(strange[0], self.targets)}")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`ia3_l`, ones: (o, 1), of feed-forward layers (1, i); of convolutions (1, o, 1, 1) and (1, i, 1, 1)."""
        inputs = any(name == end or name.endswith(f".{end}") for end in self.feedforward)
        size = weight.shape[1] if inputs else len(weight)
        if weight.dim() == 4:
            if inputs and size == len(weight):
                raise UserError(f"{name}: a convolution with as many inputs as outputs cannot be in feedforward.")
            return {"ia3_l": torch.ones(1, size, 1, 1)}
        return {"ia3_l": torch.ones(1, size) if inputs else torch.ones(size, 1)}

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength (l - 1) W, or W (l - 1)."""
        change = own["ia3_l"] - 1
        if weight.dim() == 4 and not self._of_inputs(own["ia3_l"], len(weight)):
            change = change.view(-1, 1, 1, 1)
        return strength * change * weight

    def bias_difference(self, bias: Tensor, own: Own, strength: float) -> Tensor | None:
        """Strength (l - 1) c, or None of a feed-forward layer."""
        if self._of_inputs(own["ia3_l"], len(bias)):
            return None
        return strength * (own["ia3_l"].flatten() - 1) * bias

    @staticmethod
    def _of_inputs(scales: Tensor, outputs: int) -> bool:
        return scales.shape[0] == 1 and (scales.dim() == 2 or scales.numel() != outputs)

    def config(self) -> dict[str, Any]:
        """As IA3Config."""
        return {"feedforward_modules": list(self.feedforward)}


@functools.lru_cache(maxsize=256)
def places(rows: int, columns: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, (n,) each, of the entries that FourierFT learns: torch's own permutation of the CPU.

    As peft/tuners/fourierft/layer.py; files do not hold them.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(rows * columns, generator=generator)[:count].clone()
    return chosen // columns, chosen % columns


@dataclass(frozen=True)
class FourierFT(Tuner):
    """W' = W + a Re(ifft2(F)), F zero but for n entries (Gao et al. 2024; peft/tuners/fourierft/layer.py).

    It starts from unit normals, which is NOT the frozen model, as PEFT does it, or from zeros.

    Args:
        targets: see `Tuner`.
        frequencies: n.
        scaling: a.
        location_seed: of the entries' places, equal for all layers of a shape.
        zero_start: whether the entries start at 0.
    """

    frequencies: int
    scaling: float
    location_seed: int
    zero_start: bool
    peft_type: ClassVar[str] = "FOURIERFT"
    convolutions: ClassVar[str] = "none"
    needed: ClassVar[dict[str, Any]] = {"scaling": 150.0, "random_loc_seed": 777}

    def __post_init__(self) -> None:
        _above(self.frequencies, "frequencies")

    def start(self, seed: int, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`fourierft_spectrum` (n,)."""
        if self.frequencies > weight.numel():
            raise UserError(f"frequencies={self.frequencies}: {name} has {weight.numel()} weights, so many at most.")
        if self.zero_start:
            return {"fourierft_spectrum": torch.zeros(self.frequencies)}
        return {"fourierft_spectrum": draws.normal(seed, f"tuner {name}", [0], (self.frequencies,))[0]}

    def difference(self, weight: Tensor, own: Own, strength: float) -> Tensor:
        """Strength a Re(ifft2(F))."""
        spectrum = own["fourierft_spectrum"]
        rows, columns = places(*weight.shape, len(spectrum), self.location_seed)
        where = (rows.to(spectrum.device), columns.to(spectrum.device))
        full = spectrum.new_zeros(weight.shape).index_put(where, spectrum)
        return strength * self.scaling * torch.fft.ifft2(full).real

    def numbers(self) -> dict[str, float]:
        """A and the places' seed."""
        return {"scaling": self.scaling, "location_seed": self.location_seed}

    def config(self) -> dict[str, Any]:
        """As FourierFTConfig."""
        return {
            "n_frequency": self.frequencies, "scaling": self.scaling, "random_loc_seed": self.location_seed,
            "init_weights": self.zero_start, "bias": "none",
        }  # fmt: skip


TUNERS: dict[str, type[Tuner]] = {
    "lora": LoRA, "rslora": RsLoRA, "dora": DoRA, "pissa": PiSSA, "loha": LoHa, "lokr": LoKr, "oft": OFT, "boft": BOFT,
    "hra": HRA, "ia3": IA3, "fourierft": FourierFT,
}  # fmt: skip


def tuner(name: str, settings: Mapping[str, Any]) -> Tuner:
    """A way by its name.

    Args:
        name: one of `TUNERS`.
        settings: all of its own.

    Raises:
        UserError: no such way, a setting that it has not, or one that is missing or out of range.
    """
    if name not in TUNERS:
        raise UserError(f"method.tuner={name}: no such tuner.{near(str(name), TUNERS)}")
    known = [field.name for field in fields(TUNERS[name])]
    if strange := sorted(settings.keys() ^ set(known)):
        raise UserError(f"method.tuners.{name}.{strange[0]} is missing or no setting.{near(strange[0], known)}")
    try:
        return TUNERS[name](**settings)
    except UserError as error:
        raise UserError(f"method.tuners.{name}: {error}") from None
