"""Stage critic: reads the kind of subject from noisy latents. It ships with nothing; it teaches the U-Net (`Contrast`).

A classifier learns what tells a dog from a bear in minutes; a denoiser needs hours, because nearly all of its error is
what no caption can know. The gradient of such a classifier is what a word changes in the predicted noise (Dhariwal &
Nichol 2021, section 4.2), and says so without that error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.model.noise import add_noise, alphas_cumprod
from hiperlab.world.train import latents, record
from hiperlab.world.train.draw_shard import HEADS
from hiperlab.world.train.fit import train
from hiperlab.world.train.keys import normals, rows
from hiperlab.world.train.module import Fit, StageModule, freeze
from hiperlab.world.train.pictures import Pictures, whole
from hiperlab.world.train.plan import Workshop

WEIGHTS = "model.safetensors"
HELPERS = ("pose", "style")  # read beside the kind: what is learnt for them helps
LEVELS = (50, 200, 300, 450, 700)  # timesteps of the check
UNTIL = 900  # it learns at timesteps below; beyond, there is next to nothing to read


class Block(nn.Module):
    """Two convolutions around a shortcut, scaled and shifted by the noise level."""

    def __init__(self, width: int, level: int) -> None:
        super().__init__()
        self.norm, self.last = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.level = nn.Linear(level, 2 * width)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """(B, C, h, w) and (B, L) -> (B, C, h, w)."""
        hidden = self.first(F.silu(self.norm(x)))
        scale, shift = self.level(level)[:, :, None, None].chunk(2, dim=1)
        return x + self.second(F.silu(self.last(hidden) * (1 + scale) + shift))


class Critic(nn.Module):
    """Noisy latents and their noise level in, one vector of logits per attribute out.

    Args:
        side: of the latents, even.
        width: channels at full side, divisible by 8; twice as many at half of it.
        heads: attribute -> number of values.
        blocks: at either side.
        level: width of what is made of the noise level.
    """

    def __init__(self, side: int, width: int, heads: dict[str, int], blocks: int = 3, level: int = 64) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, width, side, side))  # calm subjects stand where they stand
        self.level = nn.Sequential(nn.Linear(2, level), nn.SiLU(), nn.Linear(level, level), nn.SiLU())
        self.fine = nn.ModuleList(Block(width, level) for _ in range(blocks))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(Block(2 * width, level) for _ in range(blocks))
        self.norm = nn.GroupNorm(8, 2 * width)
        self.drop = nn.Dropout(0.1)
        self.heads = nn.ModuleDict({name: nn.Linear(width * side * side // 2, n) for name, n in heads.items()})

    def forward(self, noisy: Tensor, alpha_bar: Tensor) -> dict[str, Tensor]:
        """(B, 4, h, w) and the share of signal variance (B,) -> attribute -> (B, values)."""
        ratio = (alpha_bar / (1 - alpha_bar + 1e-4)).log() / 5
        level = self.level(torch.stack([alpha_bar, ratio], dim=1))
        x = self.enter(noisy) + self.place
        for block in self.fine:
            x = block(x, level)
        x = self.down(x)
        for block in self.coarse:
            x = block(x, level)
        flat = self.drop(F.silu(self.norm(x)).flatten(1))
        return {name: head(flat) for name, head in self.heads.items()}


def log_ratio_slope(critic: nn.Module, noisy: Tensor, alpha_bar: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Gradient of log p(own | x) - log p(other | x) at x = noisy: (B, 4, h, w), (B,), (B,), (B,) -> (B, 4, h, w)."""
    with torch.enable_grad(), torch.autocast(noisy.device.type, enabled=False):
        x = noisy.detach().float().requires_grad_(True)
        logits = critic(x, alpha_bar)["kind"]
        ratio = logits.gather(1, own[:, None]) - logits.gather(1, other[:, None])
        return torch.autograd.grad(ratio.sum(), x)[0]


