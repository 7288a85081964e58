"""The frozen stack: tokenizer, CLIP text encoder, VAE, U-Net and noise schedule of one Stable Diffusion.

Axes: L cross-attention layers, B batch, N tokens, D text width, H, W latent sides (picture side / 8).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call

from hiperlab.errors import UserError
from hiperlab.model import noise as diffusion
from hiperlab.model import text as clip
from hiperlab.model.attention import install_attention
from hiperlab.model.attention_control import replaced_outputs
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.cuda_graphs import CudaGraphs
from hiperlab.model.offsets import Offsets, checkpointed


@dataclass(frozen=True)
class Base:
    """What an artifact must agree with: a concept learnt on one base means nothing on another.

    Args:
        name: the model's name, e.g. "sd14"; shown, not compared (a local copy may be named otherwise).
        width: D, the text states' width (768 for SD 1.x, 1024 for 2.x).
        layers: L, the number of cross-attention layers (16); 0 when unknown.
        prediction_type: "epsilon" or "v_prediction"; "" when unknown (files of other tools do not say).
        fingerprint: norms of eight rows of the token embedding, the space a concept lives in; empty when unknown.
    """

    name: str
    width: int
    layers: int = 0
    prediction_type: str = ""
    fingerprint: tuple[float, ...] = ()

    def check(self, made_for: Base, what: str) -> None:
        """Refuse an artifact of another base.

        Raises:
            UserError: width, layers or prediction type differ, or the token embeddings are not the same numbers.
        """
        for earlier, was in EARLIER:
            same = made_for.fingerprint and _alike(earlier.fingerprint, made_for.fingerprint)
            if same and made_for.prediction_type == earlier.prediction_type != self.prediction_type:
                raise UserError(
                    f"{what} was made with {was}; model={self.name} is another model now. Train it again, or install "
                    "the version of hiperlab that made it."
                )
        different = [
            f"{field} {theirs}, here {getattr(self, field)}"
            for field in ("width", "layers", "prediction_type")
            if (theirs := getattr(made_for, field)) and theirs != getattr(self, field)
        ]
        if not different and not _alike(self.fingerprint, made_for.fingerprint):
            different = ["other token embeddings"]
        if different:
            raise UserError(
                f"{what} was made for base {made_for.name!r} ({'; '.join(different)}), this model is {self.name!r}. "
                f"Load the model it was made for, e.g. model={made_for.name}."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for metadata."""
        return asdict(self)


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
        tokenizer: CLIP tokenizer.
        text: CLIP text model.
        vae: autoencoder; posterior means and log-variances are what callers cache.
        unet: the denoiser; its cross-attention processors are replaced by ones that read a `Conditioning`.
        scheduler_config: the noise schedule as stored with the model.
        size: side of the pictures in pixels, a multiple of 8.
        trained: False for random weights; reports say so.
        note: one line shown with every result, e.g. that the weights are random.
    """

    alpha_bar: Tensor
    unet: Any  # diffusers' classes carry no types for what they inherit
    vae: Any
    _predictor: Any

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Any,
        text: nn.Module,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: Mapping[str, Any],
        size: int,
        trained: bool = True,
        note: str = "",
    ) -> None:
        super().__init__()
        if size % 8:
            raise UserError(f"model.size={size} is not a multiple of 8. Choose {size // 8 * 8} or {size // 8 * 8 + 8}.")
        self.name, self.size, self.trained, self.note = name, size, trained, note
        self.tokenizer = tokenizer
        self.text, self.vae, self.unet = text, vae, unet
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
        return int(clip.inner(self.text).embeddings.token_embedding.weight.shape[1])

    @property
    def layers(self) -> int:
        """L, the number of cross-attention layers."""
        return len(self.cross_attention)

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
        weight = clip.inner(self.text).embeddings.token_embedding.weight
        known = min(len(weight), self.tokenizer.vocab_size)  # words added later make no other base
        rows = weight[:: known // 8][:8].double()
        fingerprint = tuple(round(norm, 5) for norm in rows.norm(dim=1).tolist())
        return Base(self.name, self.width, self.layers, self.prediction_type, fingerprint)

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
        tokens = clip.tokenize(self.tokenizer, prompts, slots or {})
        return clip.Tokens(tokens.ids.to(self.device), tokens.slots.to(self.device))

    def word_embedding(self, word: str) -> Tensor:
        """The (D,) input embedding of a single-token word, float32."""
        index = clip.single_token(self.tokenizer, word)
        return clip.inner(self.text).embeddings.token_embedding.weight[index].detach().float().clone()

    def hidden_states(self, tokens: clip.Tokens, vectors: Tensor | None = None) -> Tensor:
        """Text states (L, B, N, D) before the final norm, with (L, K, D) learnt vectors in the K slots."""
        rows, positions, _ = tokens.occurrences()
        states = clip.embed(self.text, tokens.ids, vectors, (rows, positions))
        return clip.transform(self.text, states)

    def normalise_text(self, states: Tensor) -> Tensor:
        """The text encoder's final layer norm on states (..., N, D): what the U-Net reads, same shape."""
        return clip.final_norm(self.text, states)

    @property
    def text_module(self) -> nn.Module:
        """The module whose parameter names offsets of the text encoder use, e.g. "encoder.layers.0. ... .weight"."""
        return clip.inner(self.text)

    def encode_text(self, prompts: Sequence[str], offsets: Offsets | None = None) -> Tensor:
        """Plain text states (B, N, D), as the pipeline computes them; `offsets` stand in for weights in this call."""
        tokens = self.tokenize(prompts)
        if offsets is None:
            return self.normalise_text(self.hidden_states(tokens))[0]
        return clip.encode_with(self.text, tokens.ids, offsets.weights(self.text_module))

    # ---- pictures ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Posterior mean and log-variance (B, 2C, H, W), float32, unscaled, of pictures (B, 3, 8H, 8W) in [-1, 1]."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.encode(pixels.to(self.device, dtype)).latent_dist.parameters.float()

    def scale(self, latents: Tensor) -> Tensor:
        """VAE latents (B, C, H, W) to the U-Net's range, same shape (times 0.18215 for SD 1.x)."""
        return latents * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) to pictures (B, 3, 8H, 8W) in about [-1, 1], float32, not clamped.

        Raises:
            UserError: a picture is not finite, so that none is kept and scored as a black one.
        """
        dtype = next(self.vae.parameters()).dtype
        pictures = self.vae.decode((latents / self.vae.config["scaling_factor"]).to(dtype)).sample.float()
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


def weights_digest(parts: Iterable[nn.Module]) -> str:
    """Names modules by all of their weights, of any shape; what is kept on disk is kept for these."""
    digest = hashlib.sha256()
    for part in parts:
        for name, value in part.named_parameters():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
