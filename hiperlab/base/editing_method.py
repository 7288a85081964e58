"""Methods that edit one picture from its inverted noise.

The order of steps is that of the authors of Prompt-to-Prompt and null-text inversion (google/prompt-to-prompt,
null_text_w_ptp.ipynb) and of StyleDiffusion (sen-mao/StyleDiffusion, stylediffusion.py).
Symbols: T (steps), i (sampling step, 0 is the noisiest), t_i (its timestep).
Axes: B rows (the source and its targets), C latent channels, H, W latent sides, N tokens, D text width, s side of an
attention map. There is one concept: K is 1.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from hiperlab import files
from hiperlab.base.capability import EditsPicture, ReadsPicture, ShowsAttention, WordMaps
from hiperlab.base.method import Method, Step, Subject, in_evaluation
from hiperlab.data.edit import described
from hiperlab.edit.edits import Edits
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, edit_calls
from hiperlab.edit.token_alignment import word_tokens, words
from hiperlab.errors import DiskFullError, UserError
from hiperlab.model import noise as diffusion
from hiperlab.model.attention_control import Layer, cross_maps, layer_of
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import Inversion, inversion_calls, timesteps
from hiperlab.model.sampler import Sampler
from hiperlab.model.shared_calls import Calls, alone
from hiperlab.model.stack import FrozenStack, weights_digest
from hiperlab.model.text_cache import TextCache

log = logging.getLogger(__name__)
MOST_MAPS = 8  # texts whose maps are kept as they are drawn
Conditions = Callable[[int], Conditioning]  # sampling step i -> conditioning of the rows


class Drawing(NamedTuple):
    """What is drawn together: a source and its targets.

    Attributes:
        start: noise of the B rows (B, C, H, W), the source's first, or what else a method starts from.
        conditional: conditioning of the B rows at each sampling step.
        unconditional: the same of guidance's other branch.
        guidance: w.
        edits: the controls of attention, None for none.
        watch: called with (sampling step, latents) after each step.
    """

    start: Tensor
    conditional: Conditions
    unconditional: Conditions
    guidance: float
    edits: Edits | None
    watch: Callable[[int, Tensor], None] | None = None


class EditorSettings(TypedDict):
    """What every method that keeps inversions is built with; see `EditingMethod`."""

    model: FrozenStack
    concepts: Sequence[Subject]
    optimizer: Callable[..., Optimizer]
    seed: int
    steps: int
    cache: str | None


class EditingSettings(EditorSettings):
    """What `EditingMethod` itself is built with."""

    p2p: PromptToPrompt
    inject_source_latents: bool


class EditingMethod(Method, ReadsPicture, EditsPicture, ShowsAttention):
    """Edits one picture by drawing its source text and its targets together from its inverted noise.

    The inversion is made when it is first needed, once per picture, and kept on disk by content. The source text
    itself gives the reconstruction; all targets of a call share its row.

    Args:
        model: the frozen stack.
        concepts: one picture with its source text and, where known, its targets.
        optimizer: parameters -> optimizer; unused by methods that train nothing.
        seed: of draws.
        steps: T, of the inversion and of every drawing.
        p2p: how attention maps are taken over.
        inject_source_latents: put the recorded path in the source row's place after each step, so that it is exact.
        cache: folder of kept inversions; None keeps them in memory.
    """

    stacks_concepts = False
    why_no_early_stop = "this method trains nothing"
    seeded = False
    inverts_source = True  # whether the inversion reads the source text; else an empty one
    reads_source = True  # whether the source row of a drawing does
    negates_source = True  # whether the source row, too, has the negative text; else its unconditional text is empty
    inversion_guidance = 1.0  # w along the inversion; at 1 the source text alone is asked
    keeps_path = True  # whether the inversion's whole path is kept; else its end alone
    latent = "mean"  # of the VAE's posterior: what is inverted, or "sample_once" for a draw
    training_settings = ("optimizer", "cache")  # the cache is a place, not a choice
    sampling_settings: ClassVar[tuple[str, ...]] = ("p2p", "inject_source_latents", "cache")

    noise: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        steps: int,
        p2p: PromptToPrompt,
        inject_source_latents: bool,
        cache: str | None,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        self.steps, self.inject_source_latents = steps, inject_source_latents
        self.inversion_steps = steps  # a method that walks there in more steps says so
        self.timesteps = timesteps(steps, model.num_timesteps)[::-1]  # t_0 .. t_{T-1}, the noisiest first
        self.cache = files.expand(cache) if cache else None
        self.source = concepts[0].source or described(concepts[0].word)
        self.p2p = p2p.with_settings(concepts[0].edit_settings)
        self.p2p.check(model.tokenizer, self.source, [text for text in concepts[0].targets if text != self.source])
        self.encode = TextCache(model)
        self.register_buffer("noise", torch.zeros(model.latent_shape))  # the pivot's end, all that editing needs
        self._picture: Tensor | None = None
        self._inversion: Inversion | None = None
        self._maps: dict[tuple[str, int, float, str], WordMaps] = {}  # by text, seed, guidance and negative text

    # ---- what a method of this kind may write ------------------------------------------------------------------------

    def edit_conditions(self, texts: Sequence[str], negative: str | None) -> tuple[Conditions, Conditions]:
        """Conditional and unconditional conditioning of the rows at each sampling step.

        Args:
            texts: B plain texts, the source first.
            negative: text of the unconditional branch; None for an absent one.
        """
        states = self.encode.condition([texts[0] if self.reads_source else "", *texts[1:]])
        first = negative if self.negates_source else ""
        empty = self.encode.negative([first, *[negative] * (len(texts) - 1)])
        return (lambda step: states), (lambda step: empty)

    def edits(self, texts: Sequence[str], side: int, guided: bool, keep: bool) -> Edits:
        """The controls of one drawing: Prompt-to-Prompt's.

        Args:
            texts: B plain texts, the source first.
            side: of the latents.
            guided: whether each call has unconditional rows.
            keep: add up the cross-attention maps, for pictures of them.
        """
        return self.p2p.edits(self.model.tokenizer, self.source, texts[1:], self.steps, side, guided, keep)

    def inverted_text(self) -> str:
        """The text that the picture is inverted with: the source's, or an empty one."""
        return self.source if self.inverts_source else ""

    @property
    def source_once(self) -> bool:
        """Whether the source row reads an empty text in both branches of guidance, so that one row serves both."""
        return not self.reads_source and not self.negates_source

    def map_pixels(self) -> int | None:
        """Image positions of the cross-attention maps that the inversion keeps (`cross_maps`), None for no maps."""
        return None

    def start_calls(self, seed: int) -> Calls[Tensor]:
        """Where drawing starts, (1, C, H, W): the picture's inverted noise, the same for every seed."""
        if not self.noise.any():
            yield from self.prepare_calls()
        return self.noise[None]

    def is_guided(self, guidance: float) -> bool:
        """Whether `denoise_calls` asks for unconditional rows, too."""
        return guidance > 1

    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """z_0 (B, C, H, W) of the source and its targets, drawn as `edit_calls` does."""
        start, conditional, unconditional, guidance, edits, watch = drawing
        pivot = yield from self._recorded_calls()
        return (
            yield from edit_calls(
                self.model, start, self.steps, conditional, unconditional, guidance, edits, pivot, watch
            )
        )

    # ---- the inversion -----------------------------------------------------------------------------------------------

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Take the picture (3, 8H, 8W) in [-1, 1]; it is inverted when first needed, on the method's device then."""
        self._picture, self._inversion = picture.detach().cpu().float(), None
        self.noise.zero_()

    def prepare(self) -> None:
        """Invert the picture unless that is done."""
        alone(self.model, self.prepare_calls())

    def prepare_calls(self) -> Calls[None]:
        """`prepare` as U-Net calls: several pictures' inversions can share them."""
        if self._inversion is None:
            path = self._cache_path()  # once: it reads all weights
            found = self._read(path)
            if found is None:
                found = self._write(path, (yield from self._inversion_calls()))
            self._inversion = found
            if not self.noise.any():  # a loaded artifact's stays: it may be of another picture, see `_recorded_calls`
                self.noise.copy_(self.pivot[-1])

    @property
    def inversion(self) -> Inversion:
        """The picture's path (T+1, 1, C, H, W) and maps, on the method's device."""
        self.prepare()
        assert self._inversion is not None
        if self._inversion.latents.device != self.device or self._inversion.latents.dtype != self.noise.dtype:
            self._inversion = Inversion(
                self._inversion.latents.to(self.noise),
                {layer: maps.to(self.noise) for layer, maps in self._inversion.maps.items()},
            )
        return self._inversion

    @property
    def pivot(self) -> Tensor:
        """The path (T+1, C, H, W), from the picture to its noise."""
        return self.inversion.latents[:, 0]

    def _reference(self) -> Tensor:
        if self._picture is None:
            raise UserError(
                f"{type(self).__name__} has no picture: call set_reference(0, picture) or load an artifact."
            )
        return self._picture

    def picture_latents(self) -> Tensor:
        """z_0 (1, C, H, W), scaled: the mean of the VAE's posterior of the picture, or a draw (`latent`)."""
        moments = self.model.encode_moments(self._reference()[None])
        first = torch.zeros(1, dtype=torch.long)
        noise = diffusion.posterior_noise(self.latent, self.seed, first, first, self.model.latent_shape)
        return self.model.scale(diffusion.sample_posterior(moments, noise.to(moments))).to(self.noise)

    def inversion_choices(self) -> list[Any]:
        """What an inversion depends on beside the picture, its text, steps and the model; names the kept file."""
        choices: list[Any] = [] if self.latent == "mean" else [self.latent, self.seed]
        return choices if self.inversion_guidance == 1 else [self.inversion_guidance, *choices]

    def _inversion_calls(self) -> Calls[Inversion]:
        latents = self.picture_latents()
        log.info("%s: inverting in %d steps", self.concepts[0].name, self.inversion_steps)
        pixels = self.map_pixels()
        wanted = None if pixels is None else cross_maps(pixels)
        text, steps = self.inverted_text(), self.inversion_steps
        states = self.encode.condition([text])
        if self.inversion_guidance == 1 or not text:  # guidance from a text to itself is none
            return (yield from inversion_calls(self.model, latents, states, steps, wanted))
        empty = self.encode.condition([""])
        return (yield from inversion_calls(self.model, latents, states, steps, wanted, empty, self.inversion_guidance))

    def _cache_path(self) -> Path | None:
        """The file that keeps the inversion, named by all it depends on."""
        if self.cache is None:
            return None
        model = self.model
        picture = hashlib.sha256(self._reference().numpy().tobytes()).hexdigest()
        parts = (model.text, model.unet, model.vae.encoder)
        kinds = [str(next(part.parameters()).dtype) for part in parts]
        settings = [
            picture, self.inverted_text(), self.inversion_steps, model.size, model.scheduler_config, kinds,
            str(self.noise.dtype), self.map_pixels(), weights_digest(parts),
        ]  # fmt: skip
        settings += self.inversion_choices()  # none by default, so that files of earlier versions are found
        name = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()[:20]
        return self.cache / f"{name}.safetensors"

    def _read(self, path: Path | None) -> Inversion | None:
        if path is None or not path.is_file():
            return None
        try:
            kept = load_file(path)
            maps = {layer_of(name): maps for name, maps in kept.items() if name != "latents"}
            found = Inversion(kept["latents"], dict(sorted(maps.items(), key=lambda pair: _order(pair[0]))))
            shape = (self.inversion_steps + 1 if self.keeps_path else 1, 1, *self.noise.shape)
            if found.latents.shape != shape:
                raise ValueError(f"latents {tuple(found.latents.shape)} instead of {shape}")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("the kept inversion %s cannot be read (%s): it is made anew.", path, error)
            return None
        log.info("%s: its inversion is kept in %s", self.concepts[0].name, path)
        return found

    def _write(self, path: Path | None, found: Inversion) -> Inversion:
        if path is not None:
            tensors = {"latents": found.latents, **{layer.name: maps for layer, maps in found.maps.items()}}
            content = save({name: value.cpu().contiguous() for name, value in tensors.items()})
            try:
                files.atomic_write(path, content)
            except (OSError, DiskFullError) as error:  # it only saves time
                log.warning("the inversion could not be kept in %s (%s).", path, error)
        return found

    # ---- the contract ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """There is nothing to train unless a subclass has parameters."""
        return True

    def condition(self, step: Step) -> Conditioning:
        """The plain texts: (1, R, N, D). What a step of the path adds comes from `edit_conditions`."""
        texts = [self.concepts[0].with_class_noun(prompt) for prompt in step.prompts]
        return self.encode.condition(texts)

    def trainable_state(self) -> dict[str, Tensor]:
        """Own tensors by name, (1, ...) each: a concept axis of one in front, as views, so loading changes them."""
        return {name: value[None] for name, value in super().trainable_state().items()}

    def artifact(self, index: int) -> dict[str, Tensor]:
        """The inverted noise (C, H, W) and what was fitted along the path: enough to edit without the picture."""
        if self._picture is not None:
            alone(self.model, self.start_calls(self.seed))
        return super().artifact(index)

    # ---- drawing -----------------------------------------------------------------------------------------------------

    @in_evaluation
    @torch.no_grad()
    def sample_calls(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        concepts: Sequence[int] | None = None,
        images: Tensor | None = None,
        sampler: Sampler | None = None,
        variant: str = "",
        negative: str | None = None,
        batch_size: int = 8,
    ) -> Calls[Tensor]:
        """Pictures (B, 3, 8H, 8W) in [0, 1] as `Method.sample`: the source text reconstructs, any other text edits.

        Raises:
            UserError: another sampler or number of steps than the path's.
        """
        self._check_sampler(steps, sampler)
        texts = [self.concepts[0].with_class_noun(prompt) for prompt in prompts]
        keys = [(text, seed if self.seeded else 0) for text, seed in zip(texts, seeds, strict=True)]
        found: dict[tuple[str, int], Tensor] = {}
        for seed in dict.fromkeys(seed for _, seed in keys):
            wanted = dict.fromkeys(text for text, of in keys if of == seed)
            pictures = yield from self._draw_calls(list(wanted), seed, guidance, negative, batch_size)
            found |= {(text, seed): picture for text, picture in pictures.items()}
        return torch.stack([found[key] for key in keys])

    @torch.no_grad()
    def attention_maps(self, prompts: Sequence[str], seed: int, *, guidance: float) -> list[WordMaps]:
        """Maps (words, s, s) of the source and of each prompt's text, drawn together.

        A target's are its maps after editing. A source row that reads no text has none. Those that `keeps_maps` kept
        are not drawn again.

        Args:
            prompts: texts with placeholders in place.
            seed: of the pictures.
            guidance: classifier-free guidance scale.
        """
        texts = list(dict.fromkeys([self.source, *(self.concepts[0].with_class_noun(prompt) for prompt in prompts)]))
        drawn = {text: self._maps.get((text, seed if self.seeded else 0, guidance, "")) for text in texts}
        if not all(drawn.values()):
            try:
                places = [word_tokens(text, self.model.tokenizer) for text in texts]
            except UserError as error:
                log.warning("no attention pictures: %s", error)
                return []
            with self._evaluating():
                pictures, edits = alone(self.model, self._edit_calls(texts, seed, guidance, None, keep=True))
            drawn = dict(zip(texts, word_maps(texts, places, pictures, edits), strict=True))
        return [maps for text, maps in drawn.items() if maps and (self.reads_source or text != self.source)]

    def _places_to_keep(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Of each text the tokens of each word where this drawing's maps are to be kept, else nothing."""
        if not self.keeps_maps or len(self._maps) >= MOST_MAPS:
            return []
        try:
            return [word_tokens(text, self.model.tokenizer) for text in texts]
        except UserError as error:  # `attention_maps` says so again where they are asked for
            log.info("no attention pictures: %s", error)
            return []

    def _draw_calls(
        self, texts: Sequence[str], seed: int, guidance: float, negative: str | None, batch_size: int
    ) -> Calls[dict[str, Tensor]]:
        """Pictures (3, H, W) in [0, 1] by text; the source is drawn beside every batch of targets."""
        targets = [text for text in texts if text != self.source]
        room = max(1, batch_size - 1)
        found: dict[str, Tensor] = {}
        for start in range(0, max(1, len(targets)), room):
            rows = [self.source, *targets[start : start + room]]
            places = self._places_to_keep(rows)
            pictures, edits = yield from self._edit_calls(rows, seed, guidance, negative, keep=bool(places))
            if places and edits.sums:
                for maps in word_maps(rows, places, pictures, edits):
                    self._maps[maps.text, seed, guidance, negative or ""] = maps
            found = {**dict(zip(rows, pictures, strict=True)), **found}
        return found

    def _edit_calls(
        self, rows: Sequence[str], seed: int, guidance: float, negative: str | None, keep: bool = False
    ) -> Calls[tuple[Tensor, Edits]]:
        """Pictures (B, 3, H, W) in [0, 1] of B texts, the source first, and the controls that saw their maps."""
        conditional, unconditional = self.edit_conditions(rows, negative)
        start = yield from self.start_calls(seed)
        edits = self.edits(rows, start.shape[-1], self.is_guided(guidance), keep)
        many = start.expand(len(rows), *start.shape[1:])
        latents = yield from self.denoise_calls(Drawing(many, conditional, unconditional, guidance, edits))
        return self._decode(latents), edits

    def _recorded_calls(self) -> Calls[Tensor | None]:
        """The path that the source row is held to, None for none."""
        if not self.inject_source_latents:
            return None
        yield from self.prepare_calls()  # a loaded artifact holds the noise, not the path
        if not torch.allclose(self.pivot[-1], self.noise, atol=1e-2):
            raise UserError("the artifact is of another picture: use method.inject_source_latents=false.")
        return self.pivot

    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 8H, 8W) in [0, 1] on the CPU of latents (B, C, H, W); the VAE takes one at a time."""
        pictures = [self.model.decode(row[None]) for row in latents]
        return torch.cat(pictures).div(2).add(0.5).clamp(0, 1).cpu()

    def _check_sampler(self, steps: int, sampler: Sampler | None) -> None:
        name = type(self).__name__
        if sampler is not None and (sampler.scheduler != "DDIMScheduler" or sampler.options):
            raise UserError(
                f"{name} follows DDIM's own path: use sampler=ddim with its options, not {sampler.scheduler}."
            )
        if steps != self.steps:
            raise UserError(f"{name} follows a path of {self.steps} steps, {steps} were asked: set sampler.steps.")


def _order(layer: Layer) -> tuple[int, str]:
    """Down, middle, up; inside a block the names are in the order of execution."""
    return ("down", "mid", "up").index(layer.place), layer.name


def word_maps(
    texts: Sequence[str], places: Sequence[Sequence[Sequence[int]]], pictures: Tensor, edits: Edits
) -> list[WordMaps]:
    """Where the words of B texts looked, mean over layers and heads, summed over steps.

    Args:
        texts: B.
        places: of each text, the tokens of each word.
        pictures: what was drawn (B, 3, 8H, 8W) in [0, 1].
        edits: the controls that saw the maps.

    Raises:
        UserError: the U-Net has no maps of that size.
    """
    maps = edits.maps().mean(1)  # (B, s, s, N)
    return [
        WordMaps(text, picture, tuple(words(text)), torch.stack([row[..., each].mean(-1) for each in place]).cpu())
        for text, picture, row, place in zip(texts, pictures, maps, places, strict=True)
    ]
