"""Pages from the templates beside this file. Text is escaped, and nothing comes from outside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

OWN = "hiperlab.report"


class Table(NamedTuple):
    """A table of a page; one without rows is not shown.

    Attributes:
        head: a name per column.
        rows: a cell per column.
        caption: a line below.
        kinds: a row's style class, "" for none.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    kinds: Sequence[str] = ()

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether its every cell looks like a number; such columns stand to the right."""
        return [all(_numeric(row[column]) for row in self.rows) for column in range(len(self.head))]


class Figure(NamedTuple):
    """A picture of a page, by its address relative to the page."""

    address: str
    caption: str


def figure(path: Path, folder: Path, caption: str) -> Figure:
    """A picture below the page's folder."""
    return Figure(quote(path.relative_to(folder).as_posix()), caption)


def render(template: str, package: str = OWN, **values: Any) -> Markup:
    """A template filled with values, safe to stand in another one.

    Args:
        template: its file, in the package's templates/ or in those here, which it may extend.
        package: another one that brings templates.
        values: what it shows.
    """
    return Markup(_templates(package).get_template(template).render(values))


@cache
def _templates(package: str) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(each) for each in dict.fromkeys((package, OWN))]),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name fails instead of leaving a hole in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _numeric(cell: Any) -> bool:
    text = str(cell).replace("\N{THIN SPACE}", "")
    return text in ("", "–") or text[:1].isdigit() or (text[:1] in "-−[" and text[1:2].isdigit())
