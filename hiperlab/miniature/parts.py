"""What a training starts from: the tokenizer, autoencoder and towers of an exported miniature.

They came with the first miniature and stay as they are: a fixed encoder lets U-Net and decoder learn apart, and a
better decoder never voids a U-Net.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTokenizer

from hiperlab.miniature import record
from hiperlab.miniature.plan import Workshop

LENGTH = 77


def freeze(network: nn.Module) -> Any:
    """A network that does not learn."""
    return network.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a miniature's folder."""
    return CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)


def encode_texts(tokens: Any, texts: Sequence[str]) -> np.ndarray:
    """Texts -> token ids (B, 77) int64, cut and padded."""
    out = tokens(list(texts), padding="max_length", truncation=True, max_length=LENGTH)
    return np.asarray(out["input_ids"], dtype=np.int64)


def token_ids(tokens: Any, text: str) -> list[int]:
    """The token ids of a text alone, without start, end and padding."""
    return list(tokens(text, add_special_tokens=False)["input_ids"])


def name_of(tokens: Any) -> str:
    """12 hex digits of vocabulary and order: cached token ids belong to one tokenizer."""
    return hashlib.sha256(repr(sorted(tokens.get_vocab().items())).encode()).hexdigest()[:12]


def load_autoencoder(shop: Workshop) -> Any:
    """The autoencoder with its last decoder, frozen, float32, on the device: this training's if it has one."""
    trained = record.done(shop.folder("decoder"))
    folder = shop.weights("decoder") if trained else shop.base / "vae"
    autoencoder: Any = AutoencoderKL.from_pretrained(str(folder), local_files_only=True).float()
    return freeze(autoencoder.to(shop.device, memory_format=torch.channels_last))  # codes 1.6 times as fast on a CPU


def encoder_key(vae: Any) -> str:
    """12 hex digits of the encoder's weights: latents belong to one."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for value in part.state_dict().values():
            digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
