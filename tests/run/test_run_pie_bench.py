"""PIE-Bench through the door: several items in one run, every score of edits from its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hiperlab.run.main import main

EDIT_SCORES = {
    "clip_text", "clip_edited", "structure", "background_psnr", "background_mse", "background_ssim",
    "background_lpips", "ns_lpips", "ns_lpips_fixed", "reconstruction_psnr",
}  # fmt: skip


def bench(folder: Path) -> Path:
    rows = {}
    for number, (source, target) in enumerate([("a [cat]", "a [dog]"), ("a cat", "a cat [in the snow]")]):
        name = f"00000000000{number}"
        path = folder / "annotation_images" / "0_random_140" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((512, 512)).save(path)
        rows[name] = {
            "image_path": f"0_random_140/{name}.jpg", "original_prompt": source, "editing_prompt": target,
            "editing_instruction": "", "editing_type_id": "0", "blended_word": "",
            "mask": [n for y in range(128, 384) for n in (512 * y + 128, 256)],
        }  # fmt: skip
    (folder / "mapping_file.json").write_text(json.dumps(rows))
    return folder


def test_items_are_edited_and_scored(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = [
        "method=hiper", "data=pie_bench", f"data.dir='{bench(tmp_path)}'", "data.kinds=all", "metric=edit_twin",
        "model=tiny", "model.size=64", "logger=csv", "trainer=cpu", "fit.steps=1", "fit.sample_every=0",
        "sampler.steps=2", "sample.seeds=[0]", f"run_dir='{folder}'",
    ]  # fmt: skip
    assert main(asked) == 0
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    table = {
        (row["metric"], row["concept"]): row for row in json.loads((folder / "results.json").read_text())["scores"]
    }
    for name in EDIT_SCORES:
        assert table[name, ""]["n"] == 2 and table[name, ""]["missed"] == 0, name
    for concept in ("000000000000", "000000000001"):
        assert table["reconstruction_psnr", concept]["n"] == 1
        assert (folder / "grids" / f"{concept}.png").is_file()
    texts = {row["prompt"] for row in rows if row["metric"] == "reconstruction_psnr"}
    assert texts == {"a {}"}, "reconstructions only"
    psnr = next(row for row in rows if row["metric"] == "background_psnr" and row["role"] == "target")
    with Image.open(folder / psnr["picture"]) as drawn:
        pixels = np.asarray(drawn.convert("RGB"), float)
    source = Image.open(tmp_path / "annotation_images" / "0_random_140" / f"{psnr['concept']}.jpg")
    seen = np.asarray(source.resize((64, 64), Image.Resampling.BILINEAR), float)
    kept = np.ones((64, 64, 1))
    kept[16:48, 16:48] = 0
    kept[[0, -1]] = kept[:, [0, -1]] = 1  # one pixel of 512 is no whole pixel of 64
    error = (((pixels - seen) * kept / 255) ** 2).mean()
    assert abs(psnr["value"] + 10 * np.log10(error)) < 0.05
