"""Whether the disk has room for what a run will write, asked before training begins."""

from __future__ import annotations

import logging

from hiperlab import files
from hiperlab.base.method import Method
from hiperlab.errors import UserError, human_bytes
from hiperlab.run.session import Session

log = logging.getLogger(__name__)
COPIES = 3  # of each trained number in a checkpoint: itself and what Adam keeps for it; no optimizer here keeps more
KEPT = 3  # checkpoints at a time: the newest two, and the next one while it is written


def check_space(session: Session, method: Method) -> None:
    """Compare what the run folder will hold with what is free there.

    Args:
        session: the run.
        method: as built for one group of concepts; the other groups write as much again.

    Raises:
        UserError: it will not fit.
    """
    parts = needed_bytes(session, method)
    there = sum(path.stat().st_size for path in session.folder.rglob("*") if path.is_file())  # of an earlier attempt
    needed, free = max(0, sum(parts.values()) - there), files.free_bytes(session.folder)
    log.debug("%s needs about %s, %s are free", session.folder, human_bytes(needed), human_bytes(free))
    if needed > free:
        told = ", ".join(f"{name} {human_bytes(count)}" for name, count in parts.items() if count)
        raise UserError(
            f"{session.folder} needs about {human_bytes(needed)} ({told}), {human_bytes(free)} are free there. "
            "Make room, choose another outputs_dir, or keep less (fit.keep_checkpoints=false, fewer sample.seeds)."
        )


def needed_bytes(session: Session, method: Method) -> dict[str, int]:
    """Bytes by kind, at most: checkpoints, artifacts, those of the best scores, pictures."""
    cfg, groups = session.cfg, len(session.groups)
    trained = groups * sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    every = cfg.fit.checkpoint_every
    count = cfg.fit.steps // every + 1 if cfg.fit.keep_checkpoints and every else KEPT
    prompts = sum(len(concept.prompts[: cfg.sample.prompts]) for concept in session.data.concepts)
    pictures = prompts * len(cfg.sample.seeds) * len(method.variants)
    pictures += len(session.data.concepts) * cfg.sample.unrelated * (len(method.variants) + 1)  # and the frozen model's
    return {
        "checkpoints": count * COPIES * trained if cfg.fit.steps else 0,
        "artifacts": 2 * trained,  # and a second time in other tools' formats
        "best artifacts": count * trained if cfg.monitor is not None else 0,  # each checkpoint may have its own
        "pictures": pictures * 3 * cfg.model.size**2 if "sample" in cfg.stages else 0,
    }
