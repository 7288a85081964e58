"""Citations: a reader of the repository can follow each, and the code of methods has enough of them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("method", "base", "edit", "layer", "loss", "model")
LEAST = 2.0  # citations per 1000 lines
PLACE = r"(?:eqs?\.|sections?|tables?|algorithms?|figs?\.|appendix)\s+[\dA-Z]"
FOLLOWED = re.compile(  # "Ho et al. 2020, eq. 4", or a file of the authors
    rf"\b(?:19|20)\d\d,\s+{PLACE}|\b[\w/-]+\.(?:py|ipynb)\b"
)
LOST = {  # what a reader cannot look up; this file does not match its own patterns
    "a document outside the repository": re.compile(
        r"\bmethods/\w+\.m[d]\b|\b(?:house|stack|style|neti|hiper|e4t|stylediffusion)\.m[d]\b|\bshare[d]/"
    ),
    "a specification nobody has": re.compile(r"\bthe\s+specificatio[n]\b|\bSpecificatio[n]:|\bpromise[s],\s+section"),
    "a section without its paper": re.compile(r"\((?:its\s+)?sections?\s+\d|\bsection\s+numbers\s+belo[w]"),
}


def sources() -> list[Path]:
    found = [path for room in ("hiperlab", "conf", "tests") for path in sorted((ROOT / room).rglob("*"))]
    found += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "METHODS.md")]
    return [path for path in found if path.suffix in (".py", ".yaml", ".md") and path.is_file()]


def prose(text: str) -> str:
    """A Python file's comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
    return "\n".join(found)


@pytest.mark.parametrize("what", LOST)
def test_every_citation_can_be_followed(what: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in sources()
        for match in LOST[what].finditer(path.read_text(encoding="utf-8"))
    }
    assert not found, f"{what}: name the paper's equation or section, or the authors' file and function: {found}"


@pytest.mark.parametrize("room", ROOMS)
def test_code_cites_what_it_follows(room: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "hiperlab" / room).rglob("*.py"))]
    lines = sum(len(text.splitlines()) for text in texts)
    count = sum(len(FOLLOWED.findall(prose(text))) for text in texts)
    print(f"{room}: {count} citations in {lines} lines, {1000 * count / lines:.1f} per 1000")
    assert 1000 * count >= LEAST * lines


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Specificatio" + "n: methods/x.m" + "d", "a specification nobody has"),
        ("as methods/neti.m" + "d says", "a document outside the repository"),
        ("the mean (sectio" + "n 5)", "a section without its paper"),
    ],
)
def test_lost_citations_are_found(text: str, what: str) -> None:
    assert LOST[what].search(text)


@pytest.mark.parametrize("text", ["(Ho et al. 2020, eq. 4)", "Kawar et al. 2023, section 3", "models/neti_mapper.py"])
def test_followed_citations_are_counted(text: str) -> None:
    assert FOLLOWED.search(text)
    assert not any(pattern.search(text) for pattern in LOST.values())


def test_methods_page_has_every_method() -> None:
    """A row with its command, and one with its defaults."""
    text = (ROOT / "METHODS.md").read_text(encoding="utf-8")
    names = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
    for what, pattern in (("command", r"^\| `method=(\w+) "), ("defaults", r"^\| `(\w+)` \|")):
        found = sorted(re.findall(pattern, text, re.M))
        assert found == names, f"METHODS.md, the table with each method's {what}: {sorted({*found} ^ {*names})}"
    on_sdxl = re.findall(r"`(\w+)`", " ".join(re.findall(r"^- (`.*?`):", text.partition("## Which base")[2], re.M)))
    assert sorted(on_sdxl) == names, f"METHODS.md, what each does on SDXL: {sorted({*on_sdxl} ^ {*names})}"
