"""What a person sees: progress, samples, grids, the page, the environment."""

import io
import json
import re
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.report import environment
from hiperlab.report.curve import curve
from hiperlab.report.grid import grid, to_pil
from hiperlab.report.html import write_report
from hiperlab.report.progress import StepProgress
from hiperlab.report.samples import TrainingSamples
from tests.report.toy import Toy, build


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress_counts_optimizer_steps(tmp_path, stream):
    bar = StepProgress(seconds=0.0, stream=stream)
    trainer, _, _ = build(tmp_path, 6, accumulate_grad_batches=2)
    trainer.callbacks = [bar if isinstance(each, StepProgress) else each for each in trainer.callbacks]
    trainer.fit(Toy(sleep=0.01))
    text = stream.getvalue()
    assert "6/6" in text and "loss=" in text
    if not stream.isatty():
        assert re.search(r"fit 4/6  loss=\d\.\d{4}  [\d.]+ step/s  00:00 left\n", text)
        assert text.count("\n") == 6


def test_training_samples_leave_no_trace(tmp_path):
    plain = Toy()
    build(tmp_path / "plain", 12)[0].fit(plain)
    toy = Toy()
    toy.frozen.eval()  # a frozen part in another mode than the rest
    seen = []

    class Panel:
        def log_images(self, key, images, captions, step):
            seen.append((key, len(images), captions, step))

    samples = TrainingSamples(tmp_path / "grids", 5, ["<cats>", "a <cats>"], [0, 1], steps=2, guidance=1.0)
    trainer, _, _ = build(tmp_path / "run", 12, callbacks=[samples])
    trainer.loggers[0].log_images = Panel().log_images
    trainer.fit(toy)
    assert toy.sampled == [0, 5, 10, 12]
    assert toy.training and not toy.frozen.training
    assert torch.equal(toy.weight, plain.weight)
    assert [each[3] for each in seen] == [0, 5, 10, 12]
    names = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert names == [f"train-{step:06d}.png" for step in (0, 5, 10, 12)]
    with pytest.raises(UserError, match="2 prompts, 1 seeds"):
        TrainingSamples(tmp_path, 5, ["a", "b"], [0], steps=2, guidance=1.0)


def test_grid_keeps_pixels_and_places():
    images: list[list[Image.Image | None]] = [
        [Image.new("RGB", (32, 32), (r * 90, c * 90, 7)) for c in range(2)] for r in range(2)
    ]
    images[1][1] = None
    sheet = grid(images, rows=["one", "a long label of many words"], columns=["x", "y"], title="t")
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=10**6) or []}
    assert {(0, 0, 7), (0, 90, 7), (90, 0, 7)} <= counts.keys() and (90, 90, 7) not in counts
    assert counts[0, 90, 7] == 128 * 128  # 32 px are too small to look at: each pixel became 4 x 4
    large = [[Image.new("RGB", (200, 100), (1, 2, 3))]]
    assert {c: n for n, c in grid(large).getcolors() or []}[1, 2, 3] == 200 * 100
    with pytest.raises(ValueError, match="labels"):
        grid(images, rows=["a", "b", "c"])
    with pytest.raises(ValueError, match="0 pictures"):
        grid([[None]])


def test_to_pil_rounds_and_clamps():
    pixels = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1)
    assert to_pil(pixels)[0].getpixel((0, 0)) == (0, 128, 255)


def test_curve_draws_finite_values_only():
    svg = curve([0, 1, 2, 3], [1.0, None, float("inf"), 2.0], "loss")
    assert svg.count("<polyline") == 2 and "nan" not in svg and "inf" not in svg
    assert curve([0], [1.0], "loss") == ""
    assert "<polyline" in curve([0, 1], [0.0, 0.0], "loss")


def test_a_curve_of_few_values_is_not_smoothed():
    svg = curve([0, 1, 2], [0.0, 1.0, 0.0], "identity", smoothed=False)
    assert svg.count("<polyline") == 1 and '<polyline class="mean"' in svg
    heights = [float(each.split(",")[1]) for each in svg.split('points="')[1].split('"')[0].split()]
    assert heights[0] == heights[2] > heights[1]  # downwards: the value in the middle is the highest


def row(concept, value, picture="a.png", prompt="a <cats>"):
    return {
        "metric": "clip_t", "concept": concept, "prompt": prompt, "seed": 0, "picture": picture, "value": value,
        "protocol": "p", "protocol_hash": "h", "trained": False, "weights": "w",
    }  # fmt: skip


def test_page_says_everything_and_escapes_it(tmp_path):
    build(tmp_path, 12, callbacks=[TrainingSamples(tmp_path / "grids", 5, ["<cats>"], [0], 2, 1.0)])[0].fit(Toy())
    Image.new("RGB", (8, 8)).save(tmp_path / "grids" / "cats #1.png")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "cats.safetensors").write_bytes(b"0" * 2500)
    (tmp_path / "config.yaml").write_text("prompt: <script>alert(1)</script>\n")
    (tmp_path / "environment.json").write_text(json.dumps(environment.environment()))
    results = {
        "status": "finished", "method": "neti", "concepts": ["cats"], "command": "run data=<x>",
        "seconds": {"fit": 1.25}, "peak_memory": {"process": 3_000_000_000}, "trainable_parameters": 1234,
    }  # fmt: skip
    rows = [row("cats", 0.25), row("cats", 0.35, prompt="b"), row("cats", None), row("cats", 0.9, "real", "")]
    text = write_report(tmp_path, results, rows, ["random weights: <nothing> to see"]).read_text()
    for expected in (
        "Read this first", "random weights: &lt;nothing&gt;", "0.300", "0.900", "untrained judge", "Protocol p (h)",
        "cats%20%231.png", "after 12 steps", "<polyline", "2.5 KB", "3.00 GB", "1.2", "neti", "data=&lt;x&gt;", "torch",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<script" not in text and "http" not in text
    assert str(tmp_path) not in text
    sources = re.findall(r'src="([^"]+)"', text)
    assert sources and all((tmp_path / unquote(source)).is_file() for source in sources)


def test_page_of_an_empty_folder(tmp_path):
    assert "hiperlab" in write_report(tmp_path, {}).read_text()


def test_environment_names_no_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/somebody/run.py", "method=ti", "data.dir=a b"])
    values = environment.environment()
    text = json.dumps(values)
    assert "/home/somebody" not in text and values["command"].endswith(" method=ti 'data.dir=a b'")
    assert values["packages"]["torch"] == torch.__version__.split("+")[0] or values["packages"]["torch"]
    assert environment.peak_memory()["process"] > 1e7
    assert environment.git_state(tmp_path) is None
