"""LoRA (Hu et al. 2021) for DreamBooth (Ruiz et al. 2022): low-rank weight offsets tied to a rare word.

Follows diffusers' examples/dreambooth/train_dreambooth_lora.py. Letters: A "down", B "up" (Hu et al. 2021, section
4.1), r rank, m strength.
Axes: K concepts, R rows, N tokens, D text width, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab import draws
from hiperlab.base.capability import ChangedWeights
from hiperlab.base.method import Step, Subject
from hiperlab.base.rare_token_method import RareTokenMethod, RareTokenSettings
from hiperlab.base.variants import DrawnAtStrengths
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.formats import lora as files
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.offsets import LowRank, Offsets, modules_named
from hiperlab.model.row_offsets import RowOffsets
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import check_identifier
from hiperlab.model.text_cache import by_concept
from hiperlab.optim.held_norm import hold_norms

log = logging.getLogger(__name__)


def resized(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r', in, ...) and B (out, r', ...) with zero rows and columns up to `rank`; their product stays."""
    more = rank - down.shape[0]
    return (
        torch.cat([down, down.new_zeros(more, *down.shape[1:])]),
        torch.cat([up, up.new_zeros(up.shape[0], more, *up.shape[2:])], dim=1),
    )


class LoRA(DrawnAtStrengths, RareTokenMethod):
    """A and B beside every attention projection; prompts say "sks dog" for the placeholder.

    Args:
        model: the frozen stack.
        concepts: what is personalised; several share each pass of the frozen U-Net, see `hiperlab.model.row_offsets`.
        optimizer: parameters -> optimizer.
        seed: of initialisation and draws.
        rank: r.
        alpha: the offset is alpha / r * B A.
        targets: ends of the U-Net layers' names.
        text_encoder: whether the text encoder gets offsets too.
        text_targets: ends of the text encoder layers' names.
        text_lr: learning rate of the text encoder's offsets; None takes the optimizer's.
        text_decay: their weight decay; None takes the optimizer's.
        identifier: rare word that stands before the class noun in the placeholder's place.
        learn_word: let the placeholder itself stand there, without noun, as a word that is learnt too: its vector
            starts from the class noun's and keeps its norm (--train_text_encoder_ti of kyungmnlee/dco).
        word_lr: learning rate of that vector.
        strength: m, factor of the offsets in sampling; several draw one picture for each, the first is the plain one.
        shared: see `RareTokenSettings`.
    """

    stacks_concepts = True
    fixed_settings = (*RareTokenMethod.fixed_settings, "learn_word")
    training_settings = (*RareTokenMethod.training_settings, "word_lr", "text_lr", "text_decay")
    published_crop = "random"  # without --center_crop
    published_flip = 0.0
    sampling_settings = (*RareTokenMethod.sampling_settings, *DrawnAtStrengths.sampling_settings)

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        text_encoder: bool,
        text_targets: Sequence[str],
        text_lr: float | None,
        text_decay: float | None,
        identifier: str,
        learn_word: bool,
        word_lr: float,
        strength: Sequence[float],
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        identifier = check_identifier(model.tokenizer, identifier)
        super().__init__(model, concepts, optimizer, seed, identifier, **shared)
        if rank < 1 or alpha <= 0:
            raise UserError(f"method.rank={rank}, method.alpha={alpha}: both must be above 0 (published: 4 and 4).")
        if not targets and not (text_encoder and text_targets):
            raise UserError("method.targets=[] trains nothing. Name layers, e.g. [to_q,to_k,to_v,to_out.0].")
        if word_lr <= 0:
            raise UserError(f"method.word_lr={word_lr} is out of range. Choose above 0; DCO's authors use 5e-6.")
        for name, value in (("text_lr", text_lr), ("text_decay", text_decay)):
            if value is not None and not (value > 0 if name == "text_lr" else value >= 0):
                raise UserError(f"method.{name}={value} is out of range. Choose a positive number, or null.")
            if value is not None and not text_encoder:
                raise UserError(
                    f"method.{name}={value} is of the text encoder's offsets: add method.text_encoder=true."
                )
        self.text_settings = {"lr": text_lr, "weight_decay": text_decay}
        self.set_strengths(strength)
        # Kept with the matrices, which mean nothing without it: files without it load wrongly scaled (diffusers #6087).
        self.alpha: Tensor
        self.word_norm: Tensor
        self.register_buffer("alpha", torch.full((len(concepts),), float(alpha)))
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()  # keys "unet/<module>", dots as slashes
        self.words_brought = nn.ParameterDict()  # (1, V, D) each, of another tool's file; never trained
        self.learn_word, self.word_lr = learn_word, float(word_lr)
        if learn_word:
            self.words = tuple(concept.placeholder for concept in concepts)
            self.word = nn.Parameter(
                torch.stack([model.word_embedding(concept.word) for concept in concepts])
            )  # (K, D)
            self.register_buffer("word_norm", self.word.detach().norm(dim=-1, keepdim=True))  # (K, 1)
        for part, module, ends in (
            ("unet", model.unet, targets),
            ("text", model.text_module, text_targets if text_encoder else ()),
        ):
            for name in modules_named(module, ends):
                self._add_pair(part, name, *_start(seed, name, module.get_parameter(f"{name}.weight").shape, rank))

    @property
    def rank(self) -> int:
        """r, the same for all concepts."""
        return int(next(iter(self.down.values())).shape[1])

    def scale(self, index: int) -> float:
        """The factor alpha / r of concept `index`'s B A."""
        return float(self.alpha[index]) / self.rank

    def _add_pair(self, part: str, name: str, down: Tensor, up: Tensor) -> None:
        """The same start, A (r, in, ...) and B (out, r, ...), for every concept."""
        key, count = f"{part}/{name}".replace(".", "/"), len(self.concepts)
        self.down[key], self.up[key] = (
            nn.Parameter(value.to(self.model.device).expand(count, *value.shape).clone()) for value in (down, up)
        )

    def param_groups(self) -> list[dict[str, Any]]:
        """The matrices at the optimizer's rate, the text encoder's and the word at their own, where they have one."""
        apart = {name: float(value) for name, value in self.text_settings.items() if value is not None}
        of_text = [key for key in self.down if apart and key.startswith("text/")]
        rest = [key for key in self.down if key not in of_text]
        groups: list[dict[str, Any]] = [{"params": [each[key] for each in (self.down, self.up) for key in rest]}]
        if of_text:
            groups.append({"params": [each[key] for each in (self.down, self.up) for key in of_text], **apart})
        if self.learn_word:
            groups.append({"params": [self.word], "lr": self.word_lr})
        return groups

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer; the word keeps its norm."""
        optimizer = super().configure_optimizers()
        return hold_norms(optimizer, self.word, self.word_norm) if self.learn_word else optimizer

    def condition(self, step: Step) -> Conditioning:
        """The text with "sks dog" in the placeholder's place, and the offsets: (1, R, N, D)."""
        strength = 1.0 if step.samples is not None else self.strength_of(step.variant)
        states = self._encode(self.texts(step), step.concept, strength)
        changes = {f"{name}.weight": pair for name, pair in self._pairs("unet").items()}
        scale = strength * self.alpha / self.rank
        alone = self.offsets("unet", 0, strength) if len(self.concepts) == 1 else None
        return replace(states, offsets=alone, row_offsets=RowOffsets(changes, scale, step.concept))

    def frozen_texts(self, step: Step) -> list[str]:
        """The step's R prompts; where a word is learnt or came with a file, the class noun stands for it."""
        return self.with_class_nouns(step) if self.learn_word or self.words_brought else self.texts(step)

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The offsets at the variant's strength."""
        strength = self.strength_of(variant)
        return ChangedWeights(self.offsets("unet", 0, strength), self.offsets("text", 0, strength))

    def offsets(self, part: str, index: int, strength: float) -> Offsets:
        """The weights' changes in "unet" or "text" of concept `index`, by the module's own names."""
        scale = strength * self.scale(index)
        return Offsets(
            {f"{name}.weight": LowRank(down[index], up[index], scale) for name, (down, up) in self._pairs(part).items()}
        )

    def negative_condition(self, text: str, variant: str, concepts: Sequence[int]) -> Conditioning:
        """The negative text through each concept's text encoder, as a pipeline with the adapter loaded does.

        One row (1, 1, N, D), or one for each of `concepts` where their text encoders differ.
        """
        different = list(dict.fromkeys(concepts)) if self._pairs("text") else [0]
        found = self._encode([text] * len(different), torch.tensor(different), self.strength_of(variant))
        return found if len(different) == 1 else found.rows([different.index(number) for number in concepts])

    def _encode(self, texts: Sequence[str], concepts: Tensor, strength: float) -> Conditioning:
        """What is read of R texts of the concepts numbered (R,), each through its own text encoder: (1, R, N, D)."""
        numbers = concepts.tolist()
        if not self._pairs("text") and not self.words_brought and not self.learn_word:
            return self.plain_text.condition(texts)

        def encode(own: Sequence[str], index: int) -> Conditioning:
            offsets, vectors = self.offsets("text", index, strength), self._vectors(index)
            return self._with_vectors(own, offsets, vectors) if vectors else self.model.condition_text(own, offsets)

        return by_concept(texts, numbers, encode)

    def _vectors(self, index: int) -> dict[str, Tensor]:
        """Vectors (V, D) of the words that concept `index` knows: its own, and those that came with a file."""
        own = {self.concepts[index].placeholder: self.word[index : index + 1]} if self.learn_word else {}
        return {_word(key): value[0] for key, value in self.words_brought.items()} | own

    def _with_vectors(self, texts: Sequence[str], offsets: Offsets, vectors: Mapping[str, Tensor]) -> Conditioning:
        """What is read of B texts (1, B, N, D) with learnt vectors (V, D) in the places of their words."""
        starts = accumulate(map(len, vectors.values()), initial=0)
        slots = {word: list(range(first, first + len(rows))) for (word, rows), first in zip(vectors.items(), starts)}
        tokens = self.model.tokenize(texts, slots)
        _, _, slot = tokens.occurrences()
        placed = torch.cat(list(vectors.values()))[slot][None]
        return self.model.with_text_weights(offsets, lambda: self.model.condition_tokens(tokens, placed))

    def composition_part(self, step: Step) -> Part:
        """The texts with the rare token in the placeholder's place, or the learnt word with its vector (1, 1, 1, D).

        Raises:
            UserError: words came with the file, which would be read as letters.
        """
        if self.words_brought:
            words = ", ".join(map(_word, self.words_brought))
            raise UserError(
                f"{self.concepts[0].name}'s LoRA brings the words {words}, which are not drawn together with other "
                "concepts: draw it by itself with artifact=."
            )
        part = super().composition_part(step)
        return replace(part, vectors=self.word[None, :1, None]) if self.learn_word else part

    def _pairs(self, part: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A (K, r, in) and B (K, out, r) by the modules' names."""
        return {
            key.removeprefix(f"{part}/").replace("/", "."): (down, self.up[key])
            for key, down in self.down.items()
            if key.startswith(f"{part}/")
        }

    # ---- files of diffusers, PEFT and kohya --------------------------------------------------------------------------

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """`pytorch_lora_weights.safetensors` (diffusers), `<name>.safetensors` (kohya), `peft/` (PEFT).

        Beside them a learnt word's `learned_embeds.safetensors` (diffusers).
        """
        unet, text = (
            {name: (down[index], up[index]) for name, (down, up) in self._pairs(part).items()}
            for part in ("unet", "text")
        )
        subject, prefixes = self.concepts[index], [part.prefix for part in self.model.text_parts]
        written = files.write(folder, subject.name, files.Adapter(unet, text), self.scale(index), prefixes)
        if self.learn_word:
            word = self.word[index : index + 1]
            written += embedding.write_each(folder, subject.placeholder, word, self.model.widths)
        return written

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """A LoRA made elsewhere, whatever its rank, alpha and layers: this method's own are replaced by the file's.

        A learnt word is read from beside it; the word's file itself stands for both.
        """
        if path.name == embedding.SAFE and (beside := path.with_name(files.DIFFUSERS)).is_file():
            path = beside
        adapter = files.read(path, sdxl=self.model.pools)
        read = {name: pair for name, pair in adapter.text.items() if not name.startswith(self.model.unread_text)}
        adapter = adapter._replace(text=read)  # layers that nothing reads change nothing
        everything = [*adapter.unet.items(), *adapter.text.items()]
        rank = max(down.shape[0] for _, (down, _) in everything)
        for part, pairs in (("unet", adapter.unet), ("text", adapter.text)):
            self._check(path, part, pairs)
        self._take_words(path, adapter.words)
        folders = path.parents[:2] if path.name == files.PEFT else path.parents[:1]  # PEFT's files have their own
        self._take_word(index, [folder / embedding.SAFE for folder in folders])
        if len(self.concepts) == 1:
            self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        else:
            rank = max(rank, self.rank)
            self._make_room(index, rank)
        for part, pairs in (("unet", adapter.unet), ("text", adapter.text)):
            for name, (down, up) in pairs.items():
                self._put(index, part, name, *resized(down, up, rank))
        self.alpha[index] = rank  # the file's scale is in B already
        log.info("%s: rank %d, %d U-Net and %d text layers", path.name, rank, len(adapter.unet), len(adapter.text))

    def _make_room(self, index: int, rank: int) -> None:
        """Pairs of this rank, the other concepts' products as they were, concept `index`'s zero."""
        before = self.rank
        for key in list(self.down):
            pairs = [resized(down, up, rank) for down, up in zip(self.down[key], self.up[key], strict=True)]
            self.down[key], self.up[key] = (nn.Parameter(torch.stack(each)) for each in zip(*pairs, strict=True))
            self.up[key][index] = 0
        self.alpha *= rank / before

    def _put(self, index: int, part: str, name: str, down: Tensor, up: Tensor) -> None:
        """One layer's pair of concept `index`; a layer that the method had not is nothing to the other concepts."""
        key = f"{part}/{name}".replace(".", "/")
        if key not in self.down:
            self._add_pair(part, name, torch.zeros_like(down), torch.zeros_like(up))
        self.down[key][index], self.up[key][index] = down.to(self.model.device), up.to(self.model.device)

    def _take_words(self, path: Path, words: Mapping[str, Tensor]) -> None:
        """Learnt words of the file; a text that names one is drawn with its vectors.

        Raises:
            UserError: they are of another width, or the file is drawn beside others.
        """
        if words and len(self.concepts) > 1:
            raise UserError(f"{path.name} brings the words {', '.join(words)}: draw it by itself, artifact={path}.")
        width = self.model.width
        for word, vectors in words.items():
            if vectors.shape[1] != width:
                raise UserError(
                    f"{path.name} brings the word {word} of width {vectors.shape[1]}, {self.model.name} has {width}. "
                    "Load the base model it was made for."
                )
        self.words_brought = nn.ParameterDict(
            {_key(word): nn.Parameter(vectors[None], requires_grad=False) for word, vectors in words.items()}
        ).to(self.model.device)
        if words:
            named = ", ".join(words)
            log.info("%s brings the learnt words %s: texts that name them are drawn with them.", path.name, named)
            if not any(word in self.identifier for word in words):
                log.warning(
                    "no placeholder stands for %s: method.identifier='%s' puts it there.", named, "".join(words)
                )

    def _take_word(self, index: int, places: Sequence[Path]) -> None:
        """The learnt word that lies beside the matrices, or beside their folder, where one is learnt.

        Raises:
            UserError: it is of another width, or several vectors.
        """
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            return
        if not self.learn_word:
            log.warning("%s beside it holds a learnt word: method.learn_word=true draws with it.", path.name)
            return
        rows = embedding.read_each(path, self.model.widths)
        if rows.shape != self.word[index : index + 1].shape:
            raise UserError(
                f"{path.name} holds {len(rows)} vectors of width {rows.shape[1]}, this run learns one of width "
                f"{self.model.width}. Load the base model it was made for."
            )
        self.word[index].copy_(rows[0])
        self.word_norm[index].copy_(rows.norm(dim=-1))

    def _check(self, path: Path, part: str, pairs: files.Pairs) -> None:
        """Refuse matrices for another architecture.

        Raises:
            UserError: naming the layer.
        """
        weights = dict((self.model.unet if part == "unet" else self.model.text_module).named_parameters())
        for name, (down, up) in pairs.items():
            weight = weights.get(f"{name}.weight")
            if weight is None:
                raise UserError(
                    f"{path.name} changes {name}, which {self.model.name} does not have: another base model."
                )
            if (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
                raise UserError(
                    f"{path.name} changes {name} as {[up.shape[0], *down.shape[1:]]}, in {self.model.name} it is "
                    f"{list(weight.shape)}. Load the base model it was made for."
                )


def _key(word: str) -> str:
    """A word as a parameter's name, which may hold no dot and not everything else."""
    return word.encode().hex()


def _word(key: str) -> str:
    return bytes.fromhex(key).decode()


def _start(seed: int, name: str, shape: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1 / r^2), B = 0, so that training starts from the bare model.

    As `init_lora_weights="gaussian"` of PEFT's peft/tuners/lora/layer.py (LoraLayer.reset_lora_parameters).
    """
    down = draws.normal(seed, f"lora {name}", [0], (rank, *shape[1:]))[0] / rank
    return down, torch.zeros(shape[0], rank, *[1] * (len(shape) - 2))
