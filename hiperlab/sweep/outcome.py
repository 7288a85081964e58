"""What a sweep is: named jobs in one folder, what became of each, and the table at the end.

Layout: `<outputs_dir>/sweeps/<sweep>/<job>/` are run folders, `.jobs/<command>/<job>.json` says what became of each
(two commands may be at work in one folder), and `sweep.json` is the table of the last command. Names come from the
overrides alone: the same command finds its own work.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override

from hiperlab import files
from hiperlab.cli.overrides import parse, without
from hiperlab.cli.run_dir import results
from hiperlab.errors import UserError

INVOCATION = "HIPERLAB_SWEEP_INVOCATION"  # tells this command's jobs from those of earlier commands in the same sweep
# These do not make another job: same folder, more done.
UNNAMED = ("sweep", "resume", "stages", "outputs_dir", "run_dir", "fold")
DONE = ("finished", "skipped")


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Args:
        job: its name, also its folder's.
        overrides: its own overrides, resolved.
        status: finished | skipped (was finished before) | failed | stopped | not started.
        seconds: wall time of this command's attempt.
        folder: its run folder.
        error: the last error line, "" when there is none.
        objective: what the job reported for optimisers.
        invocation: which command this belongs to.
    """

    job: str
    overrides: list[str]
    status: str
    seconds: float
    folder: str
    error: str = ""
    objective: float | None = None
    invocation: str = ""


def digest(lines: Sequence[str]) -> str:
    """Eight hex digits that depend on the overrides, not on their order nor on what does not name a job."""
    text = "\n".join(sorted(without(lines, UNNAMED)))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _readable(text: str) -> str:
    """A few words safe as part of a folder name and of an override."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text).strip("-.")


def sweep_name(lines: Sequence[str], given: object) -> str:
    """The given name, checked, or the swept keys and a hash of all overrides.

    Raises:
        UserError: a name that is no plain folder name.
    """
    if given is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", str(given)):
            raise UserError(f"sweep={given}: expected a plain folder name of letters, digits and _ . + -")
        return str(given)
    swept = sorted(o.key_or_group.rpartition(".")[2] for o in parse(lines) if o.is_sweep_override())
    return f"{_readable('-'.join(swept))[:40] or 'sweep'}-{digest(lines)}"


def job_name(sweep_dir: Path, lines: Sequence[str], fixed: Sequence[str]) -> str:
    """`method-ti_seed-0_1a2b3c4d`: the swept values to read, the hash to be unique.

    Args:
        sweep_dir: a folder there that ends in the same hash keeps its name (the sweep may have swept other keys then).
        lines: the job's own overrides.
        fixed: keys that every job of the sweep shares, left out of the readable part.
    """
    code = digest(lines)
    existing = sorted(sweep_dir.glob(f"*_{code}"))
    if existing:
        return existing[0].name
    shown = [o for o in parse(without(lines, UNNAMED)) if o.key_or_group not in fixed and not o.is_delete()]
    text = "_".join(f"{o.key_or_group.rpartition('.')[2]}-{_short(o)}" for o in shown)
    return f"{_readable(text)[:60] or 'job'}_{code}"


def _short(override: Override) -> str:
    value = override.value()
    return f"{value:.4g}" if isinstance(value, float) else override.get_value_element_as_str()


def is_complete(folder: Path, stages: Sequence[str]) -> bool:
    """Whether the run in this folder finished, with at least these stages."""
    found = results(folder)
    if found.get("status") != "finished":
        return False
    return "stages" not in found or set(stages) <= set(found["stages"])


def objective(folder: Path) -> float | None:
    """The number a run reports for optimisers, if it reports a usable one."""
    value = results(folder).get("objective")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def record(sweep_dir: Path, outcome: Outcome) -> None:
    """Keep what became of a job; the launcher's process may be another than the one that prints the table."""
    known = {row.job: row for row in outcomes(sweep_dir, outcome.invocation)}
    if outcome.status == "skipped" and outcome.job in known:
        return  # an optimiser asked twice for the same point: the first answer tells more
    files.write_json(notes(sweep_dir, outcome.invocation) / f"{outcome.job}.json", asdict(outcome))


def outcomes(sweep_dir: Path, invocation: str) -> list[Outcome]:
    """What became of the jobs of one command, by name."""
    paths = sorted(notes(sweep_dir, invocation).glob("*.json"))
    return [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def notes(sweep_dir: Path, invocation: str) -> Path:
    """Where one command keeps what became of its jobs."""
    return sweep_dir / ".jobs" / (invocation or "one")


def labels(row: Outcome, fixed: Sequence[str]) -> dict[str, str]:
    """What was swept for this job, key by key as shown in tables."""
    swept = [o for o in parse(row.overrides) if o.key_or_group not in (*fixed, *UNNAMED) and not o.is_delete()]
    return {o.key_or_group: _short(o) for o in swept}


def table(rows: Sequence[Outcome], fixed: Sequence[str]) -> str:
    """Job, status, seconds, what was swept, folder and error, one line per job, and a summing-up."""
    lines = []
    for row in rows:
        own = [line for o, line in zip(parse(row.overrides), row.overrides) if o.key_or_group not in (*fixed, *UNNAMED)]
        lines.append([row.job, " ".join(own), row.status, f"{row.seconds:.0f}", row.folder, row.error[:160]])
    head = ["job", "overrides", "status", "seconds", "folder", "error"]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head) - 1)]
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip()
        for line in [head, *lines]
    ]
    counts = {status: sum(row.status == status for row in rows) for status in sorted({row.status for row in rows})}
    text.append(", ".join(f"{number} {status}" for status, number in counts.items()) or "no job was started")
    return "\n".join(text)
