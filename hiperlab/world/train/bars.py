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
        gpu, cpu: what a miniature trained there should reach; None where the bar is no number.
        most: whether the bar is a most, not a least.
        needs: pictures, subjects or steps that the question takes; an easier one is not compared with the bar.
        digits: behind the point, where numbers are shown.
    """

    what: str
    unit: str
    gpu: float | None
    cpu: float | None
    most: bool = False
    needs: int = 0
    digits: int = 1

    def reached(self, value: float | None, bar: float | None) -> str:
        """One of: yes, not reached, not measured."""
        if value is None or bar is None:
            return "not measured"
        return "yes" if (value <= bar if self.most else value >= bar) else "not reached"

    def show(self, value: float | None) -> str:
        """A number with its unit."""
        return "–" if value is None else f"{value:.{self.digits}f} {self.unit}".strip()


BARS = {
    "vae_psnr": Bar("VAE reconstruction PSNR, held-out pictures", "dB", 27, 23, needs=400),
    "clip_retrieval": Bar("conditioning CLIP: retrieval top-1 of 400", "%", 80, 50, needs=400),
    "reader_accuracy": Bar("attribute reader on held-out renders, mean accuracy", "%", 97, 90, needs=400),
    "sample_kind": Bar("samples whose kind is read as prompted", "%", 90, 65, needs=50),
    "sample_place": Bar("samples whose place is read as prompted", "%", 90, 65, needs=50),
    "sample_style": Bar("samples whose style is read as prompted", "%", 90, 65, needs=50),
    "identity_retrieval": Bar("identity encoder: right subject among 400, other scene", "%", 90, 70, needs=400),
    "personalised": Bar("Textual Inversion of 5 held-out subjects: identity similarity above the class prompt's", "",
                        0.0, 0.0, needs=5, digits=3),
    "seconds_per_picture": Bar("sampling one picture, 25 steps, guidance, 2 CPU threads", "s", 2.5, 2.5, most=True,
                               needs=25),
}  # fmt: skip


def rows(
    values: Mapping[str, float | None], notes: Mapping[str, str], asked: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One record per bar: key, what, value, both bars, whether each is reached, note.

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
    gpu, cpu = (("not compared",) * 2) if easier else (bar.reached(value, bar.gpu), bar.reached(value, bar.cpu))
    return {"key": key, "what": bar.what, "unit": bar.unit, "value": value, "gpu_bar": bar.gpu, "gpu_reached": gpu,
            "cpu_bar": bar.cpu, "cpu_reached": cpu, "note": note}  # fmt: skip


def markdown(found: list[dict[str, Any]], head: str) -> str:
    """The table."""
    lines = ["# Bars of the miniature", "", head, ""]
    lines += ["| what | measured | GPU bar | reached | CPU bar | reached | note |", "|---|---|---|---|---|---|---|"]
    for row in found:
        bar = BARS[row["key"]]
        lines.append(
            f"| {row['what']} | {bar.show(row['value'])} | {bar.show(row['gpu_bar'])} | {row['gpu_reached']} | "
            f"{bar.show(row['cpu_bar'])} | {row['cpu_reached']} | {row['note']} |"
        )
    return "\n".join(lines) + "\n"
