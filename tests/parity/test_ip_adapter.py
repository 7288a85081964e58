"""IP-Adapter against the authors' inference classes, base and plus, in float32 on the tiny model, and diffusers.

The committed folder is complete: all weights follow from meta.json's rule. Sizes, seeds, settings and texts are its.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hiperlab import draws
from hiperlab.base.method import Step, Subject
from hiperlab.layer.image_prompt import HEAD_WIDTH
from hiperlab.method.ip_adapter import IPAdapter
from hiperlab.model import attention
from hiperlab.model.conditioning import concatenate
from hiperlab.model.sampler import ddim, denoise
from hiperlab.model.tiny import tiny
from hiperlab.model.vision_tower import clip_pixels
from tests.composed import build
from tests.parity import golden

FOLDER = "ip_adapter"
FOLDERS = {"golden": lambda: golden.folder(FOLDER), "slice": lambda: golden.SLICE / FOLDER}
ZERO = torch.zeros(1, dtype=torch.long)
close = golden.close


def kinds() -> list[str]:
    """The recorded kinds of adapter, whatever they are."""
    places = (golden.place(FOLDER) / "meta.json", golden.SLICE / FOLDER / "meta.json")
    return sorted({kind for path in places if path.is_file() for kind in golden.config(path)["kinds"]})


def number(seed: int, name: str, shape: list[int]) -> Tensor:
    """A weight by meta.json's rule."""
    normals = draws.normal(seed, name, [0], tuple(shape))[0]
    if len(shape) >= 2:
        return normals / float(np.prod(shape[1:])) ** 0.5
    return 1 + 0.2 * normals if name.endswith(".weight") else 0.2 * normals


def encoder(meta: dict[str, Any], folder: Path) -> Path:
    """The picture encoder's folder."""
    network = CLIPVisionModelWithProjection(CLIPVisionConfig(**meta["encoder"])).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            key = f"encoder.{name.replace('vision_model.', '')}"
            weight.copy_(number(meta["weights_seed"], key, list(weight.shape)))
    network.save_pretrained(folder / "encoder")
    return folder / "encoder"


def adapter(meta: dict[str, Any], kind: str, folder: Path, end: str) -> Path:
    """The adapter's file in one of both forms."""
    parts = {
        part: {name: number(meta["weights_seed"], f"{kind}.{part}.{name}", shape) for name, shape in shapes.items()}
        for part, shapes in meta["kinds"][kind]["shapes"].items()
    }
    path = folder / f"{kind}.{end}"
    if end == "bin":
        torch.save(parts, path)
    else:
        flat = {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}
        save_file({name: value.contiguous() for name, value in flat.items()}, path)
    return path


class Case:
    """One kind of adapter on the twin, as recorded."""

    def __init__(self, source: str, kind: str, folder: Path) -> None:
        self.source, self.kind, self.folder, root = source, kind, folder, FOLDERS[source]()
        self.meta, self.g = golden.config(root / "meta.json"), golden.tensors(root / "golden.safetensors")
        if kind not in self.meta["kinds"]:
            pytest.skip(f"{kind} is not recorded here")
        self.encoder = encoder(self.meta, folder)
        self.stack = self.twin()
        self.picture = self.g["picture"].permute(2, 0, 1).float() / 127.5 - 1

    def twin(self) -> Any:
        if self.source == "golden":
            return golden.twin(self.meta["resolution"], self.source)
        return tiny(seed=self.meta["tiny_seed"], size=self.meta["resolution"])

    def method(self, end: str = "bin", **changes: Any) -> IPAdapter:
        path = adapter(self.meta, self.kind, self.folder, end)
        settings = {"weights": str(path), "image_encoder": str(self.encoder), "scale": [1.0], **changes}
        method = build("ip_adapter", self.stack, [Subject("it", "<it>", "thing")], **settings)
        assert isinstance(method, IPAdapter)
        method.set_reference(0, self.picture)
        return method.eval()

    def conditions(self, method: IPAdapter, variant: str = "") -> tuple[Any, Any]:
        with torch.no_grad():
            step = Step([self.meta["prompt"]], ZERO, ZERO, variant=variant)
            return method.negative_condition(self.meta["negative"], variant, [0]), method.condition(step)

    @property
    def start(self) -> Tensor:
        return self.g["start"][None] if self.g["start"].dim() == 3 else self.g["start"]


@pytest.fixture(params=[(source, kind) for source in FOLDERS for kind in kinds()], ids="-".join)
def case(request, tmp_path) -> Case:
    return Case(*request.param, tmp_path)


@pytest.mark.parametrize("end", ["bin", "safetensors"])
def test_tokens(end, case) -> None:
    method, g = case.method(end), case.g
    assert method._adapter.kind == case.kind
    pixels = clip_pixels(case.picture[None], case.meta["encoder"]["image_size"])
    close("ip_adapter pixels (of 8 bits)", pixels * 255, g["p"] * 255, 1e-6)
    close(f"ip_adapter {case.kind} features", method.trainable_state()["features"][0, :1], g[f"{case.kind}.seen"], 1e-5)
    close(f"ip_adapter {case.kind} tokens", method.tokens(), g[f"{case.kind}.tokens"], 1e-6)
    assert float(method.tokens()[1].abs().max()) > 0.1, "tokens of no picture are not zeros"
    text = torch.cat([each.keys[0] for each in case.conditions(method)])
    close("ip_adapter text", text, g["text"], 1e-5)


