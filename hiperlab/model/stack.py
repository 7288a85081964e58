"""The frozen stack: tokenizers, CLIP text encoders, VAE, U-Net and noise schedule of one Stable Diffusion.

Axes: L cross-attention layers, B batch, N tokens, D text width (of all text encoders together), P width of the pooled
row, H, W latent sides (picture side / 8).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call

from hiperlab.errors import UserError
from hiperlab.model import noise as diffusion
from hiperlab.model import text as clip
from hiperlab.model import text_towers
from hiperlab.model.attention import install_attention
from hiperlab.model.attention_control import replaced_outputs
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.cuda_graphs import CudaGraphs
from hiperlab.model.offsets import Offsets, checkpointed
from hiperlab.model.text_towers import TextTower

Result = TypeVar("Result")


@dataclass(frozen=True)
class Base:
    """What an artifact must agree with: a concept learnt on one base means nothing on another.

    Args:
        name: the model's name, e.g. "sd14"; shown, not compared (a local copy may be named otherwise).
        width: D, the text states' width (768 for SD 1.x, 1024 for 2.x, 768 + 1280 for SDXL).
        layers: L, the number of cross-attention layers (16); 0 when unknown.
        prediction_type: "epsilon" or "v_prediction"; "" when unknown (files of other tools do not say).
        fingerprint: norms of eight rows of the token embedding, the space a concept lives in, eight of each text
            encoder; empty when unknown.
        widths: of each text encoder where there are several; empty for one.
        pooled_at: where the pooled row is taken, see `text_towers.pooled_places`; "" where there is none.
    """

    name: str
    width: int
    layers: int = 0
    prediction_type: str = ""
    fingerprint: tuple[float, ...] = ()
    widths: tuple[int, ...] = ()
    pooled_at: str = ""

    def check(self, made_for: Base, what: str) -> None:
        """Refuse an artifact of another base.

        Raises:
            UserError: width, layers, prediction type or the place of the pooled row differ, or the token embeddings
                are not the same numbers.
        """
        for earlier, was in EARLIER:
            same = made_for.fingerprint and _alike(earlier.fingerprint, made_for.fingerprint)
            if same and made_for.prediction_type == earlier.prediction_type != self.prediction_type:
                raise UserError(
                    f"{what} was made with {was}; model={self.name} is another model now. Train it again, or install "
                    "the version of hiperlab that made it."
                )
        different = [
            f"{field} {theirs}, here {mine}"
            for field in ("width", "layers", "prediction_type", "pooled_at")
            if (theirs := made_for._said(field)) and theirs != (mine := self._said(field))
        ]
        if not different and not _alike(self.fingerprint, made_for.fingerprint):
            different = ["other token embeddings"]
        if len(different) == 1 and made_for.pooled_at != self.pooled_at and made_for.widths == self.widths:
            raise UserError(
                f"{what} was made with another place of the pooled row: set model.pooled_at={made_for.pooled_at}."
            )
        if different:
            raise UserError(
                f"{what} was made for base {made_for.name!r} ({'; '.join(different)}), this model is {self.name!r}. "
                f"Load the model it was made for, e.g. model={made_for.name}."
            )

    def _said(self, field: str) -> Any:
        """A field as people read it: the width with its parts."""
        if field == "width" and self.widths:
            return f"{self.width} ({'+'.join(map(str, self.widths))})"
        return getattr(self, field)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for metadata; what only several text encoders have is left out for one."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("widths", "pooled_at")}


def _alike(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two fingerprints are of one base; unknown ones may be.

    2 %: a half-precision copy is the same base, another training of the same shape is not.
    """
    return all(abs(a - b) <= 0.02 * abs(a) for a, b in zip(mine, theirs, strict=False))


# Bases that once shipped under a name that another one bears now, and what they were.
EARLIER = (
    (
        Base(
            "mini", 96, 16, "epsilon",
            (0.20315, 0.17641, 0.22113, 0.19108, 0.17575, 0.20576, 0.18892, 0.16773),
        ),
        "the first miniature (64 px, predicts noise), which shipped until November 2026",
    ),
)  # fmt: skip


