"""EDICT (Wallace et al. 2023): exact inversion by two coupled latents; nothing is fitted.

Follows salesforce/EDICT (edict_functions.py, coupled_stablediffusion). Each latent is stepped with the noise that is
predicted in the other, so that every step is an affine map with known coefficients, and is undone by its inverse.
Symbols: x_0, x_1 (the pair), t_i (timestep of drawing step i, 0 is the noisiest), n (steps that are made), T (steps),
p (weight of a latent in its own mixture), w (guidance).
Axes: B rows (the source and its targets), 2 the pair, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hiperlab.base.editing_method import Drawing, EditingMethod, EditorSettings
from hiperlab.edit.edits import Edits, Rows
from hiperlab.edit.own_source import OwnSourceEdits, block_alignment
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, map_pixels
from hiperlab.errors import UserError
from hiperlab.model.attention_control import Record
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.inversion import Inversion, following, noise_calls, previous
from hiperlab.model.noise import INVERTED, check_latent
from hiperlab.model.shared_calls import Calls
from hiperlab.model.stack import FrozenStack

Predict = Callable[[int, Tensor], Calls[Tensor]]  # step i, latents (B, C, H, W) -> their guided noise, same shape


def coupled_timesteps(steps: int, strength: float, length: int = 1000) -> list[int]:
    """t_0 .. t_{n-1}, descending to 0: the last n = floor(T s) of T evenly spaced ones, with an offset of 0.

    Raises:
        UserError: T does not divide the schedule, or no step is left.
    """
    if not 1 <= steps <= length or length % steps:
        raise UserError(f"sampler.steps={steps} does not divide {length}, so that steps would not be exact. Choose 50.")
    made = math.floor(steps * strength + 1e-9)  # the rounding of a product takes no step away: 0.58 of 50 is 29
    if not 1 <= made <= steps:
        raise UserError(
            f"method.strength={strength} makes {made} of {steps} steps. Choose more than 0, at most 1; advised are 0.6 "
            "to 0.9."
        )
    return [k * (length // steps) for k in reversed(range(made))]


def mixed(pair: Tensor, p: float) -> Tensor:
    """The pair (B, 2, C, H, W) drawn together after a drawing step, x_0 first, then x_1 with the new x_0."""
    first = p * pair[:, 0] + (1 - p) * pair[:, 1]
    return torch.stack([first, (1 - p) * first + p * pair[:, 1]], dim=1)


def unmixed(pair: Tensor, p: float) -> Tensor:
    """What `mixed` gave (B, 2, C, H, W), undone; the difference of the two, and its rounding, grows by 1 / p^2."""
    second = (pair[:, 1] - (1 - p) * pair[:, 0]) / p
    return torch.stack([(pair[:, 0] - (1 - p) * second) / p, second], dim=1)


def order(step: int, leapfrog: bool) -> tuple[int, int]:
    """Which of the pair is moved first and second in drawing step i: with `leapfrog` the two take turns."""
    first = step % 2 if leapfrog else 0
    return first, 1 - first


def draw_calls(
    stack: FrozenStack,
    pair: Tensor,
    steps: int,
    path: Sequence[int],
    p: float,
    leapfrog: bool,
    predict: Predict,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Calls[Tensor]:
    """Denoise a pair (B, 2, C, H, W).

    Args:
        stack: the frozen model.
        pair: at the level of the first timestep.
        steps: T.
        path: t_0 .. t_{n-1}, descending. At 0 both levels are one, and only mixing is left.
        p: in (0, 1].
        leapfrog: see `order`.
        predict: step i and latents of one of the pair -> their guided noise.
        watch: called with (step, pair) after each step.
    """
    for step, timestep in enumerate(path):
        for moved in order(step, leapfrog) if timestep else ():
            noise = yield from predict(step, pair[:, 1 - moved])
            pair = _with(pair, moved, previous(stack, pair[:, moved], noise, timestep, steps))
        pair = mixed(pair, p)
        if watch is not None:
            watch(step, pair)
    return pair


def invert_calls(
    stack: FrozenStack,
    pair: Tensor,
    steps: int,
    path: Sequence[int],
    p: float,
    leapfrog: bool,
    predict: Predict,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Calls[Tensor]:
    """`draw_calls` backwards, from the picture's pair (B, 2, C, H, W) to the noisy one; the same arguments.

    `step` is the drawing's everywhere: which latent goes first follows from it, whatever the number of steps.
    """
    for step, timestep in reversed(list(enumerate(path))):
        pair = unmixed(pair, p)
        for moved in reversed(order(step, leapfrog)) if timestep else ():
            noise = yield from predict(step, pair[:, 1 - moved])
            pair = _with(pair, moved, following(stack, pair[:, moved], noise, timestep, steps))
        if watch is not None:
            watch(step, pair)
    return pair


def _with(pair: Tensor, number: int, latents: Tensor) -> Tensor:
    both = list(pair.unbind(1))
    both[number] = latents
    return torch.stack(both, dim=1)


class Edict(EditingMethod):
    """The source's noisy pair is found exactly and drawn with the targets' texts.

    The pair and its steps are float64, because rounding grows by 1 / p^2 a step; the U-Net predicts in its own
    precision. What it predicts for the source must then be the same numbers in both directions: its calls have the
    same rows (without and with the text) there and back, and no others are joined to them (`Call.apart`), whoever
    else is drawn. The targets, which have nothing to be equal to, share one call, with those of others as well.

    Artifacts keep the noisy pair in float64.

    Args:
        strength: s in (0, 1], share of the steps that are made (theirs: init_image_strength).
        mix_weight: p in (0, 1].
        leapfrog: the two take turns in being moved first (theirs: leapfrog_steps); False as in the paper.
        guidance_source: w of the inversion and of the source row; the targets have the sampler's.
        use_p2p: targets read the source text's attention maps in all layers and steps, see `OwnSourceEdits`.
        latent: what is inverted, "sample_once" (a draw from the VAE's posterior) or its "mean".
        editor: as in `EditingMethod`; T divides the schedule's length, and the seed is that of the posterior's draw.

    Raises:
        UserError: a setting out of its range.
    """

    fixed_settings = ("steps", "strength", "mix_weight", "leapfrog", "guidance_source")
    sampling_settings: ClassVar[tuple[str, ...]] = ("cache", "use_p2p")
    why_apart = "what it predicts for the source must be the inversion's numbers to the last digit"
    negates_source = False  # it was inverted with the empty text
    keeps_path = False
    published_crop = "square"  # load_im_into_format_from_path

    def __init__(
        self,
        strength: float,
        mix_weight: float,
        leapfrog: bool,
        guidance_source: float,
        use_p2p: bool,
        latent: str,
        **editor: Unpack[EditorSettings],
    ) -> None:
        self.path = coupled_timesteps(editor["steps"], strength, editor["model"].num_timesteps)
        if not 0 < mix_weight <= 1:
            raise UserError(f"method.mix_weight={mix_weight} cannot be undone. Choose 0.9 to 1; published is 0.93.")
        super().__init__(p2p=PromptToPrompt.off(), inject_source_latents=False, **editor)
        self.strength, self.mix_weight, self.leapfrog = float(strength), float(mix_weight), leapfrog
        self.guidance_source = self.inversion_guidance = float(guidance_source)
        self.use_p2p, self.latent = use_p2p, check_latent(latent, INVERTED)
        self.register_buffer("noise", torch.zeros(2, *self.model.latent_shape, dtype=torch.float64))  # the noisy pair

    # ---- the inversion -----------------------------------------------------------------------------------------------

    def inversion_choices(self) -> list[Any]:
        """The coupling's settings, too."""
        return ["edict", self.strength, self.mix_weight, self.leapfrog, *super().inversion_choices()]

    @torch.no_grad()
    def _inversion_calls(self) -> Calls[Inversion]:
        """The noisy pair, as the one latent of its path (1, 1, 2, C, H, W)."""
        latents = self.picture_latents()
        states, empty = (self.encode.condition([text]) for text in (self.inverted_text(), ""))
        pair = yield from invert_calls(
            self.model, torch.stack([latents, latents], dim=1), self.steps, self.path, self.mix_weight, self.leapfrog,
            lambda step, z: self._source_calls(step, z, states, empty),
        )  # fmt: skip
        return Inversion(pair[None], {})

    def _source_calls(
        self, step: int, latents: Tensor, states: Conditioning, empty: Conditioning, record: Record | None = None
    ) -> Calls[Tensor]:
        """The source's guided noise (1, C, H, W) in latents of that shape: the same call in both directions."""
        w = self.guidance_source
        return (yield from self._guided_calls(step, latents, [states], empty if w != 1 else None, w, record, True))

    def _guided_calls(
        self,
        step: int,
        latents: Tensor,
        texts: Sequence[Conditioning],
        empty: Conditioning | None,
        guidance: float,
        record: Record | None,
        apart: bool,
    ) -> Calls[Tensor]:
        """Guided noise (B, C, H, W), of one call.

        Args:
            step: of the drawing.
            latents: (B, C, H, W).
            texts: conditionings of B rows each; the last one is the text that is drawn.
            empty: of guidance's other branch, B rows; None for no guidance.
            guidance: w.
            record: the call's control.
            apart: see `Call`.
        """
        parts = [*([] if empty is None else [empty]), *texts]
        rows = concatenate(parts).controlled(record)
        many = torch.cat([latents] * len(parts))
        found = yield from noise_calls(self.model, many, self.path[step], rows, apart=apart)
        answers = found.chunk(len(parts))
        return answers[-1] if empty is None else answers[0] + guidance * (answers[-1] - answers[0])

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def edits(self, texts: Sequence[str], side: int, guided: bool, keep: bool) -> Edits:
        """Maps are kept where asked, and taken over with `use_p2p`; arguments as `EditingMethod.edits`."""
        ids = self.model.tokenize([self.source, *texts[1:]]).ids.tolist()
        taken = [block_alignment(ids[0], each) for each in ids[1:]] if self.use_p2p else []
        return OwnSourceEdits(Rows(len(texts), guided=False), map_pixels(side), keep, taken)

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """x_0 (B, C, H, W) from the noisy pair (B, 2, C, H, W); x_1 is nearly the same.

        `watch` is given the pair.
        """
        start, conditional, unconditional, guidance, edits, watch = drawing
        targets = range(1, len(start))
        again = [[0] * len(targets)] if isinstance(edits, OwnSourceEdits) and edits.taken else []

        def predict(step: int, latents: Tensor) -> Calls[Tensor]:
            states, empty = conditional(step), unconditional(step)
            record = Record(edits.is_stored) if edits is not None and edits.stores else None
            found = yield from self._source_calls(step, latents[:1], states.rows([0]), empty.rows([0]), record)
            records = [record]
            if targets:
                records.append(edits.control() if isinstance(edits, OwnSourceEdits) else None)
                beside = yield from self._guided_calls(
                    step, latents[1:], [states.rows(rows) for rows in (*again, targets)],
                    empty.rows(targets) if self.is_guided(guidance) else None, guidance, records[-1], apart=False,
                )  # fmt: skip
                found = torch.cat([found, beside])
            if record is not None and edits is not None:
                for layer in record.maps:
                    rows = zip(records, (1, len(targets)), strict=False)
                    edits.store(layer, torch.cat([each.maps[layer][-count:] for each, count in rows if each]))
            return found

        pair = yield from draw_calls(
            self.model, start, self.steps, self.path, self.mix_weight, self.leapfrog, predict, watch
        )
        return pair[:, 0]
