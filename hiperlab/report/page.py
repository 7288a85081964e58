"""HTML by hand: escaped text, one style sheet, nothing from outside. The page needs neither scripts nor a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2127; --soft: #5d6772; --rule: #d9dee3; --card: #f6f7f9;
  --accent: #2563a8; --warn: #fff4d6; --warn-ink: #6b4b00; --warn-rule: #e3b341; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --soft: #9aa5b1; --rule: #333a42;
  --card: #1d2126; --accent: #7ab4f5; --warn: #332a12; --warn-ink: #f3dc9c; --warn-rule: #8a6a1c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .5rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
code, pre { font: .86rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .75rem 1rem; overflow: auto;
  margin: .5rem 0; } pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
.notes { background: var(--warn); color: var(--warn-ink); border-left: 4px solid var(--warn-rule); border-radius: 4px;
  padding: .6rem 1rem; margin: 1rem 0; } .notes ul { margin: .25rem 0 .1rem; padding-left: 1.2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .75rem; margin: 1rem 0; }
.facts div { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .8rem;
  min-width: 0; overflow-wrap: anywhere; }
.facts span { display: block; color: var(--soft); font-size: .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; } tr.total td { font-weight: 600; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
figure { margin: .75rem 0; } figure img { max-width: 100%; border: 1px solid var(--rule); border-radius: 4px;
  background: #fff; display: block; } figcaption { margin-top: .3rem; }
.curve { width: 100%; max-width: 820px; height: auto; } .curve text { fill: var(--soft); font-size: 12px; }
.curve polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; }
.curve .raw { opacity: .3; stroke-width: 1; } .curve .mean { stroke-width: 2; } .curve .rule { stroke: var(--rule); }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
.flow { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: flex-end; } .flow figure { max-width: 100%; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    parts = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{parts}\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading with what belongs to it; nothing if all of it is empty."""
    present = [part for part in parts if part]
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(present) + "\n</section>" if present else ""


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Small cards, a name and a value each; empty values are left out."""
    cells = [
        f"<div><span>{escape(name)}</span>{escape(str(value))}</div>"
        for name, value in pairs
        if value not in (None, "")
    ]
    return f'<div class="facts">{"".join(cells)}</div>' if cells else ""


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", classes: Sequence[str] | None = None
) -> str:
    """A table; columns whose every cell looks like a number stand to the right. Nothing without rows."""
    if not rows:
        return ""
    right = [all(_numeric(row[column]) for row in rows) for column in range(len(head))]
    mark = [' class="number"' if each else "" for each in right]
    top = "".join(f"<th{m}>{escape(name)}</th>" for m, name in zip(mark, head, strict=True))
    lines = []
    for number, row in enumerate(rows):
        kind = f' class="{escape(classes[number])}"' if classes and classes[number] else ""
        cells = "".join(f"<td{m}>{escape(str(cell))}</td>" for m, cell in zip(mark, row, strict=True))
        lines.append(f"<tr{kind}>{cells}</tr>")
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(lines)
    return f'<div class="scroll"><table>{below}<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def figure(path: Path, run_dir: Path, caption: str) -> str:
    """A picture of the run folder, by its relative address."""
    address = quote(path.relative_to(run_dir).as_posix())
    text = escape(caption)
    return f'<figure><img src="{address}" alt="{text}" loading="lazy"><figcaption>{text}</figcaption></figure>'


def flow(parts: Sequence[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="flow">{"".join(parts)}</div>' if parts else ""


def details(title: str, text: str) -> str:
    """Text that opens on a click; nothing without text."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text.strip() else ""


def notes(lines: Sequence[str]) -> str:
    """The honest banner: what a reader must know before believing a number."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="notes" role="note"><strong>Read this first</strong><ul>{items}</ul></div>'


def _numeric(cell: Any) -> bool:
    text = str(cell).replace("\N{THIN SPACE}", "")
    return text in ("", "–") or text[:1].isdigit() or (text[:1] in "-−[" and text[1:2].isdigit())
