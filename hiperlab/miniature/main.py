"""The command line of the training: composed by Hydra from conf/miniature, checked in seconds, then stage after stage.

Exit codes as hiperlab.run's: 0 done, 2 a mistake in what was asked (one line), 130 Ctrl-C, 143 SIGTERM (saved).
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hiperlab import files
from hiperlab.cli.compose import Request, compose, open_hydra
from hiperlab.cli.flags import arguments, show, shows
from hiperlab.cli.help import top_keys
from hiperlab.cli.process import config_dir, guarded
from hiperlab.errors import UserError, near

MODULES = {  # stage -> module with its `work`
    "data": "pictures",
    **{name: name for name in ("latents", "unet", "decoder", "recoded", "identity", "reader", "scorer")},
    "export": "export",
    "report": "report",
}
USAGE = """\
Train the miniature Stable Diffusion on the procedural world.

usage: python -m hiperlab.miniature [preset=gpu|cpu|smoke] [stages=[…]] [budget_minutes=…] [out=…] [key=value …]

  python -m hiperlab.miniature preset=gpu out=outputs/miniature/gpu             every stage, one folder out
  python -m hiperlab.miniature preset=cpu stages=[data,latents,decoder,export]  one part trained on
  python -m hiperlab.miniature stages=[report] report.folder=<folder>           measure an exported miniature
  python -m hiperlab.miniature --cfg job                                 show the config

Finished stages are not done again; a stopped one goes on where it was. What no stage trains (tokenizer, encoder,
picture tower) comes from the miniature named by `base`.

settings:"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line says; returns the exit code."""
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:

    args = arguments(argv)
    conf = Path(args.config_path) if args.config_path else config_dir() / "miniature"
    if args.help:
        listed = [f"  {key:<28} {comment}".rstrip() for key, comment in top_keys(conf / "train.yaml")]
        with suppress(BrokenPipeError):  # `--help | head`
            print("\n".join([USAGE, *listed]), flush=True)
        return 0
    if args.multirun:
        raise UserError("the training of the miniature is no sweep: leave -m out.")
    extra = Path(args.config_dir) if args.config_dir else None
    request = Request(conf, extra, args.config_name or "train", list(args.overrides))
    try:
        hydra = open_hydra(request)
        if shows(args):
            return show(hydra, request, args)
        settings = plain(compose(hydra, request, request.overrides))
    finally:
        GlobalHydra.instance().clear()
    return run(settings, shlex.join(["python", "-m", "hiperlab.miniature", *argv]))


def plain(cfg: Any) -> dict[str, Any]:
    """The composed config as plain values.

    Raises:
        UserError: a value is missing or cannot be resolved.
    """
    with open_dict(cfg):
        cfg.pop("hydra", None)
    try:
        settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The config does not resolve: {' '.join(str(error).split())}") from None
    return settings


def check(settings: dict[str, Any]) -> list[str]:
    """Refuse wrong values before torch is imported; returns the stages in their order.

    Raises:
        UserError: one line about the first wrong value.
    """
    size, seed, minutes = settings["size"], settings["seed"], settings["budget_minutes"]
    if not isinstance(size, int) or size % 64 or not 64 <= size <= 512:
        raise UserError(f"size={size}: expected 64, 128, 192, … 512 (the U-Net halves the latents three times).")
    small = settings["reading_size"]
    if not isinstance(small, int) or small < 32 or size % small:
        raise UserError(f"reading_size={small}: expected a divisor of size={size}, at least 32.")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed={seed}: expected a whole number, 0 or more.")
    if minutes is not None and (isinstance(minutes, (str, bool)) or minutes <= 0):
        raise UserError(f"budget_minutes={minutes}: expected null or a positive number of minutes.")
    if settings["device"] not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device={settings['device']}: no such device.{near(str(settings['device']), ['auto', 'cpu', 'cuda'])}"
        )
    for stage in MODULES:
        fit = settings[stage].get("fit")
        if fit and (not isinstance(fit["steps"], int) or fit["steps"] < 1 or fit["batch"] < 1):
            raise UserError(f"{stage}.fit.steps={fit['steps']}, batch={fit['batch']}: expected whole numbers from 1.")
    from hiperlab.miniature.plan import check_stages

    return check_stages(settings["stages"])


def run(settings: dict[str, Any], command: str) -> int:
    """Do the stages of a composed config."""
    stages = check(settings)
    import torch

    from hiperlab.miniature.plan import Workshop, run_stage, share_budget

    shop = Workshop(
        out=Path(settings["out"]).expanduser(),
        base=_base(settings["base"]),
        seed=settings["seed"],
        size=settings["size"],
        reading_size=settings["reading_size"],
        device=_device(settings["device"]),
        bf16=settings["bf16"],
        compile=settings["compile"],
        cache_pictures=settings["cache_pictures"],
        resume=settings["resume"],
        say_every=settings["say_every"],
        command=command,
        settings=settings,
    )
    _quiet()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if shop.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    each = share_budget({name: settings[name] for name in MODULES}, stages, settings["budget_minutes"])
    with files.RunLock(shop.out), shop.signals:
        for name in stages:
            shop.signals.check("stopped between two stages")
            did = run_stage(shop, name, each[name], _work(name))
            print(f"hiperlab: {name}: {_line(shop, name)}{'' if did else '  (done before)'}", flush=True)
    return 0


def _base(named: str) -> Path:
    """The folder of the miniature to start from.

    Raises:
        UserError: it is none.
    """
    folder = files.expand(named)
    if not (folder / "model_index.json").is_file() or not (folder / "card.json").is_file():
        raise UserError(f"base={named} is no exported miniature: it has no model_index.json or no card.json.")
    return folder


def _quiet() -> None:
    """Lightning's banner before every stage and bars over one-file loads would bury the stages' own lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*deprecated",
        ".*Tensor Cores.*",
        ".*does not have many workers.*",
        ".*in eval mode at the start.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def _device(wanted: str) -> Any:
    """The device to train on.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here. Use preset=cpu, or device=cpu.")
    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def _work(stage: str) -> Callable[..., dict[str, Any]]:
    """The function of a stage; its libraries are imported only now."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return importlib.import_module(f"hiperlab.miniature.{MODULES[stage]}").work


def _line(shop: Any, stage: str) -> str:
    """One line about a stage's outcome."""
    from hiperlab.miniature import record

    found = record.read(shop.folder(stage)) or {}
    parts = [str(found.get("status"))]
    if "steps" in found:
        parts.append(f"{found['steps']} steps")
    if "seconds" in found:
        parts.append(f"{found['seconds'] / 60:.1f} min")
    return ", ".join(parts) + f"; check {found.get('check')}"
