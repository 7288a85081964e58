"""The bars of the miniature and the table that says, honestly, which were reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: in words.
        unit: printed after numbers.
        bar: what should be reached.
        most: whether the bar is a most, not a least.
        needs: pictures, subjects or steps that the question takes; an easier one is not compared with the bar.
        digits: behind the point, where numbers are shown.
    """

    what: str
    unit: str
    bar: float
    most: bool = False
    needs: int = 0
    digits: int = 1

    def reached(self, value: float | None) -> str:
        """One of: yes, not reached, not measured."""
        if value is None:
            return "not measured"
        return "yes" if (value <= self.bar if self.most else value >= self.bar) else "not reached"

    def show(self, value: float | None) -> str:
        """A number with its unit."""
        return "–" if value is None else f"{value:.{self.digits}f} {self.unit}".strip()


BARS = {
    "coded_psnr": Bar("coded and decoded: PSNR at 64 px, held-out pictures", "dB", 28.5, needs=400),
    "coded_identity": Bar("coded and decoded photos of the named subjects: identity", "", 0.78, digits=2),
    "coded_identity_worst": Bar("the same, worst of the named subjects", "", 0.55, digits=2),
    "coded_retrieval": Bar("a decoded photo finds its subject among 200", "%", 75, needs=200),
    "reader_accuracy": Bar("attribute reader on held-out renders, mean accuracy", "%", 90, needs=400),
    "identity_retrieval": Bar("identity encoder: right subject among 400, other scene", "%", 70, needs=400),
    "plain_kind": Bar("plain prompts (kind and place): kind read as prompted", "%", 97, needs=66),
    "plain_place": Bar("plain prompts: place", "%", 97, needs=66),
    "kind": Bar("prompts of style, kind, pose and place: kind", "%", 97, needs=132),
    "place": Bar("the same: place", "%", 97, needs=132),
    "style": Bar("the same: style", "%", 95, needs=132),
    "pose": Bar("the same: pose", "%", 85, needs=132),
    "colour": Bar("colour words", "%", 90, needs=66),
    "pattern": Bar("pattern words", "%", 85, needs=66),
    "accessory": Bar("accessories", "%", 75, needs=66),
    "two": Bar("two subjects in one prompt, both there", "%", 50, needs=44),
    "seconds_per_picture": Bar("sampling one picture, 25 steps, guidance, 2 CPU threads", "s", 2.5, most=True,
                               needs=25),
}  # fmt: skip


def rows(
    values: Mapping[str, float | None], notes: Mapping[str, str], asked: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One record per bar: key, what, value, bar, whether it is reached, note.

    Args:
        values: by key, None where nothing could be measured.
        notes: by key.
        asked: by key, what the bar's `needs` is compared with.
    """
    return [_row(key, bar, values.get(key), notes.get(key, ""), asked.get(key, 0)) for key, bar in BARS.items()]


def _row(key: str, bar: Bar, value: float | None, note: str, asked: int) -> dict[str, Any]:
    easier = value is not None and asked < bar.needs
    if easier:
        note = f"{note}; " * bool(note) + f"an easier question ({asked} for {bar.needs}): not compared"
    reached = "not compared" if easier else bar.reached(value)
    return {"key": key, "what": bar.what, "unit": bar.unit, "value": value, "bar": bar.bar, "reached": reached,
            "note": note}  # fmt: skip


def markdown(found: list[dict[str, Any]], head: str) -> str:
    """The table."""
    lines = ["# Bars of the miniature", "", head, ""]
    lines += ["| what | measured | bar | reached | note |", "|---|---|---|---|---|"]
    for row in found:
        bar = BARS[row["key"]]
        lines.append(
            f"| {row['what']} | {bar.show(row['value'])} | {bar.show(row['bar'])} | {row['reached']} | {row['note']} |"
        )
    return "\n".join(lines) + "\n"