class FrozenStack(nn.Module):
    """Everything of Stable Diffusion that never changes. Always in evaluation mode, nothing requires grad.

    Args:
        name: how the base is called in artifacts and results.
        towers: the text encoders with their tokenizers, one or SDXL's two.
        vae: autoencoder; posterior means and log-variances are what callers cache.
        unet: the denoiser; its cross-attention processors are replaced by ones that read a `Conditioning`.
        scheduler_config: the noise schedule as stored with the model.
        size: side of the pictures in pixels, a multiple of 8 (SDXL: of 32).
        pooled_at: where the pooled row is taken, see `text_towers.pooled_places`; read by SDXL only.
        zero_negative: whether an absent negative text is zeros and not an empty text (`force_zeros_for_empty_prompt` of
            SDXL's released pipeline).
        trained: False for random weights; reports say so.
        note: one line shown with every result, e.g. that the weights are random.
    """

    alpha_bar: Tensor
    unet: Any  # diffusers' classes carry no types for what they inherit
    vae: Any
    _predictor: Any
    _text_module: nn.Module

    def __init__(
        self,
        *,
        name: str,
        towers: Sequence[TextTower],
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: Mapping[str, Any],
        size: int,
        pooled_at: str = "end",
        zero_negative: bool = False,
        trained: bool = True,
        note: str = "",
    ) -> None:
        super().__init__()
        step = 8 if len(towers) == 1 else 32
        if size % step:
            low = size // step * step
            raise UserError(f"model.size={size} is not a multiple of {step}. Choose {low} or {low + step}.")
        if pooled_at not in text_towers.POOLED_AT:
            raise UserError(f"model.pooled_at={pooled_at!r} is unknown. Choose {' or '.join(text_towers.POOLED_AT)}.")
        self.name, self.size, self.trained, self.note = name, size, trained, note
        self.towers = tuple(towers)
        self.tokenizer = towers[0].tokenizer  # all have the same words
        modules = [tower.text for tower in towers]
        self.text: nn.Module = modules[0] if len(modules) == 1 else nn.ModuleDict(dict(zip(text_towers.NAMES, modules)))
        # Out of the module tree, where it would hold the same layers a second time; one object, as it names them.
        object.__setattr__(self, "_text_module", text_towers.module_of(self.towers))
        self.vae, self.unet = vae, unet
        self.pooled_at, self.zero_negative = pooled_at, zero_negative
        self.scheduler_config = dict(scheduler_config)
        schedule = DDPMScheduler.from_config(self.scheduler_config)
        self.prediction_type: str = schedule.config["prediction_type"]
        self.register_buffer("alpha_bar", schedule.alphas_cumprod.float(), persistent=False)
        self.cross_attention = install_attention(unet)
        self.requires_grad_(False)
        self.eval()
        self._set_predictor(self.unet)
        self.graphs: CudaGraphs | None = None

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """D, the width of the text states."""
        return sum(self.widths)

    @property
    def widths(self) -> list[int]:
        """The text encoders' parts of D."""
        return text_towers.widths(self.towers)

    @property
    def pools(self) -> bool:
        """Whether the U-Net reads a pooled row and sizes beside the text states (SDXL)."""
        return bool(self.unet.config["addition_embed_type"] == "text_time")

    @property
    def layers(self) -> int:
        """L, the number of cross-attention layers."""
        return len(self.cross_attention)

    @property
    def transformers(self) -> list[int]:
        """Of each cross-attention layer the number of its transformer; in SDXL several layers follow one another."""
        owners = [name.split(".transformer_blocks.")[0] for name in self.cross_attention]
        return [list(dict.fromkeys(owners)).index(owner) for owner in owners]

    @property
    def self_attention(self) -> list[str]:
        """Paths of the self-attention layers in the order of execution; each precedes its block's cross-attention."""
        return [f"{name.removesuffix('attn2')}attn1" for name in self.cross_attention]

    @property
    def decoder_blocks(self) -> list[str]:
        """Paths of the decoder's residual blocks in the order of execution, twelve in SD 1.x and 2.x."""
        return [name for name, _ in self.unet.named_modules() if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+", name)]

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule (1000)."""
        return len(self.alpha_bar)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of one picture's latents."""
        side = self.size // 8
        return int(self.unet.config["in_channels"]), side, side

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.alpha_bar.device

    @property
    def base(self) -> Base:
        """What says in an artifact which model it was made with."""
        fingerprint: list[float] = []
        for tower in self.towers:
            known = min(len(tower.table), tower.tokenizer.vocab_size)  # words added later make no other base
            rows = tower.table[:: known // 8][:8].double()
            fingerprint += [round(norm, 5) for norm in rows.norm(dim=1).tolist()]
        found = Base(self.name, self.width, self.layers, self.prediction_type, tuple(fingerprint))
        return replace(found, widths=tuple(self.widths), pooled_at=self.pooled_at) if self.pools else found

    def train(self, mode: bool = True) -> FrozenStack:
        """Stay in evaluation mode whatever the module around it does."""
        return super().train(False)

    def optimise(
        self, *, channels_last: bool, compile: bool, gradient_checkpointing: bool, cuda_graphs: bool = False
    ) -> FrozenStack:
        """Speed and memory switches that change results by rounding only.

        Raises:
            UserError: CUDA graphs without CUDA, or together with a switch that they cannot be recorded with.
        """
        if cuda_graphs and (compile or gradient_checkpointing):
            raise UserError("model.optimise.cuda_graphs=true goes with neither compile nor gradient_checkpointing.")
        if cuda_graphs and not torch.cuda.is_available():
            raise UserError("model.optimise.cuda_graphs=true, but torch sees no GPU here. Leave it out.")
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(checkpointed)
        if compile:
            torch._dynamo.config.recompile_limit = 64  # sixteen processors differ in their index; the limit is 8
            self._set_predictor(torch.compile(self.unet))
        self.graphs = CudaGraphs(self._call) if cuda_graphs else None
        return self

    def _set_predictor(self, predictor: Any) -> None:
        """What `predict` calls; kept out of the module tree, where it would stand for the U-Net a second time."""
        object.__setattr__(self, "_predictor", predictor)

    # ---- text ----------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str], slots: Mapping[str, Sequence[int]] | None = None) -> clip.Tokens:
        """Token ids and slots (B, N) on the stack's device; see `hiperlab.model.text.tokenize`."""
        return self._here(text_towers.tokenize(self.towers, prompts, slots or {}))

    def _here(self, tokens: clip.Tokens) -> clip.Tokens:
        further = tuple(map(self._here, tokens.further))
        return clip.Tokens(tokens.ids.to(self.device), tokens.slots.to(self.device), further)

    def word_embedding(self, word: str) -> Tensor:
        """The (D,) input embedding of a single-token word, float32."""
        return text_towers.word_embedding(self.towers, word)

    def vocabulary(self) -> Tensor:
        """The input embeddings (words, D) of all tokens, float32."""
        return torch.cat([tower.table.detach().float() for tower in self.towers], dim=1)

    def condition_text(self, prompts: Sequence[str], offsets: Offsets | None = None) -> Conditioning:
        """What the U-Net reads of plain texts (1, B, N, D); `offsets` stand in for text weights in this call."""
        if offsets is None:
            return self.condition_tokens(self.tokenize(prompts))
        return self.with_text_weights(offsets, lambda: self.condition_tokens(self.tokenize(prompts)))

    def condition_tokens(
        self, tokens: clip.Tokens, vectors: Tensor | None = None, pooled_vectors: Tensor | None = None
    ) -> Conditioning:
        """What the U-Net reads of tokens with learnt vectors in their slots: (L, B, N, D).

        Args:
            tokens: B prompts.
            vectors: (L, K, D), one per layer (or L = 1) and occurrence; None for none.
            pooled_vectors: (1, K, D), what the pooled row reads where L is not 1, as it belongs to no layer.
        """
        hidden = text_towers.hidden_states(self.towers, tokens, vectors)
        found = Conditioning(self.normalise_text(_side_by_side(hidden)))
        if not self.pools:
            return found
        if pooled_vectors is not None:
            hidden = text_towers.hidden_states(self.towers, tokens, pooled_vectors)
        assert len(hidden[-1]) == 1, "several rows per occurrence, and no word which of them the pooled row reads"
        pooled = text_towers.pooled(self.towers[-1], (tokens, *tokens.further)[-1], hidden[-1], self.pooled_at)
        return replace(found, pooled=pooled, sizes=self.own_sizes(len(pooled)))

    def condition_negative(self, text: str | None) -> Conditioning:
        """What guidance's unconditional branch reads of a negative text (1, 1, N, D), None for an absent one."""
        return self.as_negative(text, self.condition_text([text or ""]))

    def as_negative(self, text: str | None, found: Conditioning) -> Conditioning:
        """A negative text's conditioning, `found` of "" for an absent one: zeros where the model takes none so."""
        return found.zeroed() if text is None and self.zero_negative else found

    def own_sizes(self, rows: int) -> Tensor:
        """Micro-conditioning (B, 6) of whole pictures in the stack's size, as diffusers' pipeline fills it in."""
        side = float(self.size)
        return torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device).expand(rows, -1)

    def hidden_states(self, tokens: clip.Tokens, vectors: Tensor | None = None) -> Tensor:
        """Text states (L, B, N, D) before the final norm, with (L, K, D) learnt vectors in the K slots."""
        return _side_by_side(text_towers.hidden_states(self.towers, tokens, vectors))

    def normalise_text(self, states: Tensor) -> Tensor:
        """The text encoders' final norm where the U-Net reads one, on states (..., N, D): what it reads, same shape."""
        return text_towers.normalise(self.towers, states)

    @property
    def text_module(self) -> nn.Module:
        """The module whose parameter names offsets of the text encoders use, see `text_towers.module_of`."""
        return self._text_module

    @property
    def text_parts(self) -> list[text_towers.TextPart]:
        """How the text encoders' parameters are called here and in files."""
        return text_towers.parts_of(self.towers)

    @property
    def unread_text(self) -> tuple[str, ...]:
        """Beginnings of names of text layers that nothing reads, see `text_towers.unread`."""
        return text_towers.unread(self.towers)

    def with_text_weights(self, offsets: Offsets | Mapping[str, Tensor], work: Callable[[], Result]) -> Result:
        """The result of `work`, during which the text encoders have changed weights, by the `text_module`'s names."""
        module = self.text_module
        weights = offsets.weights(module) if isinstance(offsets, Offsets) else offsets
        result: Result = clip.with_weights(module, weights, work)
        return result

    def encode_text(self, prompts: Sequence[str], offsets: Offsets | None = None) -> Tensor:
        """The states alone (B, N, D) of `condition_text`."""
        return self.condition_text(prompts, offsets).keys[0]

    # ---- pictures ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Posterior mean and log-variance (B, 2C, H, W), float32, unscaled, of pictures (B, 3, 8H, 8W) in [-1, 1].

        Raises:
            UserError: they are not finite, as SDXL's autoencoder makes them in float16.
        """
        dtype = next(self.vae.parameters()).dtype
        moments: Tensor = self.vae.encode(pixels.to(self.device, dtype)).latent_dist.parameters.float()
        if not torch.isfinite(moments).all():
            raise UserError(f"the autoencoder made a picture NaN or infinite in {dtype}: set precision.vae=float32.")
        return moments

    def scale(self, latents: Tensor) -> Tensor:
        """VAE latents (B, C, H, W) to the U-Net's range, same shape (times 0.18215 for SD 1.x, 0.13025 for SDXL).

        Some fine-tunes of SDXL say channels' means and deviations as well.
        """
        if (channels := self._channels(latents)) is not None:
            latents = (latents - channels[0]) / channels[1]
        return latents * self.vae.config["scaling_factor"]

    def unscale(self, latents: Tensor) -> Tensor:
        """The inverse of `scale`, same shape."""
        latents = latents / self.vae.config["scaling_factor"]
        channels = self._channels(latents)
        return latents if channels is None else latents * channels[1] + channels[0]

    def _channels(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """The latents' means and deviations (C, 1, 1) by channel, where the VAE's config says any."""
        mean, deviation = (self.vae.config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return None
        first, second = (latents.new_tensor(each)[:, None, None] for each in (mean, deviation))
        return first, second

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) to pictures (B, 3, 8H, 8W) in about [-1, 1], float32, not clamped.

        Raises:
            UserError: a picture is not finite, so that none is kept and scored as a black one.
        """
        dtype = next(self.vae.parameters()).dtype
        pictures = self.vae.decode(self.unscale(latents).to(dtype)).sample.float()
        if not torch.isfinite(pictures).all():
            where = "while drawing" if not torch.isfinite(latents).all() else "in the autoencoder"
            raise UserError(
                f"a picture became NaN or infinite {where}: use precision=fp32 or bf16, a smaller sampler.guidance, or "
                "a smaller strength of what was learnt."
            )
        return pictures

    # ---- denoising -----------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction (B, C, H, W), float32 (float64 in a float64 stack).

        Args:
            latents: z_t (B, C, H, W).
            timestep: (B,) int64 in [0, 1000).
            conditioning: states for B rows, passed through the U-Net untouched to the processors; its offsets stand
                in for weights and its control for attention and outputs during this call only; the U-Net never changes.
        """
        dtype = next(self.unet.parameters()).dtype
        states, latents = conditioning.to(dtype), latents.to(dtype)
        own = (states.offsets, states.control, states.decoupled)  # what no graph is recorded with
        replays = all(each is None for each in own) and latents.is_cuda
        answer = self.graphs if self.graphs is not None and replays else self._call
        out = answer(latents, timestep, states)
        return out if dtype == torch.float64 else out.float()

    def _call(self, latents: Tensor, timestep: Tensor, states: Conditioning) -> Tensor:
        """The U-Net's output (B, C, H, W) in its own type; arguments as `predict`, in that type."""
        inputs: dict[str, Any] = {"encoder_hidden_states": states, "return_dict": False}
        if self.pools:
            assert states.pooled is not None and states.sizes is not None, "SDXL's U-Net reads a pooled row and sizes"
            inputs["added_cond_kwargs"] = {"text_embeds": states.pooled, "time_ids": states.sizes}
        beside = states.row_offsets if states.offsets is None else None
        if states.offsets is None and states.control is None and beside is None:
            out: Tensor = self._predictor(latents, timestep, **inputs)[0]
            return out
        # Not through torch.compile: swapped weights would be compiled anew at every step, a control is no graph.
        weights = states.offsets.weights(self.unet) if states.offsets else {}
        if states.control is not None:
            inputs["cross_attention_kwargs"] = {"control": states.control}
        with ExitStack() as during:
            if beside is not None:
                during.enter_context(beside.beside(self.unet))
            if states.control is not None:  # after the offsets, whose layers' outputs it replaces
                during.enter_context(replaced_outputs(states.control, self.unet))
            changed: Tensor = functional_call(self.unet, weights, (latents, timestep), inputs)[0]
        return changed

    def add_noise(self, z0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """z_t (B, C, H, W) from clean latents z0, unit normal noise of that shape, timesteps (B,) in [0, 1000).

        See `hiperlab.model.noise.add_noise` (Ho et al. 2020, eq. 4).
        """
        return diffusion.add_noise(z0, noise, self.alpha_bar[timestep])

    def target(self, z0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the prediction is compared with (B, C, H, W), noise or velocity; arguments as `add_noise`."""
        return diffusion.target(z0, noise, self.alpha_bar[timestep], self.prediction_type)


def _side_by_side(states: Sequence[Tensor]) -> Tensor:
    """Each encoder's states (..., d) as one (..., D)."""
    return states[0] if len(states) == 1 else torch.cat(list(states), dim=-1)


def weights_digest(parts: Iterable[nn.Module]) -> str:
    """Names modules by all of their weights, of any shape; what is kept on disk is kept for these."""
    digest = hashlib.sha256()
    for part in parts:
        for name, value in part.named_parameters():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
