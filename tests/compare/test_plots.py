"""Figures: which there are, that they are whole in every format, and that nothing outside chooses their names."""

from __future__ import annotations

import matplotlib
import pytest
from PIL import Image

from hiperlab.compare import plots
from hiperlab.compare.plots import draw
from hiperlab.compare.runs import find, read
from hiperlab.compare.summary import summarise
from tests.compare.folders import run


def test_every_figure_in_every_format_and_always_the_same(tmp_path) -> None:
    for method, value in (("ti", 0.4), ("neti", 0.5)):
        for steps in (100, 200):
            asked = [f"fit.steps={steps}"]
            scores = {"clip_text": value, "identity": 0.3 + steps / 1000}
            run(tmp_path / f"{method}{steps}", method, scores, concepts=("a", "b"), asked=asked, steps=steps)
    found = summarise(read(find([tmp_path])), baseline="ti fit.steps=100")
    before = dict(matplotlib.rcParams)
    drawn = draw(found, tmp_path / "plots")
    names = [plot.name for plot in drawn]
    assert names == [
        "trade_off", "scores", "steps", "map_identity", "difference_identity", "map_clip_text", "difference_clip_text",
    ]  # fmt: skip
    assert dict(matplotlib.rcParams) == before
    for name in names:
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 150 and len(set(picture.convert("L").tobytes())) > 10
        assert (tmp_path / "plots" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert b"<svg" in (tmp_path / "plots" / f"{name}.svg").read_bytes()
    again = {plot.name: plot.svg for plot in draw(found, tmp_path / "again")}
    assert again == {plot.name: plot.svg for plot in drawn}


def test_costs_that_differ_are_drawn(tmp_path) -> None:
    import json

    for number, method in enumerate(("ti", "neti", "hiper")):
        folder = run(tmp_path / method, method, {"identity": 0.1 * number})
        results = json.loads((folder / "results.json").read_text())
        results["stages"]["fit"] |= {
            "train_seconds": 10.0**number,
            "artifact_bytes": 0 if number == 0 else 1000 * number,
        }
        (folder / "results.json").write_text(json.dumps(results))
    drawn = {plot.name: plot for plot in draw(summarise(read(find([tmp_path]))), tmp_path / "plots")}
    assert "The same for all: seconds a picture" in drawn["cost"].caption and "trade_off" not in drawn


def test_one_method_and_odd_names(tmp_path) -> None:
    """Formulas in names are text, and a score's name is no path."""
    run(tmp_path / "a", "$\\frac$_{", {"../../identity": 0.2, "$x": 0.1}, concepts=("a$", "b\\"))
    (tmp_path / "a" / "overrides.yaml").unlink()
    drawn = draw(summarise(read(find([tmp_path]))), tmp_path / "out" / "plots")
    assert [plot.name for plot in drawn] == ["map_______identity"]
    assert {path.parent.name for path in tmp_path.rglob("*.pdf")} == {"plots"}


def test_settings_and_variants_that_are_numbers_are_axes(tmp_path) -> None:
    """A line per method that only this setting tells apart; what is no number is none, and one point is no line."""
    for rate in ("1e-4", "3e-3", "0.1"):
        for tuner in ("oft", "dora"):
            asked = [f"method.optimizer.lr={rate}", f"method.tuner={tuner}"]
            run(tmp_path / f"{tuner}{rate}", "peft", {"identity": 0.3 + float(rate)}, asked=asked, pictures=False)
    for scale in (0.6, 0.8):
        run(tmp_path / f"h{scale}", "hiper", {"identity": scale}, variant=f"scale={scale}", pictures=False)
    run(tmp_path / "ti", "ti", {"identity": 0.2}, variant="scale=1", pictures=False)
    summary = summarise(read(find([tmp_path])))
    found = {each.name: each.figure for each in plots._settings(summary)}
    assert set(found) == {"over_method_optimizer_lr", "over_scale"}
    axes = found["over_method_optimizer_lr"].axes[0]
    assert axes.get_xscale() == "log" and axes.xaxis.get_major_formatter()(0.001) == "0.001"
    lines = {each.get_label(): each for each in axes.containers}
    assert set(lines) == {"peft method.tuner=oft", "peft method.tuner=dora"}
    x, y = lines["peft method.tuner=oft"].lines[0].get_data()
    assert list(x) == [1e-4, 3e-3, 0.1] and list(y) == pytest.approx([0.3101, 0.313, 0.41], abs=0.02)
    assert [each.get_label() for each in found["over_scale"].axes[0].containers] == ["hiper"]
