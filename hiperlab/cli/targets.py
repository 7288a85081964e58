"""Which `_target_` a config may name. A config may come from anywhere; what it imports may not.

Each key has a kind, and each kind a short list: a method may name a method, its optimizer an optimizer. Something of
hiperlab must be defined in the module that it names: what a module imports for itself is not for configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import hydra.utils

import hiperlab
from hiperlab.errors import UserError


class Kind(NamedTuple):
    """What some keys may name.

    Attributes:
        keys: pattern of the config keys.
        what: for messages.
        targets: pattern of the dotted names.
    """

    keys: re.Pattern[str]
    what: str
    targets: re.Pattern[str]


def _kind(keys: str, what: str, targets: str) -> Kind:
    return Kind(re.compile(keys), what, re.compile(targets))


KINDS = (  # the first that fits a key counts
    _kind(r"method", "a class of hiperlab.method", r"hiperlab\.method\.\w+\.[A-Z]\w*"),
    _kind(
        r"method\.(.+\.)?optimizer", "an optimizer of torch.optim or hiperlab.optim",
        r"torch\.optim\.[A-Z]\w*|hiperlab\.optim\.\w+\.[A-Z]\w*",
    ),
    _kind(
        r"method\..+", "a class of hiperlab.base, edit, layer or loss",
        r"hiperlab\.(base|edit|layer|loss)\.\w+\.[A-Z]\w*",
    ),
    _kind(r"data", "a loader, hiperlab.data.….load…", r"hiperlab\.data\.\w+\.load\w*"),
    _kind(r"model", "hiperlab.model.load.pretrained", r"hiperlab\.model\.(load\.pretrained|tiny\.tiny(_sdxl)?)"),
    _kind(r"sampler", "hiperlab.model.sampler.Sampler", r"hiperlab\.model\.sampler\.Sampler"),
    _kind(r"metric(\..+)?", "a class of hiperlab.metric", r"hiperlab\.metric(\.\w+)+\.[A-Z]\w*"),
    _kind(
        r"trainer\..+", "a strategy or plugin of pytorch_lightning",
        r"pytorch_lightning\.(strategies|plugins)(\.\w+)*\.[A-Z]\w*",
    ),
)  # fmt: skip
COMMANDS = re.compile(r"metric\.(.+\.)?command")  # keys of programs, which run only if the command line allows them
# Where all of these lie: Hydra 1.4 imports from nowhere else while a run is at work.
MODULES = (
    "hiperlab.method.*", "hiperlab.optim.*", "hiperlab.base.*", "hiperlab.edit.*", "hiperlab.layer.*",
    "hiperlab.loss.*", "hiperlab.data.*", "hiperlab.model.*", "hiperlab.metric.*", "torch.optim.*",
    "pytorch_lightning.strategies.*", "pytorch_lightning.plugins.*",
)  # fmt: skip
ROOM = Path(hiperlab.__file__).parent


def targets(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All (config key, target) pairs of a resolved config, depth first."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield path, str(value)
            else:
                yield from targets(value, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def commands(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All (config key, command line) pairs of programs that a resolved config would have run, depth first."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            yield from commands(each, f"{path}[{index}]")
    for key, value in node.items() if isinstance(node, dict) else ():
        here = f"{path}.{key}" if path else str(key)
        if COMMANDS.fullmatch(here) and value is not None:
            yield here, value if isinstance(value, str) else " ".join(map(str, value))
        else:
            yield from commands(value, here)


def is_allowed(key: str, target: str, extra: Sequence[str] = ()) -> bool:
    """Whether the node at `key` may instantiate a dotted name.

    Args:
        key: e.g. "method.optimizer".
        target: its `_target_`.
        extra: modules the user allowed on the command line (`allowed_targets=[mine]`); whole below their name.
    """
    if any(target.startswith(f"{name}.") for name in extra):
        return True
    kind = _kind_of(key)
    return kind is not None and bool(kind.targets.fullmatch(target)) and _is_defined(target)


def trusted(extra: Sequence[str] = ()) -> AbstractContextManager[Any]:
    """While inside, Hydra itself imports a config's names from the modules above alone; before Hydra 1.4 it cannot.

    Args:
        extra: see `is_allowed`.
    """
    whitelist = getattr(hydra.utils, "execution_whitelist", None)
    return nullcontext() if whitelist is None else whitelist([*MODULES, *(f"{name}.*" for name in extra)])


def _kind_of(key: str) -> Kind | None:
    return next((kind for kind in KINDS if kind.keys.fullmatch(key)), None)


def _is_defined(target: str) -> bool:
    """Whether something of hiperlab is defined in its module; looked up in the text, before anything is imported."""
    root, *rooms, name = target.split(".")
    if root != ROOM.name:
        return True
    file = ROOM.joinpath(*rooms).with_suffix(".py")
    return not file.is_file() or re.search(rf"^(class|def) {name}\b", file.read_text("utf-8"), re.M) is not None


def check_targets(config: Any, extra: Sequence[str], root: str = "") -> None:
    """Refuse the first target that its key may not name, and programs, before anything is imported.

    Args:
        config: a resolved config, or a part of one.
        extra: see `is_allowed`.
        root: key of the part, e.g. "method".

    Raises:
        UserError: names the key, the target, what is allowed and how to allow more.
    """
    for key, target in targets(config, root):
        if not is_allowed(key, target, extra):
            kind = _kind_of(key)
            raise UserError(
                f"{key}._target_={target} is not allowed: expected {kind.what if kind else 'no _target_ here'}. "
                f"If you trust it, add allowed_targets=[{target.split('.')[0]}]."
            )
    for key, command in commands(config, root):
        if command not in extra:
            raise UserError(
                f"{key} would run `{command}`. If you trust it, add 'allowed_targets=[\"{command}\"]' to this command."
            )
