"""Plug-and-play diffusion features (Tumanyan et al. 2023): a picture's layout under another text, nothing is trained.

Follows MichalGeyer/pnp-diffusers (preprocess.py, pnp.py, pnp_utils.py).
Symbols: N (steps of the inversion), T (steps of a drawing), t_i (timestep of sampling step i), tau_f, tau_A (shares of
the steps with the source's features and with its attention).
Axes: B rows (the source and its targets), C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from hiperlab.base.editing_method import Drawing, EditorSettings
from hiperlab.base.recorded_path_method import RecordedPathMethod
from hiperlab.edit.edits import Edits, Rows
from hiperlab.edit.feature_injection import FeatureInjection
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, edit_calls, map_pixels
from hiperlab.errors import UserError
from hiperlab.model.inversion import timesteps
from hiperlab.model.shared_calls import Calls


class PlugAndPlay(RecordedPathMethod):
    """The source row runs on the recorded path; its features and attention maps go into all other rows.

    Artifacts keep the latents at the T levels of a drawing, and the picture's.

    Args:
        inversion_steps: N; every timestep of a drawing must be among the inversion's.
        source_text: invert with the source text; False with an empty one. The source row of a drawing has none.
        tau_f: in [0, 1], share of the steps with the source's features (theirs: pnp_f_t).
        tau_a: in [0, 1], share of the steps with its queries and keys (theirs: pnp_attn_t).
        feature_layer: number of the residual block of the decoder whose second convolution gives the features.
        attention_layer: number of the first one whose self-attention is injected; later ones are, too.
        editor: as in `EditingMethod`; nothing is fitted or random.

    Raises:
        UserError: a setting out of its range, or levels that the inversion does not pass.
    """

    fixed_settings = ("inversion_steps", "source_text")
    sampling_settings: ClassVar[tuple[str, ...]] = ("cache", "tau_f", "tau_a", "feature_layer", "attention_layer")
    reads_source = negates_source = False  # its features are those of the empty text
    published_crop = "middle"  # they set the short side, and cut nothing

    def __init__(
        self,
        inversion_steps: int,
        source_text: bool,
        tau_f: float,
        tau_a: float,
        feature_layer: int,
        attention_layer: int,
        **editor: Unpack[EditorSettings],
    ) -> None:
        super().__init__(PromptToPrompt.off(), **editor)
        for name, share in (("tau_f", tau_f), ("tau_a", tau_a)):
            if not 0 <= share <= 1:
                raise UserError(f"method.{name}={share} is no share of the steps. Choose one in [0, 1].")
        blocks = self.model.decoder_blocks
        for name, number in (("feature_layer", feature_layer), ("attention_layer", attention_layer)):
            if not 0 <= number < len(blocks):
                raise UserError(f"method.{name}={number} is no layer of the decoder. Choose 0 to {len(blocks) - 1}.")
        self.inversion_steps = inversion_steps
        self.source_text = self.inverts_source = source_text
        self.levels = _kept(timesteps(inversion_steps, self.model.num_timesteps), self.timesteps)
        self.tau_f, self.tau_a = float(tau_f), float(tau_a)
        self.convolution = f"{blocks[feature_layer]}.conv2"
        beside = tuple(f"{block.replace('.resnets.', '.attentions.')}." for block in blocks[attention_layer:])
        self.attention_layers = [name for name in self.model.self_attention if name.startswith(beside)]

    # ---- the inversion -----------------------------------------------------------------------------------------------

    @property
    def pivot(self) -> Tensor:
        """The picture's latents and those at t_{T-1} .. t_0, (T+1, C, H, W)."""
        return super().pivot[self.levels]

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def edits(self, texts: Sequence[str], side: int, guided: bool, keep: bool) -> Edits:
        """Injection of the source's into its targets; arguments as `EditingMethod.edits`."""
        return FeatureInjection(
            Rows(len(texts), guided, self.source_once), self.convolution, self.attention_layers,
            int(self.steps * self.tau_f), int(self.steps * self.tau_a),  # as theirs: 50 * 0.58 is 28
            map_pixels(side), stores=keep,
        )  # fmt: skip

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """z_0 (B, C, H, W) from s(t_0) for all rows, (B, C, H, W): one source row for both branches of all targets."""
        start, conditional, unconditional, guidance, edits, watch = drawing
        return (
            yield from edit_calls(
                self.model, start, self.steps, conditional, unconditional, guidance, edits, self.path, watch,
                source_once=self.source_once,
            )
        )  # fmt: skip


def _kept(passed: Sequence[int], drawn: Sequence[int]) -> list[int]:
    """Where the picture and the levels of a drawing stand on the inversion's path, from the picture on.

    Args:
        passed: timesteps of the inversion, ascending.
        drawn: timesteps of a drawing.

    Raises:
        UserError: one of these is not among those.
    """
    places = {timestep: place for place, timestep in enumerate(passed, start=1)}
    if not set(drawn) <= set(places):
        raise UserError(
            f"method.inversion_steps={len(passed)} does not pass all levels of {len(drawn)} steps: use "
            f"method.inversion_steps={len(drawn)}, or 999."
        )
    return [0, *sorted(places[timestep] for timestep in drawn)]
