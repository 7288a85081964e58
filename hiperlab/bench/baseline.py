"""The same Textual Inversion step written with diffusers' and transformers' own calls, to compare ours with.

As diffusers' examples/textual_inversion/textual_inversion.py (main): the whole embedding table trains, and after each
step every row but the new word's is put back. Left out is what ours does not do in a step either: reading pictures,
and encoding them, which ours does once a picture.
Axes: R rows, C latent channels, H, W latent sides, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.method import Subject
from hiperlab.bench.timing import seconds
from hiperlab.bench.trainee import Trainee, picture, prompt, subject
from hiperlab.errors import UserError
from hiperlab.model.stack import FrozenStack


@contextmanager
def stock_attention(unet: Any) -> Iterator[None]:
    """While inside, the U-Net has diffusers' own attention processors."""
    own = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        unet.set_attn_processor(own)


class DiffusersTextualInversion:
    """Textual Inversion with diffusers' calls on the stack's own U-Net and a copy of its text encoder.

    Args:
        stack: the frozen model, on its device; it is not changed.
        subject: its placeholder becomes a token, which starts from its class noun.
        optimizer: parameters -> optimizer.

    Raises:
        UserError: the model has two text encoders.
    """

    def __init__(self, stack: FrozenStack, subject: Subject, optimizer: Callable[..., Optimizer]) -> None:
        if stack.pools:
            raise UserError(f"--baseline diffusers trains one text encoder: leave it out with --model {stack.name}.")
        self.unet, self.vae = stack.unet, stack.vae
        self.tokenizer: Any = copy.deepcopy(stack.tokenizer)
        self.text = copy.deepcopy(cast(Any, stack.text))
        self.tokenizer.add_tokens(subject.placeholder)
        self.text.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.token = self.tokenizer.convert_tokens_to_ids(subject.placeholder)
        self.table: Tensor = self.text.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            (word,) = self.tokenizer(subject.word, add_special_tokens=False).input_ids
            self.table[self.token] = self.table[word].clone()
        self.before = self.table.detach().clone()
        self.scheduler = DDPMScheduler.from_config(stack.scheduler_config)
        self.optimizer = optimizer(self.text.get_input_embeddings().parameters())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Any:
        """The autoencoder's posterior (R, C, H, W) of pictures (R, 3, 8H, 8W), which steps draw from."""
        return self.vae.encode(pixels.to(self.unet.device, self.vae.dtype)).latent_dist

    def loss(self, prompts: Sequence[str], latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss, 0-d; call it inside `stock_attention`.

        Args:
            prompts: R texts with the placeholder.
            latents: (R, C, H, W), scaled.
            noise: unit normal, same shape.
            timesteps: (R,) int64 in [0, 1000).
        """
        ids = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        states = self.text(ids.to(latents.device))[0].to(dtype=self.unet.dtype)
        prediction = self.unet(noisy.to(self.unet.dtype), timesteps, states).sample
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), target.float(), reduction="mean")

    def step(self, prompts: Sequence[str], posterior: Any) -> None:
        """One optimizer step on pictures whose posterior (R, C, H, W) `encode` gave; inside `stock_attention`."""
        latents = posterior.sample().detach().float() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=latents.device).long()
        self.loss(prompts, latents, noise, timesteps).backward()
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """The optimizer's part of a step: the whole table moves, then every row but the new word's is put back."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        others = torch.ones((len(self.tokenizer),), dtype=torch.bool)
        others[self.token] = False
        self.table[others] = self.before[others]


def against_diffusers(cfg: DictConfig, stack: FrozenStack, warmup: int, steps: int) -> dict[str, Any]:
    """Medians of our step and of diffusers', one after the other all the time, so that both meet the same machine.

    Args:
        cfg: composed with `method=ti`.
        stack: the frozen model, on its device.
        warmup: steps of each that do not count.
        steps: timed steps of each.

    Returns:
        "ours_ms", "theirs_ms", and "ratio": how many times as long theirs takes.
    """
    ours = Trainee(cfg, stack)
    theirs = DiffusersTextualInversion(stack, subject(0), instantiate(cfg.method.optimizer))
    posterior = theirs.encode(picture(stack.size).expand(ours.rows, -1, -1, -1))
    prompts = [prompt(0)] * ours.rows
    times: list[tuple[float, float]] = []
    for _ in range(warmup + steps):
        mine = seconds(ours.step, stack.device)
        with stock_attention(stack.unet):
            times.append((mine, seconds(lambda: theirs.step(prompts, posterior), stack.device)))
    mine, other = (median(column) for column in zip(*times[warmup:], strict=True))
    return {"batch": ours.rows, "ours_ms": 1000 * mine, "theirs_ms": 1000 * other, "ratio": other / mine}
