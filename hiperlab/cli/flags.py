"""The flags of the command line: Hydra's own, of which some only show something."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser

from hiperlab.cli.compose import compose
from hiperlab.errors import UserError


def _fail(message: str) -> NoReturn:
    raise UserError(f"{message} (python -m hiperlab.run --help lists everything)")


def arguments(argv: list[str]) -> argparse.Namespace:
    """Hydra's own flags; a flag may stand anywhere among the overrides."""
    parser = get_args_parser()
    parser.error = _fail  # type: ignore[method-assign,assignment]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        raise UserError("--experimental-rerun reads pickled files, which may run anything. Use run_dir=<run folder>.")
    return args


def shows(args: argparse.Namespace) -> bool:
    """Whether a flag asks to print something instead of running."""
    return bool(args.cfg or args.info or args.hydra_help or args.shell_completion or args.resolve or args.package)


def show(hydra: Any, request: Any, args: argparse.Namespace) -> int:
    """Hydra's flags that print and do not run."""
    if args.multirun:
        raise UserError("-m runs a sweep and cannot be combined with a flag that only shows something.")
    if args.hydra_help:
        hydra.hydra_help(config_name=request.config_name, args_parser=get_args_parser(), args=args)
    elif args.shell_completion:
        hydra.shell_completion(config_name=request.config_name, overrides=request.overrides)
    elif args.info:
        hydra.show_info(args.info, config_name=request.config_name, overrides=request.overrides)
    elif args.cfg:
        composed = compose(hydra, request, request.overrides)
        hydra.compose_config = lambda **_: composed  # what it shows has the model's settings in it
        hydra.show_cfg(request.config_name, request.overrides, args.cfg, args.package, args.resolve)
    else:
        raise UserError("--resolve and --package go with --cfg job.")
    return 0
