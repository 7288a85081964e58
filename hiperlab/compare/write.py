"""A comparison's files: comparison.html, .md, .tex, .csv and .json, and plots/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hiperlab import files
from hiperlab.compare import page, plots, tables
from hiperlab.compare.claims import Claim, check_names
from hiperlab.compare.runs import read
from hiperlab.compare.summary import Summary, summarise

PICTURES = "300"  # most pictures that are part of the page


def compare(
    folders: Sequence[Path],
    out: Path,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    x: str | None = None,
    y: str | None = None,
    pictures: str = PICTURES,
    claims: Sequence[Claim] = (),
) -> str:
    """Compare finished runs and write all files into `out`.

    Args:
        folders: run folders.
        out: where to write; made if missing.
        metrics: those to show; none stands for all.
        baseline: the method that all are compared with; None compares all pairs.
        x: metric of the trade-off's horizontal axis; None finds one.
        y: metric of its vertical axis; None finds one.
        pictures: how many the page holds: a number, "all", "none" or "link".
        claims: orderings to ask the runs.

    Returns:
        The table for the terminal, with what must be known and where the page lies.

    Raises:
        UserError: nothing to compare, scores of several protocols or judges, or a name that is none of those measured.
    """
    measured = read(folders)
    check_names(claims, measured)
    summary = summarise(measured, metrics, baseline, x, y, claims)
    page_path = write(summary, out, pictures)
    left_out = [f"left out: {line}" for line in summary.measured.left_out]
    return "\n".join([tables.text(summary), *tables.claims_text(summary), *left_out, str(page_path)])


def write(summary: Summary, out: Path, pictures: str = PICTURES) -> Path:
    """Write all files of a summary; each is whole or what it was before.

    Returns:
        Where the page lies.
    """
    files.write_json(out / "comparison.json", tables.document(summary))
    files.atomic_write(out / "comparison.csv", tables.as_csv(summary))
    files.atomic_write(out / "comparison.md", tables.markdown(summary))
    files.atomic_write(out / "comparison.tex", tables.latex(summary))
    drawn = plots.draw(summary, out / "plots")
    files.atomic_write(out / "comparison.html", page.write(summary, drawn, out, pictures))
    return out / "comparison.html"
