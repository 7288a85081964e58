"""The page in a browser: sorting, filters and zoom by the address alone, printing, and text that stays text."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hiperlab.compare import page
from hiperlab.compare.runs import find, read
from hiperlab.compare.summary import summarise
from hiperlab.report.grid import grid, save_png
from tests.compare.folders import PROMPTS, run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed: the page is not opened")
EVIL = "<script>document.title='run'</script>\"'<img src=x onerror=alert(1)>"


def opened(path: Path, fragment: str = "", *more: str) -> str:
    """The page's elements after its script ran."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}"]
    command = [str(BROWSER), *flags, *(more or ["--dump-dom"]), f"{path.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three methods, two subjects."""
    root = tmp_path_factory.mktemp("page")
    for method, value in (("ti", 0.25), ("neti", 0.75), ("lora", 0.5)):
        run(root / method, method, {"clip_text": value, "identity": 1 - value}, concepts=("cat", "dog"), seeds=(0, 1))
    (root / "comparison.html").write_text(page.write(summarise(read(find([root]))), [], root, "all"))
    return root


def order(text: str, table: str) -> list[str]:
    """First cells of a table's visible rows, from top to bottom."""
    body = re.search(rf'<table[^>]*id="{table}">.*?<tbody>(.*?)</tbody>', text, re.S)
    assert body
    rows = re.findall(r"<tr([^>]*)>\s*<td[^>]*>(.*?)</td>", body[1], re.S)
    return [cell.partition("<")[0] for attributes, cell in rows if "hidden" not in attributes]


@browser
def test_a_table_is_sorted_by_the_address(folder) -> None:
    target = folder / "comparison.html"
    assert order(opened(target), "scores") == ["lora", "neti", "ti"]
    assert order(opened(target, "#sort=scores:1:desc"), "scores") == ["neti", "lora", "ti"]
    both = opened(target, "#sort=scores:2:desc,cost:0:desc")
    assert order(both, "scores") == ["ti", "lora", "neti"] and order(both, "cost") == ["ti", "neti", "lora"]
    assert (
        both.count('aria-sort="descending"') == 2
        and "ascending" not in both.partition("<script>")[0].partition("</style>")[2]
    )


@browser
def test_rows_columns_and_subjects_are_filtered_by_the_address(folder) -> None:
    target = folder / "comparison.html"
    found = opened(target, "#filter=LO&subject=dog")
    assert order(found, "scores") == ["lora"] and order(found, "subjects") == ["dog"]
    assert re.search(r'<section class="block" data-subject="cat" hidden', found)
    assert not re.search(r'<section class="block" data-subject="dog" hidden', found)
    assert re.search(r'<td data-method="ti" hidden', found) and not re.search(r'<td data-method="lora" hidden', found)
    prompt = opened(target, "#prompt=S*+on+the+beach&method=neti")
    rows = re.findall(r'<tr data-prompt="([^"]*)"[^>]*?( hidden="")?>', prompt)
    assert {text for text, hidden in rows if not hidden} == {"S* on the beach"} and len(rows) == 2 * len(PROMPTS) * 2
    assert order(prompt, "scores") == ["neti"]


def scores(text: str) -> dict[str, list[tuple[str, str]]]:
    """Method -> (mean as shown, style) of each score in the main table."""
    body = re.search(r'id="scores">.*?<tbody>(.*?)</tbody>', text, re.S)
    assert body
    rows = [re.findall(r'<td class="([^"]*)"[^>]*>(.*?)</td>', row, re.S) for row in body[1].split("</tr>")]
    cells = [
        [(re.sub(r"<small>.*|<[^>]*>", "", cell), kind.replace("number", "").strip()) for kind, cell in row]
        for row in rows
    ]
    return {row[0][0]: row[1:-1] for row in cells if row}


@browser
def test_means_are_those_of_the_chosen_subjects(tmp_path) -> None:
    """By hand: two of three subjects, one of which a method lacks; marks, order and the note follow."""
    given = {
        "ti": {"cat": 0.1, "dog": 0.6, "cow": 0.95}, "neti": {"cat": 0.3, "dog": 0.5, "cow": 0.9},
        "xti": {"cat": 0.2, "cow": 0.1},
    }  # fmt: skip
    for method, subjects in given.items():
        for name, value in subjects.items():
            values = {"clip_text": value, "truth_distance": value}
            run(tmp_path / method / name, method, values, concepts=(name,), spread=0.0, pictures=False)
    target = tmp_path / "comparison.html"
    target.write_text(page.write(summarise(read(find([tmp_path]))), [], tmp_path, "none"))
    whole = opened(target)
    assert scores(whole)["neti"][0] == ("0.567", "best") and scores(whole)["ti"][0] == ("0.550", "second")
    assert re.search(r'<p id="chosen"[^>]* hidden', whole) and '<table class="sheet" id="scores">' in whole
    found = opened(target, "#subject=cat%0Adog&sort=scores:1:desc")
    assert scores(found) == {
        "neti": [("0.400", "best"), ("0.400", "")], "ti": [("0.350", "second"), ("0.350", "second")],
        "xti": [("0.200", ""), ("0.200", "best")],
    }  # fmt: skip
    assert order(found, "scores") == ["neti", "ti", "xti"] and set(order(found, "subjects")) == {"cat", "dog"}
    note = re.search(r'<p id="chosen"[^>]*>(.*?)</p>', found)
    assert note and "hidden" not in note[0] and note[1].startswith("2 of 3 subjects chosen: means")
    assert "intervals, differences, ranks, orderings, cost and figures are of all" in note[1]
    assert 'class="sheet chosen" id="scores"' in found  # its intervals are hidden
    dog = scores(opened(target, "#subject=dog"))
    assert dog["xti"] == [("–", ""), ("–", "")] and dog["ti"][0] == ("0.600", "best")
    assert (
        scores(opened(target, "#subject=cow%0Adog%0Acat")) == scores(whole) == scores(opened(target, "#subject=horse"))
    )


@browser
def test_a_picture_is_enlarged_by_the_address(folder) -> None:
    target = folder / "comparison.html"
    assert re.search(r'<div id="zoom"[^>]* hidden', opened(target))
    found = opened(target, "#zoom=2.3")
    assert not re.search(r'<div id="zoom"[^>]* hidden', found)
    what = re.search(r'<figcaption id="what">(.*?)</figcaption>', found)
    says = re.search(r'<p id="says">(.*?)</p>', found)
    assert what and says and what[1] == "ti · clip_text ↑ 0.260 · identity ↑ 0.760"
    assert says[1] == "cat · a photo of S* · seed 1"
    shown = re.search(r'<img id="large" alt="[^"]*" src="(data:image/jpeg;base64,[^"]+)"', found)
    cell = re.search(r'data-cell="2\.3"[^>]*><img src="([^"]+)"', found)
    assert shown and cell and shown[1] == cell[1]
    assert re.search(r'<div id="zoom"[^>]* hidden', opened(target, "#zoom=99.1"))


@browser
def test_keys_and_clicks(folder) -> None:
    """What a hand does, by a script at the page's end: sort by a click, enlarge by one, go on by arrows, close."""
    doing = {
        "one('#scores th:nth-child(2)').click()": (["neti", "lora", "ti"], None),
        "one('#scores th:nth-child(2)').click(); one('#scores th:nth-child(2)').click()": (
            ["ti", "lora", "neti"],
            None,
        ),
        "one('.picture').click(); key('ArrowRight'); key('ArrowDown')": (["lora", "neti", "ti"], "neti"),
        "one('.picture').click(); key('ArrowLeft')": (["lora", "neti", "ti"], "lora"),
        "one('.picture').click(); key('Escape')": (["lora", "neti", "ti"], None),
        "one('#subject input').click(); one('#controls [type=reset]').click()": (["lora", "neti", "ti"], None),
        "type('#filter', 'TI'); one('td:not([hidden]) > .picture').click(); key('ArrowLeft')": (["neti", "ti"], "neti"),
    }
    help_ = (
        "const one = (s) => document.querySelector(s);"
        "const key = (k) => document.dispatchEvent(new KeyboardEvent('keydown', {key: k, bubbles: true}));"
        "const type = (s, t) => { one(s).value = t; one(s).dispatchEvent(new Event('input', {bubbles: true})); };"
    )
    text = (folder / "comparison.html").read_text()
    for number, (action, (rows, enlarged)) in enumerate(doing.items()):
        target = folder / f"by_hand{number}.html"
        target.write_text(text.replace("</body>", f"<script>{help_}{action}</script></body>"))
        found = opened(target)
        assert order(found, "scores") == rows, action
        assert bool(re.search(r'<div id="zoom"[^>]* hidden', found)) == (enlarged is None), action
        if enlarged:
            assert re.search(rf'<figcaption id="what">{enlarged} ', found), action


@browser
def test_it_prints(folder) -> None:
    target = folder / "printed.pdf"
    opened(folder / "comparison.html", "", f"--print-to-pdf={target}", "--no-pdf-header-footer")
    content = target.read_bytes()
    assert content.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", content)) >= 2


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evil")
    for method in (EVIL, "ti"):
        place = root / str(len(method))
        run(place, method, {EVIL: 0.2, "clip_text": 0.4}, concepts=(EVIL,), prompts=(f"{{}} {EVIL}", "b {}"))
        (place / "overrides.yaml").unlink()
    (root / "broken").mkdir()
    (root / "broken" / "results.json").write_text("{")
    (root / "comparison.html").write_text(page.write(summarise(read(find([root]))), [], root, "all"))
    return root


def test_text_from_outside_is_escaped(evil) -> None:
    text = (evil / "comparison.html").read_text()
    assert "<script>document" not in text and "<img src=x" not in text
    assert text.count("<script>") == 1  # its own
    assert html.escape("<script>document") in text


@browser
def test_text_from_outside_does_not_run(evil) -> None:
    found = opened(evil / "comparison.html", "#zoom=1.1&filter=%3Cscript%3E")
    assert "<title>hiperlab: Comparison of 2 methods on 1 subject</title>" in found
    assert "<img src=x" not in found and found.count("<script>") == 1
    assert order(found, "scores") == [html.escape(EVIL, quote=False)]


def test_nothing_is_fetched_from_elsewhere(folder) -> None:
    text = (folder / "comparison.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', text)
    assert addresses and all("".join(each).startswith("data:image/") for each in addresses)
    assert "http://" not in text and "https://" not in text and "@import" not in text


@pytest.mark.parametrize(("asked", "shown"), [("0", 0), ("7", 6), ("none", 0), ("all", 36), ("36", 36)])
def test_as_many_pictures_as_asked(folder, asked: str, shown: int) -> None:
    """Whole rows of three; the first ones are of both subjects alike."""
    text = page.write(summarise(read(find([folder]))), [], folder, asked)
    assert text.count('class="picture"') == shown
    if shown == 6:
        assert len(re.findall(r'<section class="block"', text)) == 2 and "6 of 36 pictures" in text


def test_linked_pictures_are_addressed_from_the_page(folder, tmp_path) -> None:
    text = page.write(summarise(read(find([folder]))), [], tmp_path, "link")
    address = re.search(r'class="picture"[^>]*><img src="([^"]+)"', text)
    assert address and (tmp_path / address[1]).resolve() == (folder / "lora" / "samples" / "0_0_0.png").resolve()


def test_a_missing_or_broken_picture_leaves_its_place_empty(tmp_path) -> None:
    a, b = (run(tmp_path / m, m, {"clip_text": 0.1}, prompts=PROMPTS[:1]) for m in ("ti", "neti"))
    (a / "samples" / "0_0_0.png").write_bytes(b"no picture")
    text = page.write(summarise(read([a, b])), [], tmp_path, "all")
    assert text.count('class="picture"') == 1 and "Not readable: 0_0_0.png" in text


def test_real_pictures_and_truths_come_from_the_grids(tmp_path) -> None:
    """A grid as the sample stage writes it; one of other pictures is not believed."""
    from PIL import Image

    from hiperlab.compare.references import references
    from tests.compare.folders import change

    a = run(tmp_path / "a", "ti", {"clip_text": 0.1}, seeds=(0, 1))
    drawn = [[Image.open(a / "samples" / f"0_{p}_{s}.png") for s in (0, 1)] for p in range(len(PROMPTS))]
    real = [Image.new("RGB", (16, 16), (250, 10 * k, 0)) for k in range(4)]
    save_png(grid([real, *drawn], rows=["cats: references", *PROMPTS], title="TI"), a / "grids" / "cats.png")
    found = references(read([a]), 0)
    assert [image.getpixel((3, 3)) for image in found.shown] == [(250, 10 * k, 0) for k in range(4)]
    assert not found.truths and not found.missing
    Image.new("RGB", (16, 16), (1, 2, 3)).save(a / "samples" / "0_0_0.png")
    assert "is of other pictures" in references(read([a]), 0).missing
    (a / "grids" / "cats.png").write_bytes(b"no picture")
    assert "cannot be read" in references(read([a]), 0).missing
    (a / "grids" / "cats.png").unlink()
    assert "no run kept a grid" in references(read([a]), 0).missing

    edit = run(tmp_path / "edit", "hiper", {"clip_text": 0.1})
    lines = (edit / "samples" / "samples.jsonl").read_text().splitlines()
    change(edit / "samples" / "samples.jsonl", role="target")
    for place in range(len(lines)):  # an edit's files begin with the number of their column
        (edit / "samples" / f"0_{place}_0.png").rename(edit / "samples" / f"0{place}_0.png")
    text = (edit / "samples" / "samples.jsonl").read_text()
    (edit / "samples" / "samples.jsonl").write_text(re.sub(r"samples/0_(\d)_0", r"samples/0\1_0", text))
    edits = [Image.open(edit / "samples" / f"0{place}_0.png") for place in range(3)]
    save_png(grid([[real[0], None, real[2]], edits], rows=["source, truth", "seed 0"]), edit / "grids" / "cats.png")
    found = references(read([edit]), 0)
    assert len(found.shown) == 1 and {k: v.getpixel((0, 0)) for k, v in found.truths.items()} == {2: (250, 20, 0)}
    assert 'class="truth"><img' in page.write(summarise(read([edit])), [], tmp_path, "all")