@torch.no_grad()
def test_layers_and_predictions(case, monkeypatch) -> None:
    """Queries, both softmaxes and outputs of layers of every width at the first timestep; all predictions."""
    method, meta, g, seen = case.method(), case.meta, case.g, {}
    attend, beside = attention._attend, attention._beside
    names = []

    def watched(attn, states, keys, values, layer, control, extra=None):
        names.append(layer.name)
        out = attend(attn, states, keys, values, layer, control, extra)
        if layer.cross:
            query = attention._split(attn.to_q(states), attn.heads)
            key, value = (attention._split(each, attn.heads) for each in (keys, values))
            text = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            seen[layer.name] |= {"query": query, "text": text, "output": out}
        return out

    def watched_beside(*args):
        seen[names[-1]] = {"picture": beside(*args)}
        return seen[names[-1]]["picture"]

    monkeypatch.setattr(attention, "_attend", watched)
    monkeypatch.setattr(attention, "_beside", watched_beside)
    both = concatenate(case.conditions(method))
    latents = torch.cat([case.start] * 2)
    for t in meta["timesteps"]:
        found = case.stack.predict(latents, torch.tensor([t, t]), both)
        close(f"ip_adapter {case.kind} prediction", found, g[f"{case.kind}.prediction.{t}"], 1e-5)
        for layer in meta["layers"] if t == meta["timesteps"][0] else ():
            for item, ours in seen[layer].items():
                close(f"ip_adapter {case.kind} {item}", ours, g[f"{case.kind}.{layer}.{item}"], 1e-5)


@torch.no_grad()
def test_sampling(case) -> None:
    meta, g = case.meta, case.g
    method = case.method(scale=meta["scales"])
    for scale in meta["scales"]:
        empty, states = case.conditions(method, f"scale={scale}")
        schedule = ddim(meta["steps"], meta["guidance"]).build(case.stack, meta["steps"])
        guidance = meta["guidance"]
        trail: list[Tensor] = []
        denoise(
            case.stack,
            case.start,
            schedule,
            lambda _, own=states: own,
            empty,
            guidance,
            lambda _, z, t=trail: t.append(z),
        )
        close(f"ip_adapter {case.kind} latents", torch.cat(trail), g[f"{case.kind}.latents.{scale}"], 1e-4)


@torch.no_grad()
def test_diffusers_reads_the_same_file(case) -> None:
    """Its pipeline with the same adapter: tokens and latents. It is given the encoder's answer, negative first."""
    meta, method = case.meta, case.method()
    ours = case.twin() if case.source == "slice" else None
    if ours is None:
        pytest.skip("the golden twin is shared: loading an adapter would change its processors")
    scheduler = DDIMScheduler.from_config({**ours.scheduler_config})
    pipe = StableDiffusionPipeline(
        vae=ours.vae, text_encoder=ours.text, tokenizer=ours.tokenizer, unet=ours.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    file = adapter(meta, case.kind, case.folder, "safetensors")
    pipe.load_ip_adapter(str(case.folder), subfolder="", weight_name=file.name, image_encoder_folder=None)
    features = method.trainable_state()["features"][0].flip(0)  # (2, …): none, then the picture
    theirs = pipe.unet.encoder_hid_proj([features[:, None]])[0]
    close(f"ip_adapter {case.kind} tokens, diffusers'", method.tokens().flip(0), theirs[:, 0], 1e-5)
    for scale in meta["scales"]:
        pipe.set_ip_adapter_scale(scale)
        latents = pipe(
            meta["prompt"], negative_prompt=meta["negative"], latents=case.start.clone(), output_type="latent",
            num_inference_steps=meta["steps"], guidance_scale=meta["guidance"],
            ip_adapter_image_embeds=[features[:, None]], width=meta["resolution"], height=meta["resolution"],
        ).images  # fmt: skip
        mine = case.method(scale=[scale])
        empty, states = case.conditions(mine)
        schedule = ddim(meta["steps"], meta["guidance"]).build(case.stack, meta["steps"])
        found = denoise(case.stack, case.start, schedule, lambda t, own=states: own, empty, meta["guidance"])
        close(f"ip_adapter {case.kind} latents, diffusers'", found, latents, 1e-4)


def test_pictures_are_read_as_clip_reads_them(case) -> None:
    """The recorded picture is small; so is every other: what PIL makes of it, in 8 bits."""
    size = case.meta["encoder"]["image_size"]
    small = Image.fromarray(case.g["picture"].numpy()).resize((size, size), Image.Resampling.BICUBIC)
    ours = clip_pixels(case.picture[None], size, (0, 0, 0), (1, 1, 1))[0].permute(1, 2, 0) * 255
    assert torch.equal(ours.round().to(torch.uint8), torch.from_numpy(np.array(small)))


def test_heads_are_64_wide(case) -> None:
    """As diffusers counts them: rows of to_q // 64."""
    if case.kind == "plus":
        rows = case.meta["kinds"]["plus"]["shapes"]["image_proj"]["layers.0.0.to_q.weight"][0]
        assert rows % HEAD_WIDTH == 0 and rows // HEAD_WIDTH == 12
