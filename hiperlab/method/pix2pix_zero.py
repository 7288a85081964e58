"""pix2pix-zero (Parmar et al. 2023): a direction in text space, and cross-attention held to the reconstruction's.

Follows pix2pixzero/pix2pix-zero (src/utils/ddim_inv.py, src/utils/edit_pipeline.py, src/utils/edit_directions.py).
Symbols: c (text states of the source), D (the edit's direction), A (cross-attention maps), z (latents), T (steps), w
(guidance), t_i (timestep of sampling step i).
Axes: B rows (the source and its targets), n targets, h heads, S image positions, N tokens, D text width, C latent
channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hiperlab import draws
from hiperlab.base.editing_method import Conditions, Drawing, EditingMethod, EditorSettings
from hiperlab.edit.edits import Edits, Rows
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, map_pixels
from hiperlab.errors import UserError, near
from hiperlab.loss.white_noise import sides, whitened
from hiperlab.model.attention_control import Layer, Record
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.inversion import Inversion, levels, move, noise_calls, previous, timesteps
from hiperlab.model.noise import INVERTED, check_latent
from hiperlab.model.shared_calls import Call, Calls
from hiperlab.model.stack import FrozenStack

LEVELS = ("all", "authors")
UNCONDITIONAL = ("source", "negative")
ENCODED = 64  # sentences of one pass of the text encoder
Part = Callable[[Conditioning], Tensor]


def states_of(found: Conditioning) -> Tensor:
    """The states (B, N, D) of plain texts."""
    return found.keys[0]


def pooled_of(found: Conditioning) -> Tensor:
    """The pooled rows (B, P) of plain texts, where the model has any."""
    assert found.pooled is not None
    return found.pooled


def inversion_path(stack: FrozenStack, steps: int, kind: str) -> list[tuple[int, Tensor, Tensor]]:
    """Of every step of the inversion its timestep, and alpha_bar of the levels that it leaves and reaches, 0-d.

    Args:
        stack: the frozen model.
        steps: T.
        kind: "all": from each level of the drawing to the next; "authors": without the first and the last step, and
            one timestep low (DDIMInversion.__call__ and DDIMInverseScheduler.step), so that the picture counts as
            noisy, and the end lies below the level that drawing starts at.

    Raises:
        UserError: too few steps.
    """
    path = timesteps(steps, stack.num_timesteps)
    if kind == "all":
        pairs = [levels(stack, timestep, steps) for timestep in path]
        return [(timestep, below, here) for timestep, (here, below) in zip(path, pairs, strict=True)]
    if steps < 3:
        raise UserError(f"sampler.steps={steps}: method.levels=authors leaves out two. Choose 3 or more.")
    stride, level = stack.num_timesteps // steps, stack.alpha_bar
    return [(timestep, level[timestep - 1], level[timestep - 1 + stride]) for timestep in path[1:-1]]


def drawn_rolls(seed: int, step: int, outer: int, inner: int, channels: int, side: int) -> Tensor:
    """Rolls (M, N, C, K) of one step, int64: M rounds of N, for C channels at K levels.

    Each is uniform in [1, half the side of its level). A roll of 0 would push down the noise's own power; the authors'
    code excludes it since September 2024.

    Args:
        seed: of the draws.
        step: number of the step.
        outer: M.
        inner: N.
        channels: C.
        side: H, 4 or more.
    """
    generator = draws.generator(seed, "rolls", step)
    found = [generator.integers(1, each // 2, size=(outer, inner, channels)) for each in sides(side)]
    return torch.stack([torch.from_numpy(each) for each in found], dim=-1)


def map_distance(maps: Mapping[Layer, Tensor], reference: Mapping[Layer, Tensor]) -> Tensor:
    """Sum of n targets' losses, 0-d: over layers the mean over a target's two rows and h heads of |A - A_ref|^2.

    Args:
        maps: (2n, h, S, N) by layer, n unconditional rows and then n conditional ones.
        reference: (1, h, S, N) for all rows, or (2, h, S, N), one for each branch.
    """
    total = []
    for layer, each in maps.items():
        held = reference[layer].detach()
        branches = each.unflatten(0, (2, -1)) - held[:, None]
        total.append(branches.square().sum() / (2 * each.shape[1]))
    return torch.stack(total).sum()


class Pix2PixZero(EditingMethod):
    """The source is reconstructed beside its targets; its cross-attention maps hold theirs.

    At every step the latents of both of a target's rows make one step down the distance of their maps to the source's
    at that step. Noise is predicted from the moved latents, of which the unconditional row's go on.

    A gradient's call has a picture's own targets alone: joined with others, each would walk back through all. The other
    calls are shared.

    Args:
        levels: "all" or "authors", see `inversion_path`.
        lambda_ac: weight of the noise's autocorrelation along the inversion, at latents of 4 x 64 x 64.
        lambda_kl: the same of its distance from unit variance.
        num_reg_steps: rounds of these a step.
        num_ac_rolls: steps down the autocorrelation a round.
        xa_guidance: rate of the step down the maps' distance (theirs: xa_guidance, guidance_amount); 0 for none.
        unconditional: text of guidance's other branch, the "source" (theirs for real pictures) or the "negative" one.
        source_sentences: what the source word's sentences or words are, a list or a text file with one a line.
        target_sentences: the same of the target. None, both: the texts of source and target themselves.
        direction_scale: factor of the direction.
        latent: what is inverted, "sample_once" (a draw from the VAE's posterior) or its "mean".
        editor: as in `EditingMethod`; the seed is that of the rolls and of the posterior's draw.

    Raises:
        UserError: a setting out of its range, or sentences that cannot be read or serve several targets.
    """

    sampling_settings: ClassVar[tuple[str, ...]] = (
        "cache", "xa_guidance", "unconditional", "source_sentences", "target_sentences", "direction_scale",
    )  # fmt: skip
    keeps_path = False
    published_crop = "squeeze"  # inversion.py resizes, and cuts nothing

    def __init__(
        self,
        levels: str,
        lambda_ac: float,
        lambda_kl: float,
        num_reg_steps: int,
        num_ac_rolls: int,
        xa_guidance: float,
        unconditional: str,
        source_sentences: str | Sequence[str] | None,
        target_sentences: str | Sequence[str] | None,
        direction_scale: float,
        latent: str,
        **editor: Unpack[EditorSettings],
    ) -> None:
        for name, value, known in (("levels", levels, LEVELS), ("unconditional", unconditional, UNCONDITIONAL)):
            if value not in known:
                raise UserError(f"method.{name}={value!r} is unknown.{near(str(value), known)}")
        for name, weight in (("lambda_ac", lambda_ac), ("lambda_kl", lambda_kl), ("xa_guidance", xa_guidance)):
            if weight < 0:
                raise UserError(f"method.{name}={weight} would push the wrong way. Choose 0 or more.")
        for name, count in (("num_reg_steps", num_reg_steps), ("num_ac_rolls", num_ac_rolls)):
            if count < 1:
                raise UserError(f"method.{name}={count} makes none. Choose 1 or more, or method.lambda_ac=0.")
        super().__init__(p2p=PromptToPrompt.off(), inject_source_latents=False, **editor)
        inversion_path(self.model, self.steps, levels)
        self.levels, self.unconditional, self.latent = levels, unconditional, check_latent(latent, INVERTED)
        self.lambda_ac, self.lambda_kl = float(lambda_ac), float(lambda_kl)
        self.num_reg_steps, self.num_ac_rolls = num_reg_steps, num_ac_rolls
        self.xa_guidance, self.direction_scale = float(xa_guidance), float(direction_scale)
        self.sentences = _sentences(source_sentences, target_sentences)
        self._directions: dict[Part, Tensor] = {}
        self._check_targets(len({text for text in self.concepts[0].targets if text != self.source}))

    def _check_targets(self, count: int) -> None:
        if self.sentences is not None and count > 1:
            raise UserError(
                f"method.source_sentences and target_sentences are one edit, {count} targets were given. Give one "
                "target, or leave the sentences null."
            )

    # ---- the inversion -----------------------------------------------------------------------------------------------

    def inversion_choices(self) -> list[Any]:
        """The regularisation's settings, too."""
        weights = [self.lambda_ac, self.lambda_kl, self.num_reg_steps, self.num_ac_rolls]
        return ["pix2pix_zero", self.levels, *weights, self.seed, *super().inversion_choices()]

    @torch.no_grad()
    def _inversion_calls(self) -> Calls[Inversion]:
        """The path's end alone (1, 1, C, H, W)."""
        latents, states = self.picture_latents(), self.encode.condition([self.inverted_text()])
        for step, (timestep, start, end) in enumerate(inversion_path(self.model, self.steps, self.levels)):
            found = yield from noise_calls(self.model, latents, timestep, states, start)
            noise = whitened(found[0], self.rolls(step), self.lambda_ac, self.lambda_kl)[None]
            latents = move(latents, noise, start, end)
        return Inversion(latents[None], {})

    def rolls(self, step: int) -> Tensor:
        """Of one step of the inversion (rounds, rolls, C, levels)."""
        channels, side, _ = self.model.latent_shape
        return drawn_rolls(self.seed, step, self.num_reg_steps, self.num_ac_rolls, channels, side)

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def edit_conditions(self, texts: Sequence[str], negative: str | None) -> tuple[Conditions, Conditions]:
        """The source's states, with each target's direction added to them; arguments as `EditingMethod`'s.

        Raises:
            UserError: a negative text where the source's is used, or several targets of one pair of sentences.
        """
        self._check_targets(len(texts) - 1)
        if self.unconditional == "source" and negative:
            raise UserError(
                f"sample.negative={negative!r}: the unconditional text is the source's. Leave it empty, or set "
                "method.unconditional=negative."
            )
        source = self.encode.condition([texts[0]])

        def towards(part: Part) -> Tensor:
            own = part(source)
            return torch.cat([own, own + self.direction_scale * self.directions(texts[1:], part)])

        states = source.rows([0] * len(texts)).reading(towards(states_of)[None])
        if source.pooled is not None:  # in SDXL the pooled row moves as the states do
            states = replace(states, pooled=towards(pooled_of))
        other = texts[0] if self.unconditional == "source" else negative
        empty = self.encode.negative([other] * len(texts))
        return (lambda step: states), (lambda step: empty)

    @torch.no_grad()
    def directions(self, targets: Sequence[str], part: Part = states_of) -> Tensor:
        """D (n, N, D) of n target texts: the target's mean states less the source's (construct_direction).

        Args:
            targets: n texts.
            part: `states_of`, or `pooled_of` for the direction (n, P) of the pooled row.
        """
        source = part(self.encode.condition([self.source]))
        if self.sentences is None:
            return part(self.encode.condition(targets)) - source if targets else source[:0]
        if part not in self._directions:
            before, after = (self._mean(each, part) for each in self.sentences)
            self._directions[part] = after - before
        return self._directions[part].to(source).expand(len(targets), *source.shape[1:])

    def _mean(self, sentences: Sequence[str], part: Part) -> Tensor:
        """Mean states (1, N, D), all positions as they are, or mean pooled row (1, P)."""
        chunks = [sentences[start : start + ENCODED] for start in range(0, len(sentences), ENCODED)]
        sums = [part(self.model.condition_text(each)).sum(0) for each in chunks]
        return torch.stack(sums).sum(0)[None] / len(sentences)

    def edits(self, texts: Sequence[str], side: int, guided: bool, keep: bool) -> Edits:
        """Keeps maps where asked; arguments as `EditingMethod.edits`."""
        return Edits(Rows(len(texts), guided=True), map_pixels(side), stores=keep)

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """z_0 (B, C, H, W) of the reconstruction and its edits, from the same start (B, C, H, W)."""
        start, conditional, unconditional, guidance, edits, watch = drawing
        source, latents = start[:1], start[1:]
        targets, keeps = range(1, len(start)), edits is not None and edits.stores
        for step, timestep in enumerate(self.timesteps):
            states, empty = conditional(step), unconditional(step)
            reference = Record(lambda layer, _: layer.cross) if keeps or (self.xa_guidance and targets) else None
            noise = yield from self._reference_calls(
                source, timestep, states.rows([0]), empty.rows([0]), guidance, reference
            )
            seen = Record(edits.is_stored) if edits is not None and keeps else None
            if targets:
                both = concatenate([empty.rows(targets), states.rows(targets)])
                rows = torch.cat([latents, latents])
                if self.xa_guidance and reference is not None:
                    rows = yield from self._moved_calls(rows, timestep, both, reference.maps)
                found = yield from noise_calls(self.model, rows, timestep, both.controlled(seen))
                without, within = found.chunk(2)
                latents = previous(
                    self.model, rows[: len(targets)], without + guidance * (within - without), timestep, self.steps
                )
            source = previous(self.model, source, noise, timestep, self.steps)
            if edits is not None and seen is not None and reference is not None:
                for layer, maps in reference.maps.items():
                    if edits.is_stored(layer, maps.shape[2]):
                        beside = [seen.maps[layer][len(targets) :]] if targets else []
                        edits.store(layer, torch.cat([maps[-1:], *beside]))
            if watch is not None:
                watch(step, torch.cat([source, latents]))
        return torch.cat([source, latents])

    def _reference_calls(
        self,
        latents: Tensor,
        timestep: int,
        states: Conditioning,
        empty: Conditioning,
        guidance: float,
        record: Record | None,
    ) -> Calls[Tensor]:
        """The source's guided noise (1, C, H, W); where both branches read one text, they are one row."""
        if self.unconditional == "source":
            return (yield from noise_calls(self.model, latents, timestep, states.controlled(record)))
        both = concatenate([empty, states]).controlled(record)
        without, within = (yield from noise_calls(self.model, torch.cat([latents] * 2), timestep, both)).chunk(2)
        return without + guidance * (within - without)

    def _moved_calls(
        self, rows: Tensor, timestep: int, conditioning: Conditioning, reference: Mapping[Layer, Tensor]
    ) -> Calls[Tensor]:
        """Latents (2n, C, H, W) after one step of gradient descent on `map_distance`, the same shape."""
        moved = rows.detach().requires_grad_()
        record = Record(lambda layer, _: layer.cross)
        when = torch.full((len(rows),), timestep, device=rows.device)
        yield Call(moved, when, conditioning.controlled(record), gradient=True, apart=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(map_distance(record.maps, reference), moved)
        return rows - self.xa_guidance * gradient


def _sentences(
    source: str | Sequence[str] | None, target: str | Sequence[str] | None
) -> tuple[list[str], list[str]] | None:
    """Both lists of sentences, None for none.

    Raises:
        UserError: one is missing, a file cannot be read, or a list is empty.
    """
    if source is None and target is None:
        return None
    found = []
    for name, given in (("source_sentences", source), ("target_sentences", target)):
        if given is None:
            raise UserError(f"method.{name}=null: a direction needs sentences of both. Give both, or none.")
        lines = list(given)
        if isinstance(given, str):
            try:
                lines = Path(given).expanduser().read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"method.{name}={given} cannot be read as UTF-8 text, one sentence per line ({error})."
                ) from error
        lines = [str(line).strip() for line in lines if str(line).strip()]
        if not lines:
            raise UserError(f"method.{name}={given} holds no sentence. Give some hundreds, or leave it null.")
        found.append(lines)
    return found[0], found[1]
