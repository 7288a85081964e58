"""Figures: which there are, that they are whole in every format, and that nothing outside chooses their names."""

from __future__ import annotations

import matplotlib
import numpy as np
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


def test_rows_of_prompts_of_ones_own_are_their_texts(tmp_path) -> None:
    """As edits have them: a row for each, methods side by side, and the full texts of those that are cut."""
    prompts = {c: [f"a photo of a {{}} number {k} {'far ' * 20 * (k == 0)}in {c}" for k in range(3)] for c in "abc"}
    for method, gain in (("ti", 0.0), ("neti", 0.25)):
        for number, (concept, mine) in enumerate(prompts.items()):
            place = tmp_path / method / concept
            run(place, method, {"identity": 0.1 * number + gain}, concepts=(concept,), prompts=mine, pictures=False)
    drawings = {each.name: each for each in plots._heat_maps(summarise(read(find([tmp_path]))))}
    assert set(drawings) == {"map_identity", "difference_identity"}
    axes = drawings["map_identity"].figure.axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows[1] == "a: a photo of a S* number 1 in a" and len(set(rows)) == 9
    assert [label.get_text() for label in axes.get_xticklabels()] == ["neti", "ti"]
    assert axes.images[0].get_array()[4].tolist() == pytest.approx([0.36, 0.11])
    full = drawings["map_identity"].title.split("\n")
    assert full == [f"{c}: {prompts[c][0].replace('{}', 'S*')}" for c in "abc"]
    change = drawings["difference_identity"].figure.axes[0].images[0].get_array()
    assert change.shape == (9, 1) and np.allclose(change, -0.25)


def test_titles_are_whole_and_inside_of_their_figure(tmp_path) -> None:
    long = "method.optimizer.weight_decay_of_all_layers={} method.rank=16"
    for value in (1, 2):
        asked = [long.format(value).split()[0], "method.rank=16"]
        run(tmp_path / str(value), "peft", {"identity": 0.1 * value}, concepts="ab", asked=asked, pictures=False)
    run(tmp_path / "c", "peft", {"identity": 0.7}, concepts="ab", asked=[long.format(3)[:-3] + "8"], pictures=False)
    summary = summarise(read(find([tmp_path])))
    for baseline in range(3):
        with matplotlib.rc_context(plots._STYLE):
            named = summarise(read(find([tmp_path])), baseline=summary.measured.names[baseline])
            for drawing in plots._heat_maps(named):
                drawing.figure.draw_without_rendering()
                whole = drawing.figure.bbox
                for axes in drawing.figure.axes:
                    for text in (axes.title, axes.yaxis.label):
                        if not text.get_text():
                            continue
                        box = text.get_window_extent()
                        assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1, text
                titles = {axes.title.get_text().replace("\n", "") for axes in drawing.figure.axes} - {""}
                shown = {name.replace(" ", "") for name in named.measured.names}
                assert {title.replace(" ", "") for title in titles} <= shown and titles
