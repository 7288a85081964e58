"""Stage report: every bar that can be measured from an exported folder alone, with fixed seeds.

Pictures are drawn anew from held-out subjects; samples come from plain diffusers. Nothing is taken from the training.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.metric import truth_judge
from hiperlab.metric.truth import read_attributes, said_attributes
from hiperlab.report.environment import environment
from hiperlab.world.caption import article
from hiperlab.world.train import bars, clip, identity, vae, words
from hiperlab.world.train.draw_shard import HEADS, Source, wording
from hiperlab.world.train.plan import Workshop
from hiperlab.world.words import KINDS, PLACES, POSES, STYLES

SEED = 20  # of the report's own subjects and scenes: the training's checks use others


def prompts(count: int) -> list[str]:
    """Prompts that go through kinds, places and styles evenly and pair them differently in each round."""
    poses, places, styles = list(POSES), list(PLACES), list(STYLES)
    made = []
    for i in range(count):
        kind, place = KINDS[i % len(KINDS)], places[(i + 3 * (i // len(KINDS))) % len(places)]
        style, pose = styles[i % len(styles)], poses[i % len(poses)]
        made.append(f"{article(STYLES[style][0])} of {article(kind)} {POSES[pose][0]} {PLACES[place][0]}")
    return made


def drawn(name: str, views: int, count: int, size: int) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    """The report's own pictures (N, 3, H, W) in [-1, 1], captions and labels."""
    from hiperlab.world.draw import render

    source = Source(name, SEED, views)
    pixels, captions = [], []
    labels: dict[str, list[int]] = {head: [] for head in HEADS}
    for number in range(count):
        who, now = source.picture(number)
        pixels.append(torch.from_numpy(render(who, now, size).rgb))
        captions.append(wording(source, number, 0, who, now))
        for head, values in HEADS.items():
            labels[head].append(values.index(who.kind if head == "kind" else getattr(now, head)))
    stacked = torch.stack(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return stacked, captions, {head: torch.tensor(column) for head, column in labels.items()}


@torch.no_grad()
def measure_vae(folder: Path, pixels: Tensor) -> float:
    """Mean PSNR in dB."""
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL.from_pretrained(str(folder / "vae"), local_files_only=True).float()
    parts = [vae.psnr(network.decode(network.encode(p).latent_dist.mean).sample, p) for p in pixels.split(32)]
    return float(torch.cat(parts).mean())


@torch.no_grad()
def measure_clip(folder: Path, pixels: Tensor, captions: list[str]) -> float:
    """Retrieval top-1 in percent."""
    embed = clip.load_towers(folder)
    ids = torch.from_numpy(words.encode(words.load(folder / "tokenizer"), captions))
    parts = [embed(p, i) for p, i in zip(pixels.split(50), ids.split(50))]
    images, texts = (torch.cat(side) for side in zip(*parts))
    return 100 * clip.top1(images, texts)


@torch.no_grad()
def measure_reader(folder: Path, pixels: Tensor, labels: dict[str, Tensor]) -> float:
    """Mean accuracy over the attributes, in percent."""
    judge = truth_judge.load(folder / "judges" / "attributes")
    outputs = [judge(part) for part in pixels.split(100)]
    right = [
        float((torch.cat([o[name] for o in outputs]).argmax(1) == labels[name]).float().mean())
        for name in judge.shape.heads
    ]
    return 100 * statistics.mean(right)


def measure_identity(folder: Path, pixels: Tensor) -> float:
    """Retrieval top-1 in percent; rows 2k and 2k + 1 show one subject."""
    return 100 * identity.retrieval(truth_judge.load(folder / "judges" / "identity"), pixels[::2], pixels[1::2])


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """Plain diffusers."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sample(pipe: Any, texts: list[str], steps: int, guidance: float, batch: int) -> Tensor:
    """One picture per text (N, 3, H, W) in [0, 1]; picture i has seed i."""
    parts = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        noise = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(some))]
        out = pipe(some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="np")
        parts.append(torch.from_numpy(np.asarray(out.images)).permute(0, 3, 1, 2).float().clamp(0, 1))
    return torch.cat(parts)


def measure_samples(folder: Path, images: Tensor, texts: list[str]) -> dict[str, float]:
    """Share of samples read as prompted, in percent, for kind, place and style."""
    judge = truth_judge.load(folder / "judges" / "attributes")
    seen, said = read_attributes(judge, images * 2 - 1), [said_attributes(text) for text in texts]
    return {
        f"sample_{name}": 100 * statistics.mean(float(a[name] == b[name]) for a, b in zip(seen, said))
        for name in ("kind", "place", "style")
    }


def measure_speed(folder: Path, steps: int, repeats: int) -> float:
    """Median seconds of one picture on the CPU with two threads, float32."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pipe = load_pipeline(folder, torch.device("cpu"))
        sample(pipe, ["a photo of a cat"], 1, 5.0, 1)  # warm up
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            sample(pipe, ["a photo of a cat"], steps, 5.0, 1)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return statistics.median(times)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Pictures (N, 3, H, W) in [0, 1] side by side."""
    side = images.shape[-1]
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for i, picture in enumerate(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()):
        sheet.paste(Image.fromarray(picture), (i % columns * side, i // columns * side))
    return sheet


def work(
    shop: Workshop,
    *,
    folder: str | None,
    pictures: int,
    subjects: int,
    samples: int,
    steps: int,
    guidance: float,
    batch: int,
    speed_steps: int,
    speed_repeats: int,
    personal: dict[str, Any],
) -> dict[str, Any]:
    """The stage: prints the table, writes report.md and report.json into the measured folder, pictures beside.

    Args:
        shop: what all stages share.
        folder: an export, wherever it came from; null = this training's.
        pictures: held-out pictures (400).
        subjects: held-out subjects for the identity encoder (400).
        samples: prompts to sample.
        steps: of the sampling.
        guidance: of the sampling (5).
        batch: samples at a time; does not change them beyond rounding.
        speed_steps: of the timed picture (25).
        speed_repeats: timed pictures; their median counts.
        personal: of the personalised subjects, as `personal.measure` takes them; no subjects, no measurement.

    Raises:
        UserError: there is no export, or drawing is not possible here.
    """
    place = Path(folder).expanduser() if folder else shop.weights("export")
    if not (place / "model_index.json").is_file():
        raise UserError(f"report.folder={place} is no exported miniature: run stages=[export], or name one.")
    if importlib.util.find_spec("skia") is None:
        raise UserError("the report draws held-out pictures and needs skia-python, which is not installed here.")
    size = int(json.loads((place / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]) * 8
    values: dict[str, float | None] = {}
    notes = {}
    pixels, captions, labels = drawn("held", 1, pictures, size)
    pairs = drawn("pairs", 2, 2 * subjects, size)[0]
    texts = prompts(samples)
    images = sample(load_pipeline(place, shop.device), texts, steps, guidance, batch)
    notes["sample_kind"] = f"{samples} prompts, {steps} steps, guidance {guidance}, seeds 0 to {samples - 1}"
    _note(values, notes, "vae_psnr", lambda: measure_vae(place, pixels))
    _note(values, notes, "clip_retrieval", lambda: measure_clip(place, pixels, captions))
    _note(values, notes, "reader_accuracy", lambda: measure_reader(place, pixels, labels))
    _note(values, notes, "identity_retrieval", lambda: measure_identity(place, pairs))
    try:
        values |= measure_samples(place, images, texts)
    except UserError as error:
        notes["sample_kind"] = str(error)
    _note(values, notes, "seconds_per_picture", lambda: measure_speed(place, speed_steps, speed_repeats))
    if personal["identity_seeds"]:
        _note(values, notes, "personalised", lambda: _personal(shop, place, size, personal, notes))
    asked = dict.fromkeys(("vae_psnr", "clip_retrieval", "reader_accuracy"), pictures)
    asked |= dict.fromkeys(("sample_kind", "sample_place", "sample_style"), steps)
    asked |= {
        "identity_retrieval": subjects,
        "personalised": len(personal["identity_seeds"]),
        "seconds_per_picture": speed_steps,
    }
    found = bars.rows(values, notes, asked)
    _write(shop, place, found, images, f"{size} px, {environment()['device']}, seed {SEED}.")
    return {"status": "finished", "check": {row["key"]: row["value"] for row in found}}


def _personal(shop: Workshop, place: Path, size: int, settings: dict[str, Any], notes: dict[str, str]) -> float:
    """The sure part of the gain; what it is made of goes into the notes, pictures beside the report."""
    from hiperlab.world.train import personal

    gain, pictures = personal.measure(place, size, **settings)
    notes["personalised"] = str(gain)
    sheet = grid(pictures, 3)
    files.atomic_write(shop.folder("report") / "personalised.png", lambda file: sheet.save(file, format="PNG"))
    return gain.sure


def _note(values: dict[str, float | None], notes: dict[str, str], key: str, measure: Callable[[], float]) -> None:
    """Measure; what the folder lacks is said in the note instead."""
    try:
        values[key] = measure()
    except (UserError, OSError) as error:
        values[key] = None
        notes[key] = " ".join(str(error).split())[:200]


def _write(shop: Workshop, place: Path, found: list[dict[str, Any]], images: Tensor, head: str) -> None:
    table = bars.markdown(found, head)
    files.atomic_write(place / "report.md", table)
    files.write_json(place / "report.json", found)
    files.atomic_write(shop.folder("report") / "samples.png", lambda file: grid(images, 6).save(file, format="PNG"))
    print(table)
