"""Compare finished runs: one page with tables, tests, figures and pictures, and the same for a paper.

Exit codes as hiperlab.run's: 0 done, 1 a failure (traceback), 2 a mistake in what was asked (one line), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hiperlab.cli.arguments import Parser, names
from hiperlab.cli.process import guarded
from hiperlab.errors import UserError, near

EPILOG = """\
It writes comparison.html (stands alone), .md, .tex (booktabs), .csv, .json and plots/ (PNG, SVG, PDF).
A run is named by its method and those settings that tell it from other runs of the method; seeds and data are pooled.

examples:
  python -m hiperlab.compare outputs/sweeps/my_sweep
  python -m hiperlab.compare outputs/sweeps --metrics clip_text,identity --baseline ti --out paper/comparison
  python -m hiperlab.compare outputs/sweeps/ledger outputs/sweeps/editors --claims published
  python -m hiperlab.compare outputs/ti_cats_mini outputs/neti_cats_mini --x clip_text --y dino --pictures all
"""
FETCHED = "wandb_runs"  # folder for what W&B keeps
_PICTURES = ("all", "none", "link")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the command line names; returns the exit code."""
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    args = arguments(argv)
    from hiperlab.compare.claims import PUBLISHED, read_claims
    from hiperlab.compare.runs import find  # only now: --help and mistakes need neither numpy nor matplotlib
    from hiperlab.compare.wandb_runs import download
    from hiperlab.compare.write import compare

    claims = read_claims(PUBLISHED if args.claims == "published" else Path(args.claims)) if args.claims else []
    paths = [Path(path) for path in args.paths]
    if args.wandb:
        kept = Path(args.out or ".") / FETCHED
        download(args.wandb, kept)
        paths.append(kept)
    folders = find(paths)
    if not folders:
        raise UserError(
            f"no run folder in {', '.join(args.paths)}: expected folders with a results.json, at any depth."
        )
    out = Path(args.out) if args.out else _beside(paths, folders)
    try:
        said = compare(folders, out, args.metrics, args.baseline, args.x, args.y, args.pictures, claims)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): choose another folder by --out.") from error
    with suppress(BrokenPipeError):  # `| head`: the files are written
        print(said, flush=True)
    return 0


def _beside(paths: Sequence[Path], folders: Sequence[Path]) -> Path:
    """In a single sweep's folder; else a new one here, the same for the same runs."""
    alone = len(paths) == 1 and paths[0].name != FETCHED
    if alone and all(folder.parent == paths[0].resolve() for folder in folders):
        return paths[0]
    joined = "-".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", path.resolve().name).strip("-.") for path in paths)[:50]
    digest = hashlib.blake2b("\n".join(map(str, sorted(folders))).encode(), digest_size=3).hexdigest()
    return Path(f"comparison-{joined}-{digest}")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as values.

    Raises:
        UserError: an option is unknown or its value of another kind.
    """
    parser = Parser("python -m hiperlab.compare", __doc__, EPILOG, allow_abbrev=False)
    add: Any = parser.add_argument
    add("paths", nargs="*", metavar="FOLDER", help="run folders, sweeps, or folders of these")
    add("--out", metavar="DIR", help="where to write [a single sweep's folder, else ./comparison-…]")
    add("--metrics", type=names, default=[], metavar="A,B", help="scores to show, joined by commas [all]")
    add("--baseline", metavar="METHOD", help="test all methods against this one [all pairs; in .tex the best]")
    add("--x", metavar="METRIC", help="score of the trade-off's horizontal axis [one of the text]")
    add("--y", metavar="METRIC", help="score of its vertical axis [one of the subject]")
    add(
        "--pictures",
        type=_pictures,
        default="300",
        metavar="N|all|none|link",
        help="pictures that are part of the page; link: shown from the run folders [300]",
    )
    add("--claims", metavar="published|FILE", help="ask the runs orderings: those of papers, or of a YAML file [none]")
    add("--wandb", metavar="ENTITY/PROJECT", help="runs that Weights & Biases keeps, too; without their pictures")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        name = unknown[0].partition("=")[0]
        raise UserError(f"{name} is no option of the comparison.{near(name, options)}")
    if not args.paths and not args.wandb:
        raise UserError("nothing to compare: name run folders or sweeps, such as outputs/sweeps/my_sweep.")
    return args


def _pictures(text: str) -> str:
    """A number of pictures, or a word."""
    if not text.isdecimal() and text not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"expected a number, {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}, got {text!r}"
        )
    return text
