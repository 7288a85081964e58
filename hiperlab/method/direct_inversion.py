"""Direct Inversion, also "PnP Inversion" (Ju et al. 2024): the source's path is corrected, the targets' are left alone.

Follows cure-lab/PnPInversion (models/p2p/inversion.py, DirectInversion; models/p2p/p2p_guidance_forward.py,
direct_inversion_p2p_guidance_forward; the ablations of run_editing_p2p.py).
Symbols: z_k (the picture's recorded path, 0 the picture), d_i (offset of sampling step i), w (guidance), T (steps).
Axes: B rows (the source and its targets), C latent channels, H, W latent sides.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from hiperlab.base.editing_method import Conditions, Drawing, EditorSettings
from hiperlab.base.recorded_path_method import RecordedPathMethod
from hiperlab.edit.prompt_to_prompt import Move, PromptToPrompt, edit_calls
from hiperlab.errors import UserError, near
from hiperlab.model.inversion import previous
from hiperlab.model.shared_calls import Calls

TARGET_OFFSETS = ("none", "source", "target")


class DirectInversion(RecordedPathMethod):
    """After every sampling step the source row gets its difference to the recorded path, before local blending.

    Args:
        p2p: how attention maps are taken over.
        inverse_guidance: guidance of the inversion; the drawing has the sampler's.
        offset_scale: factor of the offsets, 1 or any other (theirs: ablation_directinversion_04, _08).
        offset_interval: n, at least 1: offsets are 0 at steps that n does not divide (theirs:
            ablation_directinversion_interval).
        target_offset: what targets get: "none", the "source" row's offset (theirs: add-source) or that of their own
            text without attention control, "target" (add-target).
        editor: as in `EditingMethod`; nothing is fitted or random.

    Raises:
        UserError: a setting out of its range.
    """

    fixed_settings = ("inverse_guidance",)
    sampling_settings: ClassVar[tuple[str, ...]] = (
        "p2p", "cache", "offset_scale", "offset_interval", "target_offset",
    )  # fmt: skip
    published_crop = "square"  # load_512 of their utils/utils.py

    def __init__(
        self,
        p2p: PromptToPrompt,
        inverse_guidance: float,
        offset_scale: float,
        offset_interval: int,
        target_offset: str,
        **editor: Unpack[EditorSettings],
    ) -> None:
        super().__init__(p2p, **editor)
        if target_offset not in TARGET_OFFSETS:
            raise UserError(
                f"method.target_offset={target_offset!r} is unknown.{near(str(target_offset), TARGET_OFFSETS)}"
            )
        if offset_interval < 1:
            raise UserError(f"method.offset_interval={offset_interval} is no interval of steps. Choose 1 or more.")
        self.inverse_guidance = self.inversion_guidance = float(inverse_guidance)
        self.offset_scale, self.offset_interval = float(offset_scale), offset_interval
        self.target_offset = target_offset

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """z_0 (B, C, H, W) of a drawing.

        Attention control never changes the source row. With its whole offsets it therefore ends every step on the
        recorded path, and is put there at once: without the pass that finds the offsets, equal up to rounding.
        """
        start, conditional, unconditional, guidance, edits, watch = drawing
        whole = self.offset_scale == 1 and self.offset_interval == 1
        pivot = self.path if whole else None
        move: Move | None = None
        if not whole or self.target_offset != "none":
            rows = range(len(start) if self.target_offset == "target" else 1)
            offsets = yield from self.offset_calls(
                len(rows), lambda i: conditional(i).rows(rows), lambda i: unconditional(i).rows(rows), guidance
            )

            def corrected(step: int, latents: Tensor, noise: Tensor) -> Tensor:
                found = previous(self.model, latents, noise, self.timesteps[step], self.steps)
                if self.target_offset == "none":
                    return torch.cat([found[:1] + offsets[step], found[1:]])
                return found + offsets[step]  # one for each row, or the source's for all

            move = corrected

        return (
            yield from edit_calls(
                self.model, start, self.steps, conditional, unconditional, guidance, edits, pivot, watch, move
            )
        )

    @torch.no_grad()
    def offset_calls(
        self, rows: int, conditional: Conditions, unconditional: Conditions, guidance: float
    ) -> Calls[Tensor]:
        """d_0 .. d_{T-1} (T, B, C, H, W) of B = `rows` texts, walked without attention control (offset_calculate).

        d_i is the difference of z_{T-1-i} to the step's result, and added there. Scaled or left out, it leaves the
        walk off the path, and later offsets are the larger for it, as in the authors' ablations.

        Args:
            rows: B.
            conditional: sampling step -> conditioning of the B rows.
            unconditional: the same of guidance's other branch.
            guidance: w, that of the drawing: offsets of another do not cancel.
        """
        offsets: list[Tensor] = []

        def move(step: int, latents: Tensor, noise: Tensor) -> Tensor:
            found = previous(self.model, latents, noise, self.timesteps[step], self.steps)
            whole = self.path[self.steps - 1 - step] - found
            offsets.append(whole * self.offset_scale if step % self.offset_interval == 0 else torch.zeros_like(whole))
            return found + offsets[step]

        start = self.path[-1:].expand(rows, -1, -1, -1)
        yield from edit_calls(self.model, start, self.steps, conditional, unconditional, guidance, move=move)
        return torch.stack(offsets)
