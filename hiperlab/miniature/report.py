"""Stage report: every bar that can be measured from an exported folder alone, with fixed seeds.

Pictures are drawn anew from held-out subjects; samples come from plain diffusers. Nothing is taken from the training.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.metric.world import network as truth_judge
from hiperlab.metric.world.attributes import read_attributes
from hiperlab.miniature import bars, identity
from hiperlab.miniature.decoder import psnr
from hiperlab.miniature.draw_shard import HEADS, Source, truth
from hiperlab.miniature.pictures import reduced
from hiperlab.miniature.plan import Workshop
from hiperlab.miniature.recoded import recode
from hiperlab.report.environment import environment
from hiperlab.world.caption import article, parse, true_picture
from hiperlab.world.draw import render
from hiperlab.world.subjects import PROMPTS, SEEDS, subject, views
from hiperlab.world.vocabulary import ACCESSORIES, COLOURS, KINDS, PATTERNS, PLACES, POSES, STYLES

CODED = ("coded_psnr", "coded_identity", "coded_identity_worst", "coded_retrieval")
# measured from samples
SAMPLED = ("plain_kind", "plain_place", "kind", "place", "style", "pose", "colour", "pattern", "accessory", "two")
SEED = 20  # of the report's own subjects and scenes: the training's checks use others


def styled_prompts(count: int) -> list[str]:
    """Prompts that go through kinds, places, styles and poses evenly and pair them differently in each round."""
    poses, places, styles = list(POSES), list(PLACES), list(STYLES)
    made = []
    for i in range(count):
        kind, place = KINDS[i % len(KINDS)], places[(i + 3 * (i // len(KINDS))) % len(places)]
        style, pose = styles[i % len(styles)], poses[i % len(poses)]
        made.append(f"{article(STYLES[style][0])} of {article(kind)} {POSES[pose][0]} {PLACES[place][0]}")
    return made


def photo_prompts(nouns: Sequence[str], count: int, ends: Sequence[str] = ("",)) -> list[str]:
    """Photos of each kind in turn, with the nouns ("red {}"), the ends (" wearing a hat") and places in turn too."""
    places, turn = list(PLACES.values()), len(KINDS)
    made = []
    for i in range(count):
        noun, end = nouns[(i + i // turn) % len(nouns)].format(KINDS[i % turn]), ends[(i + i // turn) % len(ends)]
        made.append(f"a photo of {article(noun)}{end} {places[(i + 5 * (i // turn)) % len(places)][0]}")
    return made


def questions(count: int) -> dict[str, list[str]]:
    """Attribute -> prompts that name it; `count` of the styled ones, half or a third as many of the others."""
    worn = [
        f" wearing {said[0] if name == 'glasses' else article(said[0])}" for name, said in ACCESSORIES.items() if said
    ]
    pairs = [(KINDS[i % len(KINDS)], KINDS[(i + 1 + i // len(KINDS)) % len(KINDS)]) for i in range(count // 3)]
    return {
        "plain": photo_prompts(["{}"], count // 2),
        "styled": styled_prompts(count),
        "colour": photo_prompts([f"{colour} {{}}" for colour in COLOURS], count // 2),
        "pattern": photo_prompts([f"{pattern} {{}}" for pattern in PATTERNS if pattern != "plain"], count // 2),
        "accessory": photo_prompts(["{}"], count // 2, worn),
        "two": [
            f"a photo of {article(left)} and {article(right)} {list(PLACES.values())[i % len(PLACES)][0]}"
            for i, (left, right) in enumerate(pairs)
        ],
    }


def drawn(name: str, views: int, count: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The report's own pictures (N, 3, H, W) in [-1, 1] and their labels."""
    source = Source(name, SEED, views)
    pixels = []
    labels: dict[str, list[int]] = {head: [] for head in HEADS}
    for number in range(count):
        shot = source.picture(number)
        pixels.append(_pixels(render(shot.who, shot.now, size).rgb))
        for head, value in truth(shot).items():
            labels[head].append(HEADS[head].index(value))
    return torch.stack(pixels), {head: torch.tensor(column) for head, column in labels.items()}


