"""The command line of the bench: read and checked in a second, then measured row by row.

Exit codes as hiperlab.run's: 0 done, 1 a failure (traceback), 2 a mistake in what was asked (one line), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiperlab.bench.plan import METHODS, RANDOM, plan
from hiperlab.bench.table import compared, read
from hiperlab.cli.arguments import Parser, names
from hiperlab.cli.process import guarded

EPILOG = """\
examples:
  python -m hiperlab.bench --model mini --methods ti,lora --baseline diffusers
  python -m hiperlab.bench --model sd15 --random --precision bf16 --json now.json
  python -m hiperlab.bench --model mini --methods ti,lora --concepts 1,4,16
  python -m hiperlab.bench --compare before.json now.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line says; returns the exit code."""
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.compare:
        before, now = (read(Path(name)) for name in args.compare)
        print(compared(before, now))
        return 0
    settings = (args.model, args.precision, args.random, [*_batch(args.batch), *args.overrides])
    jobs = plan(args.methods, *settings, args.concepts)  # before torch is imported: a wrong name is told at once
    baseline = plan(["ti"], *settings)[0] if args.baseline else None
    from hiperlab.bench.report import Amounts, measure

    amounts = Amounts(args.steps, args.warmup, args.pictures, args.sampler_steps, args.startup)
    measure(jobs, baseline, amounts, Path(args.json) if args.json else None)
    return 0


def _batch(size: int | None) -> list[str]:
    """The override for another batch than the published one; none without a size."""
    return [f"fit.batch_size={size}"] if size else []


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as values.

    Raises:
        UserError: a flag is unknown or its value of another kind.
    """
    parser = Parser("python -m hiperlab.bench", __doc__, EPILOG)
    add: Any = parser.add_argument
    add("--methods", type=names, default=list(METHODS), help=f"methods, joined by commas [{','.join(METHODS)}]")
    add("--model", default="tiny", help="a member of conf/model, such as tiny, mini or sd15 [tiny]")
    add(
        "--random", action="store_true", help=f"random weights in the model's real shape, no files: {', '.join(RANDOM)}"
    )
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="as hiperlab.run's [fp32]")
    add("--batch", type=_from(1), help="pictures a step [each method's published number]")
    add("--concepts", type=_numbers, default=[1], help="concepts that share each pass, such as 1,4,16 [1]")
    add(
        "--folded", action="store_true", help="each concept is a training of its own, as jobs of a sweep in one process"
    )
    add("--steps", type=_from(1), default=20, help="timed steps [20]")
    add("--warmup", type=_from(1), default=3, help="steps before them; pictures are encoded in the first [3]")
    add("--pictures", type=_from(0), default=2, help="pictures drawn at a time; 0 draws none [2]")
    add("--sampler-steps", type=_from(1), default=4, help="denoising steps of a picture [4]")
    add("--startup", type=_from(0), default=3, help="how often start-up is timed; 0 leaves it out [3]")
    add("--baseline", choices=("diffusers",), help="time Textual Inversion written with diffusers, too")
    add("--json", metavar="FILE", help="write every number there, anew after each row")
    add("--compare", nargs=2, metavar=("BEFORE", "NOW"), help="measure nothing: ratios of two such files")
    add("overrides", nargs="*", metavar="key=value", help="settings as hiperlab.run takes them, model.size=64")
    return parser.parse_intermixed_args(argv)


def _numbers(text: str) -> list[int]:
    """`1,4,16` as whole numbers from 1, without repeats."""
    return [_from(1)(name) for name in names(text)] or [1]


def _from(least: int) -> Any:
    """A reader of whole numbers that are at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return int(text)

    return number