class CriticModule(StageModule):
    """The critic with its loss.

    Args:
        fit, seed: as in StageModule.
        critic: the network.
        means: latents to learn from (N, 4, h, w), without noise.
        labels: attribute -> (N,).
    """

    alpha_bar: Tensor

    def __init__(self, fit: Fit, seed: int, critic: Critic, means: Tensor, labels: dict[str, Tensor]) -> None:
        super().__init__(fit, seed)
        self.critic: Any = critic.to(memory_format=torch.channels_last)
        self.means, self.labels = means, labels
        self.register_buffer("alpha_bar", alphas_cumprod(), persistent=False)

    def loss(self, step: int) -> Tensor:
        """Cross-entropy of the kind, and a little of the others."""
        chosen = rows(self.seed, "critic", step, len(self.means), self.fit_settings.batch).to(self.means.device)
        clean = self.means[chosen].float()
        timestep = rows(self.seed, "critic timestep", step, UNTIL, len(chosen)).to(self.device)
        alpha_bar = self.alpha_bar[timestep]
        noisy = add_noise(clean, normals(self.seed, "critic noise", step, tuple(clean.shape), self.device), alpha_bar)
        outputs = self.critic(noisy.contiguous(memory_format=torch.channels_last), alpha_bar)
        losses = {name: F.cross_entropy(out.float(), self.labels[name][chosen]) for name, out in outputs.items()}
        return losses["kind"] + 0.3 * torch.stack([losses[name] for name in HELPERS]).sum()


@torch.no_grad()
def accuracy(module: CriticModule, means: Tensor, kinds: Tensor) -> dict[int, float]:
    """Share of kinds read rightly at each of `LEVELS`, from pictures it did not learn from (N, 4, h, w), (N,)."""
    module.critic.eval()
    found = {}
    for timestep in LEVELS:
        noise = normals(0, "critic check", timestep, tuple(means.shape), module.device)
        alpha_bar = module.alpha_bar[timestep].expand(len(means))
        noisy = add_noise(means.float(), noise, alpha_bar)
        right = [
            (module.critic(x, a)["kind"].argmax(1) == k).float()
            for x, a, k in zip(noisy.split(256), alpha_bar.split(256), kinds.split(256), strict=True)
        ]
        found[timestep] = round(float(torch.cat(right).mean()), 3)
    return found


def learns_from(shop: Workshop) -> str:
    """The set that the critic reads: calm pictures if there are any."""
    return "calm" if whole(shop.folder("data") / "calm") else "main"


def build(shop: Workshop, width: int) -> Critic:
    """A critic of the training's latents."""
    return Critic(shop.size // 8, width, {head: len(HEADS[head]) for head in ("kind", *HELPERS)})


def work(shop: Workshop, *, fit: dict[str, Any], width: int, check_pictures: int) -> dict[str, Any]:
    """The stage; its check is how many kinds it reads at several noise levels, on pictures that were held back."""
    name = learns_from(shop)
    means, pictures = latents.load(shop, name)[:, :4], Pictures(shop.folder("data") / name, shop.device)
    labels = {head: pictures.labels[head].to(shop.device) for head in ("kind", *HELPERS)}
    torch.manual_seed(shop.seed + 7)
    critic = build(shop, width)
    held = min(check_pictures, len(means) // 2)
    module = CriticModule(Fit(**fit), shop.seed, critic, means[:-held], labels)
    outcome = train(shop, "critic", module)
    module.float().to(shop.device)
    tensors = {key: value.detach().cpu().contiguous() for key, value in critic.state_dict().items()}
    files.atomic_write(shop.weights("critic") / WEIGHTS, as_bytes(tensors))
    found = accuracy(module, means[-held:], labels["kind"][-held:])
    return outcome | {"check": {"set": name, "kinds": found, "pictures": held}}


def load(shop: Workshop) -> tuple[Any, str]:
    """The trained critic, frozen, on the device, and the set that it has read.

    Raises:
        UserError: it has not been trained.
    """
    if not record.done(shop.folder("critic")):
        raise UserError(f"unet.contrast needs stage critic, which is not finished in {shop.out}: add it to stages.")
    known: Any = record.read(shop.folder("critic"))
    critic = build(shop, known["settings"]["width"])
    critic.load_state_dict(load_file(shop.weights("critic") / WEIGHTS))
    return freeze(critic.to(shop.device)), known["check"]["set"]
