"""Adapters of the PEFT family for DreamBooth's rare word: one method, eleven ways to change a weight with few numbers.

Each way's formula is in `hiperlab.layer.tuner`; which layers, rates and prompts are huggingface/peft's and diffusers'
own examples where they have any. Axes: K concepts, R rows, N tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import ChangedWeights
from hiperlab.base.method import Step, Subject
from hiperlab.base.rare_token_method import RareTokenMethod, RareTokenSettings
from hiperlab.base.variants import DrawnAtStrengths
from hiperlab.errors import UserError, near
from hiperlab.formats import peft as files
from hiperlab.layer.tuner import TUNERS, tuner
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import Added, Offsets, modules_named
from hiperlab.model.row_offsets import RowOffsets
from hiperlab.model.stack import FrozenStack
from hiperlab.model.state import misfits
from hiperlab.model.text import check_identifier
from hiperlab.model.text_cache import by_concept

PREFIXES = {"none": "", "base_model": files.PREFIX}


class Layer(NamedTuple):
    """A changed layer.

    Attributes:
        part: "unet" or "text".
        name: of the layer in that module.
        keys: its adapter's tensors, by the names that files have.
    """

    part: str
    name: str
    keys: tuple[str, ...]

    def place(self, key: str) -> str:
        """Where a tensor stands: a parameter's name may have no dots."""
        return f"{self.part}/{self.name}/{key}".replace(".", "/")