@torch.no_grad()
def measure_coding(folder: Path, pixels: Tensor, pairs: Tensor) -> dict[str, float]:
    """What is left of held-out pictures and of subjects once a picture has passed the autoencoder.

    Args:
        folder: the export.
        pixels: held-out pictures (N, 3, H, W) in [-1, 1].
        pairs: plain photos, rows 2k and 2k + 1 show one subject.
    """
    judge = truth_judge.load(folder / "judges" / "identity")
    small = judge.shape.size

    vae: Any = AutoencoderKL.from_pretrained(str(folder / "vae"), local_files_only=True).float()

    def coded(pictures: Tensor) -> Tensor:
        return torch.cat([recode(vae, part).clamp(-1, 1) for part in pictures.split(16)])

    def embed(pictures: Tensor) -> Tensor:
        parts = [judge(reduced(part, small))["embedding"] for part in pictures.split(100)]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)

    size, found = pixels.shape[-1], {}
    photos = [prompt for prompt in PROMPTS if prompt.startswith("a photo")]
    for name in SEEDS:
        who = subject(name).who
        own = torch.stack([_pixels(true_picture(who, text.format(who.kind), 101, size).rgb) for text in photos])
        seen = torch.stack([_pixels(np.asarray(view)) for view in views(name, size)])
        found[name] = float((embed(coded(own)) @ embed(seen).T).mean())
    first, second = pairs[:400:2], pairs[1:400:2]
    return {
        "coded_psnr": float(psnr(reduced(coded(pixels), 64), reduced(pixels, 64)).mean()),
        "coded_identity": statistics.mean(found.values()),
        "coded_identity_worst": min(found.values()),
        "coded_retrieval": 100 * identity.top1(embed(coded(first)), embed(second)),
    }


