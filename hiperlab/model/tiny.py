"""The twin: Stable Diffusion's structure at toy width with random weights, built in code from a seed.

It needs no file, no network and no GPU. Every method runs on it, every gradient can be checked on it; its pictures are
noise. Compare gradients at 128 px or more: at 64 px the innermost group norm sees two numbers, and rounding alone makes
float32 gradients differ by up to 2 %.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hiperlab.model.noise import SCHEDULE
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_towers import side_by_side

WIDTH = 32
SECOND_WIDTH = 40  # of the second text encoder of SDXL's twin


def tiny(
    seed: int,
    size: int,
    name: str = "tiny",
    prediction_type: str = "epsilon",
    note: str = "random weights (model=tiny): its pictures are noise",
) -> FrozenStack:
    """Build the twin.

    Args:
        seed: of all its weights; the global random state is left as it was.
        size: picture side in pixels, a multiple of 64 (three halvings of the latents).
        name: how results call it.
        prediction_type: "epsilon" (SD 1.x) or "v_prediction" (SD 2.1).
        note: shown with every result.
    """
    schedule = {**SCHEDULE, "prediction_type": prediction_type}
    return untrained(_parts, seed, name=name, scheduler_config=schedule, size=size, note=note)


def tiny_sdxl(
    seed: int,
    size: int,
    name: str = "tiny_sdxl",
    prediction_type: str = "epsilon",
    pooled_at: str = "end",
    note: str = "random weights (model=tiny_sdxl): its pictures are noise",
) -> FrozenStack:
    """Build the twin of SDXL: two text encoders, a pooled row and sizes, no attention in the outermost blocks.

    Args:
        seed: of all its weights; the global random state is left as it was.
        size: picture side in pixels, a multiple of 32.
        name: how results call it.
        prediction_type: "epsilon" as released, or "v_prediction" as some fine-tunes.
        pooled_at: where the pooled row is taken, see `text_towers.pooled_places`.
        note: shown with every result.
    """
    schedule = {**SCHEDULE, "prediction_type": prediction_type}
    return untrained(_sdxl_parts, seed, name=name, scheduler_config=schedule, size=size, pooled_at=pooled_at, note=note)


def untrained(build: Callable[[], tuple[Any, ...]], seed: int, **settings: Any) -> FrozenStack:
    """A stack with random weights.

    Args:
        build: makes a text encoder (SDXL's: two), the autoencoder and the U-Net, with torch's own initialisation.
        seed: of all its weights; the global random state is left as it was.
        settings: further named values of `FrozenStack`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        *texts, vae, unet = build()
    tokenizers = [clip_tokenizer(), clip_tokenizer("!")]  # SDXL's second pads so, as released
    towers = side_by_side(tokenizers[: len(texts)], texts)
    return FrozenStack(towers=towers, vae=vae, unet=unet, zero_negative=len(texts) > 1, trained=False, **settings)


@functools.cache
def clip_tokenizer(padding: str = "<|endoftext|>") -> Any:
    """CLIP's own tokenizer (49408 words), from the word list that open_clip ships as package data.

    Args:
        padding: the word that fills a prompt up; it is read as that one token wherever it is typed.
    """
    spec = importlib.util.find_spec("open_clip")  # finds the folder without importing the package
    assert spec and spec.origin, "open_clip_torch is a dependency of hiperlab"
    lines = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in lines.split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        pad_token=padding,
        model_max_length=77,
    )


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's (GPT-2's) vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]


def _parts() -> tuple[CLIPTextModel, AutoencoderKL, Any]:
    return _text(), _vae(), _wake_up(_unet())


def _sdxl_parts() -> tuple[CLIPTextModel, CLIPTextModelWithProjection, AutoencoderKL, Any]:
    return _text(), _second_text(), _vae(0.13025), _wake_up(_xl_unet())


def _text() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=WIDTH, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return CLIPTextModel(config)


def _second_text() -> CLIPTextModelWithProjection:
    """As wide as no other part, so that a mistaken order fails; with the activation of OpenCLIP's encoder."""
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=SECOND_WIDTH, intermediate_size=2 * SECOND_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=SECOND_WIDTH, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def _vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[32] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=32, scaling_factor=scaling_factor,
    )  # fmt: skip


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=[32, 32, 64, 64], layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=WIDTH, norm_num_groups=32,
    )  # fmt: skip


def _xl_unet() -> Any:
    """Three levels, the first without attention; one, one and two blocks per transformer, 17 in 11."""
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=[32, 32, 64], layers_per_block=2, attention_head_dim=[2, 2, 4],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 1, 2], use_linear_projection=True, norm_num_groups=32,
        cross_attention_dim=WIDTH + SECOND_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=SECOND_WIDTH + 6 * 16,
    )  # fmt: skip


@torch.no_grad()
def _wake_up(unet: Any) -> Any:
    """Make cross-attention matter: at the default initialisation the text changes the output by 1e-4 only."""
    for name, parameter in unet.named_parameters():
        if (".attn2.to_" in name or name.startswith("add_embedding.")) and name.endswith("weight"):
            parameter.mul_(2.0)
    return unet