class Peft(DrawnAtStrengths, RareTokenMethod):
    """One adapter per chosen layer; prompts say "sks dog" for the placeholder.

    Args:
        model: the frozen stack.
        concepts: what is personalised; several share each pass of the frozen U-Net, whatever their tuners.
        optimizer: parameters -> optimizer.
        seed: of initialisation and draws.
        tuner: the way, one of `hiperlab.layer.tuner.TUNERS`.
        tuners: the settings of each way by its name, and its rate `lr`, which the optimizer's refers to.
        text_encoder: whether the text encoder gets adapters too.
        text_targets: ends of the text encoder layers' names.
        identifier: rare word that stands before the class noun in the placeholder's place.
        strength: t, factor of the change in sampling; several draw one picture for each, the first is the plain one.
            DoRA's scales B A only: its magnitudes stay, as in PEFT.
        key_prefix: before the layers' names in written files: "none" (diffusers' add_adapter) or "base_model"
            (get_peft_model).
        shared: see `RareTokenSettings`.
    """

    stacks_concepts = True
    fixed_settings: ClassVar[tuple[str, ...]] = ("identifier", "tuner")
    training_settings = (*RareTokenMethod.training_settings, "key_prefix")
    sampling_settings = (*RareTokenMethod.sampling_settings, *DrawnAtStrengths.sampling_settings)
    published_crop = "random"  # without --center_crop
    published_flip = 0.0

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        tuner: str,
        tuners: Mapping[str, Mapping[str, Any]],
        text_encoder: bool,
        text_targets: Sequence[str],
        identifier: str,
        strength: Sequence[float],
        key_prefix: str,
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        identifier = check_identifier(model.tokenizer, identifier)
        super().__init__(model, concepts, optimizer, seed, identifier, **shared)
        self.set_strengths(strength)
        if key_prefix not in PREFIXES:
            raise UserError(f"method.key_prefix={key_prefix} is unknown.{near(key_prefix, PREFIXES)}")
        self.tuner, self.key_prefix = tuner, key_prefix
        self.way = _way(tuner, tuners)
        self.adapters = nn.ParameterDict()  # (K, ...) each, see `Layer.place`
        self.layers: list[Layer] = []
        self._kept: tuple[list[Tensor], dict[tuple[str, float], dict[str, Tensor]]] = ([], {})
        for part, module, ends in (
            ("unet", model.unet, self.way.targets),
            ("text", model.text_module, text_targets if text_encoder else ()),
        ):
            for name in modules_named(module, ends):
                self._add(part, name, module.get_parameter(f"{name}.weight"))
        if not self.layers:
            raise UserError(f"method.tuners.{tuner}.targets=[] trains nothing. Name layers, e.g. [to_k,to_v].")
        # Kept with the tensors, which mean nothing without them.
        self.numbers: Tensor
        numbers = torch.tensor(list(self.way.numbers().values()), dtype=torch.float64)
        self.register_buffer("numbers", numbers.repeat(len(concepts), 1))

    def _add(self, part: str, name: str, weight: Tensor) -> None:
        """The same start for every concept."""
        self.way.refuse(name, weight)
        start = self.way.start(self.seed, name, weight)
        layer = Layer(part, name, tuple(start))
        self.layers.append(layer)
        for key, value in start.items():
            stacked = value.to(self.model.device).expand(len(self.concepts), *value.shape).clone()
            self.adapters[layer.place(key)] = nn.Parameter(stacked, requires_grad=key not in self.way.frozen)

    # ---- what it changes ---------------------------------------------------------------------------------------------

    def condition(self, step: Step) -> Conditioning:
        """The text with "sks dog" in the placeholder's place, and the changes of the weights: (1, R, N, D)."""
        strength = 1.0 if step.samples is not None else self.strength_of(step.variant)
        states = self._encode(self.texts(step), step.concept.tolist(), strength)
        changes = self._differences("unet", strength)
        alone = _offsets(changes, 0) if len(self.concepts) == 1 else None
        ones = torch.ones(len(self.concepts), dtype=next(iter(changes.values())).dtype, device=self.model.device)
        beside = RowOffsets({name: (value,) for name, value in changes.items()}, ones, step.concept)
        return replace(states, offsets=alone, row_offsets=beside)

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The changes at the variant's strength."""
        strength = self.strength_of(variant)
        return ChangedWeights(*(_offsets(self._differences(part, strength), 0) for part in ("unet", "text")))

    def negative_condition(self, text: str, variant: str, concepts: Sequence[int]) -> Conditioning:
        """The negative text (1, 1, N, D), or one for each of `concepts` where their text encoders differ."""
        numbers = concepts if any(layer.part == "text" for layer in self.layers) else [0]
        return self._encode([text] * len(numbers), list(numbers), self.strength_of(variant))

    def _encode(self, texts: Sequence[str], numbers: Sequence[int], strength: float) -> Conditioning:
        """What is read of R texts of the concepts numbered so (1, R, N, D), each through its own text encoder."""
        changes = self._differences("text", strength)
        if not changes:
            return self.plain_text.condition(texts)
        return by_concept(texts, numbers, lambda own, index: self.model.condition_text(own, _offsets(changes, index)))

    def _differences(self, part: str, strength: float) -> dict[str, Tensor]:
        """W' - W and c' - c, (K, *shape) each, by the module's parameter names.

        While pictures are drawn, the same tensors again: calls that share their weights know them by their memory. What
        they were worked out from is compared by its numbers, because fused optimizers leave torch's version counters.
        """
        if torch.is_grad_enabled():
            return self._worked_out(part, strength)
        now = list(self.adapters.values())
        if not all(_same(before, value) for before, value in zip_longest(self._kept[0], now)):
            self._kept = ([value.detach().clone() for value in now], {})
        kept = self._kept[1]
        if (part, strength) not in kept:
            kept[part, strength] = self._worked_out(part, strength)
        return kept[part, strength]

    def _worked_out(self, part: str, strength: float) -> dict[str, Tensor]:
        module = self.model.unet if part == "unet" else self.model.text_module
        found: dict[str, list[Tensor]] = {}
        for layer in self.layers:
            if layer.part != part:
                continue
            for index in range(len(self.concepts)):
                own = self._own(layer, index)
                dtype = next(iter(own.values())).dtype
                frozen = module.get_submodule(layer.name)
                weight = frozen.weight.to(dtype)
                found.setdefault(f"{layer.name}.weight", []).append(self.way.difference(weight, own, strength))
                if frozen.bias is None:
                    continue
                change = self.way.bias_difference(frozen.bias.to(dtype), own, strength)
                if change is not None:
                    found.setdefault(f"{layer.name}.bias", []).append(change)
        return {name: torch.stack(each) for name, each in found.items()}

    def _own(self, layer: Layer, index: int) -> dict[str, Tensor]:
        """A layer's tensors of concept `index`, by the names that files have."""
        return {key: self.adapters[layer.place(key)][index] for key in layer.keys}

    def load_artifact(self, index: int, tensors: dict[str, Tensor]) -> None:
        """As `Method.load_artifact`, whose tensors mean nothing under other settings.

        Raises:
            UserError: they were learnt with another scale or the like.
        """
        given, own = tensors.get("numbers"), self.numbers[index]
        if given is not None and given.shape == own.shape:
            for name, theirs, mine in zip(self.way.numbers(), given.tolist(), own.tolist(), strict=True):
                if abs(theirs - mine) > 1e-3 * abs(mine):  # artifacts may be of three digits
                    setting = f"method.tuners.{self.tuner}.{name}"
                    raise UserError(f"the artifact was learnt with {setting}={theirs:g}, this run has {mine:g}.")
        super().load_artifact(index, tensors)

    # ---- files of PEFT -----------------------------------------------------------------------------------------------

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """`peft/adapter_model.safetensors` with its config, and `peft_text_encoder/` if that has adapters."""
        written = []
        for sub, layers in self._folders().items():
            tensors = {name: self.way.to_file(self._own(layer, index)) for name, layer in layers.items()}
            if tensors:
                config = {"peft_type": self.way.peft_type, **self.way.config()}
                written.append(files.write(folder / sub, tensors, config, PREFIXES[self.key_prefix]))
        return written

    def _folders(self) -> dict[str, dict[str, Layer]]:
        """The layers of each of PEFT's folders by the names that its file has."""
        found = {"peft": {layer.name: layer for layer in self.layers if layer.part == "unet"}}
        for part in self.model.text_parts:
            named = {part.own(layer.name): layer for layer in self.layers if layer.part == "text"}
            found[f"peft_{part.name}"] = {name: layer for name, layer in named.items() if name is not None}
        return found

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """An `adapter_model.safetensors` of the same tuner, layers and settings, with either prefix.

        A text encoder's lies in `peft_text_encoder/` (SDXL's second: `peft_text_encoder_2/`) beside the U-Net's folder.

        Raises:
            UserError: it is of another tuner, model or setting, which is named.
        """
        if path.parent.name.startswith("peft_text_encoder"):
            path = path.parent.parent / "peft" / files.WEIGHTS
        wanted: dict[str, Tensor] = {}  # all parts are looked at before anything is taken
        for sub, layers in self._folders().items():
            file = path if sub == "peft" else path.parent.parent / sub / files.WEIGHTS
            if layers:
                wanted |= self._read(index, file, layers)
            elif sub != "peft" and path.parent.name == "peft" and file.is_file():
                raise UserError(f"{file} comes with it: set method.text_encoder=true, or move that away.")
        for place, value in wanted.items():
            self.adapters[place][index].copy_(value)

    def _read(self, index: int, path: Path, named: Mapping[str, Layer]) -> dict[str, Tensor]:
        """A file's tensors by the places that they go to, its layers named so, with or without "text_model."."""
        layers = {name.removeprefix("text_model."): layer for name, layer in named.items()}
        written = [self.way.to_file(self._own(layer, index)) for layer in layers.values()]
        found, config = files.read(path, {key for own in written for key in own})
        self._check(path, config)
        theirs = {
            f"{name.removeprefix('text_model.')}.{key}": v for name, own in found.items() for key, v in own.items()
        }
        ours = {f"{name}.{key}": value for name, own in zip(layers, written, strict=True) for key, value in own.items()}
        if wrong := misfits(ours, theirs):
            raise UserError(
                f"{path.name} does not fit: {', '.join(wrong[:3])} differ. Set method.tuners.{self.tuner} as its "
                f"{files.CONFIG} says, or load the base model it was made for."
            )
        return {
            layer.place(key): value
            for (name, layer), own in zip(layers.items(), written, strict=True)
            for key, value in self.way.from_file({key: theirs[f"{name}.{key}"] for key in own}).items()
        }

    def _check(self, path: Path, config: Mapping[str, Any]) -> None:
        """Refuse another tuner's file, and settings that shapes do not tell."""
        own = self.way.config()
        if (kind := config.get("peft_type")) != self.way.peft_type:
            raise UserError(
                f"{path.name} is of peft_type={kind}, method.tuner={self.tuner} reads {self.way.peft_type}."
            )
        for name, default in self.way.needed.items():
            if config.get(name, default) != own.get(name, default):
                raise UserError(
                    f"{path.name} was made with {name}={config.get(name, default)}, method.tuner={self.tuner} has "
                    f"{own.get(name, default)}: choose the tuner and set method.tuners.{self.tuner} to match."
                )


def _way(name: str, tuners: Mapping[str, Mapping[str, Any]]) -> Any:
    """The tuner with its settings; `lr` among them is read by the optimizer's."""
    settings = tuners.get(name, {}) if name in TUNERS else {}
    return tuner(name, {key: value for key, value in settings.items() if key != "lr"})


def _same(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether both are tensors of the same numbers, type and device."""
    if before is None or now is None or (before.dtype, before.device) != (now.dtype, now.device):
        return False
    return torch.equal(before, now)


def _offsets(changes: Mapping[str, Tensor], index: int) -> Offsets:
    """The changes of concept `index`, by the module's own names."""
    return Offsets({name: Added(value[index]) for name, value in changes.items()})