def _pixels(rgb: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def measure_reader(folder: Path, pixels: Tensor, labels: dict[str, Tensor]) -> float:
    """Mean accuracy over the attributes, in percent."""
    judge = truth_judge.load(folder / "judges" / "attributes")
    outputs = [judge(reduced(part, judge.shape.size)) for part in pixels.split(100)]
    right = [
        float((torch.cat([o[name] for o in outputs]).argmax(1) == labels[name]).float().mean())
        for name in judge.shape.heads
    ]
    return 100 * statistics.mean(right)


def measure_identity(folder: Path, pixels: Tensor) -> float:
    """Retrieval top-1 in percent; rows 2k and 2k + 1 show one subject."""
    judge = truth_judge.load(folder / "judges" / "identity")
    small = reduced(pixels, judge.shape.size)
    return 100 * identity.retrieval(judge, small[::2], small[1::2])


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """Plain diffusers."""
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


def measure_samples(folder: Path, images: Mapping[str, Tensor], texts: Mapping[str, list[str]]) -> dict[str, float]:
    """Shares of samples read as prompted, in percent.

    Args:
        folder: with the reader.
        images: by question of `questions`, (N, 3, H, W) in [0, 1].
        texts: their prompts.
    """
    judge = truth_judge.load(folder / "judges" / "attributes")
    seen = {name: read_attributes(judge, reduced(part * 2 - 1, judge.shape.size)) for name, part in images.items()}

    def share(question: str, attribute: str) -> float:
        pairs = zip(seen[question], texts[question], strict=True)
        return 100 * statistics.mean(float(a[attribute] == named(text)[attribute]) for a, text in pairs)

    both = [{a["kind"], a["second"]} == set(_kinds(text)) for a, text in zip(seen["two"], texts["two"], strict=True)]
    return {
        "plain_kind": share("plain", "kind"),
        "plain_place": share("plain", "place"),
        **{name: share("styled", name) for name in ("kind", "place", "style", "pose")},
        **{name: share(name, name) for name in ("colour", "pattern", "accessory")},
        "two": 100 * statistics.mean(map(float, both)),
    }


def named(prompt: str) -> dict[str, str]:
    """What a prompt names, attribute -> value, the first colour as "colour"."""
    said = parse(prompt)
    return {**{name: str(value) for name, value in said.items()}, "colour": str(said.get("colours", ("",))[0])}


def _kinds(prompt: str) -> list[str]:
    return [word for word in prompt.split() if word in KINDS]


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
) -> dict[str, Any]:
    """The stage: prints the table, writes report.md and report.json into the measured folder, pictures beside.

    Args:
        shop: what all stages share.
        folder: an export, wherever it came from; null = this training's.
        pictures: held-out pictures (400).
        subjects: held-out subjects for the identity encoder (400).
        samples: prompts to sample.
        steps: of the sampling.
        guidance: of the sampling.
        batch: samples at a time; does not change them beyond rounding.
        speed_steps: of the timed picture (25).
        speed_repeats: timed pictures; their median counts.

    Raises:
        UserError: there is no export, or drawing is not possible here.
    """
    model_folder = Path(folder).expanduser() if folder else shop.weights("export")
    if not (model_folder / "model_index.json").is_file():
        raise UserError(f"report.folder={model_folder} is no exported miniature: run stages=[export], or name one.")
    if importlib.util.find_spec("skia") is None:
        raise UserError("the report draws held-out pictures and needs skia-python, which is not installed here.")
    size = int(json.loads((model_folder / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]) * 8
    values: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    pixels, labels = drawn("held", 1, pictures, size)
    pairs = drawn("pairs", 2, 2 * subjects, size)[0]
    texts = questions(samples)
    pipe = load_pipeline(model_folder, shop.device)
    images = {name: sample(pipe, part, steps, guidance, batch) for name, part in texts.items()}
    _note(
        values, notes, ("reader_accuracy",), lambda: {"reader_accuracy": measure_reader(model_folder, pixels, labels)}
    )
    _note(values, notes, ("identity_retrieval",), lambda: {"identity_retrieval": measure_identity(model_folder, pairs)})
    _note(values, notes, CODED, lambda: measure_coding(model_folder, pixels, pairs))
    _note(values, notes, SAMPLED, lambda: measure_samples(model_folder, images, texts))
    notes["plain_kind"] = notes.get("plain_kind", f"all prompts: {steps} steps, guidance {guidance}")
    seconds = measure_speed(model_folder, speed_steps, speed_repeats)
    values["seconds_per_picture"] = seconds
    asked = {"coded_psnr": pictures, "reader_accuracy": pictures, "coded_retrieval": min(subjects, 200)}
    asked |= {"identity_retrieval": subjects, "seconds_per_picture": speed_steps}
    asked |= {key: len(texts[key.split("_")[0] if key.split("_")[0] in texts else "styled"]) for key in SAMPLED}
    found = bars.rows(values, notes, asked)
    _write(shop, model_folder, found, images, f"{size} px, {environment()['device']}, seed {SEED}.")
    return {"status": "finished", "check": {row["key"]: row["value"] for row in found}}


def _note(
    values: dict[str, float | None], notes: dict[str, str], keys: Sequence[str], measure: Callable[[], dict[str, float]]
) -> None:
    """Measure; what the folder lacks is said in the note instead."""
    try:
        values |= measure()
    except (UserError, OSError) as error:
        values |= dict.fromkeys(keys)
        notes[keys[0]] = " ".join(str(error).split())[:200]


def _write(
    shop: Workshop, model_folder: Path, found: list[dict[str, Any]], images: Mapping[str, Tensor], head: str
) -> None:
    table = bars.markdown(found, head)
    files.atomic_write(model_folder / "report.md", table)
    files.write_json(model_folder / "report.json", found)
    for name, part in images.items():
        sheet = grid(part, len(KINDS))
        files.atomic_write(shop.folder("report") / f"{name}.png", functools.partial(sheet.save, format="PNG"))
    print(table)
