"""Which `_target_` a config may name. A config may come from anywhere; what it imports may not.

Prefixes alone are not enough: `torch.os.system` begins with `torch.` and Hydra finds it by walking attributes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hiperlab.errors import UserError

ALLOWED = ("hiperlab", "torch", "diffusers", "transformers", "pytorch_lightning", "torchmetrics")
_CLASS = re.compile(r"[A-Z]\w*(\.from_(pretrained|config))?$")  # a class, or the way libraries load one


def targets(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All (config key, target) pairs of a resolved config, depth first."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield here, str(value)
            else:
                yield from targets(value, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def is_allowed(target: str, extra: Sequence[str] = ()) -> bool:
    """Whether a dotted name may be instantiated.

    Args:
        target: the `_target_` of a config node.
        extra: modules the user allowed on the command line (`allowed_targets=[mine]`); whole below their name.
    """
    if any(target.startswith(f"{name}.") for name in extra):
        return True
    root, *rest = target.split(".")
    if root not in ALLOWED or not rest:
        return False
    if any(part in sys.stdlib_module_names or not part.isidentifier() or part.startswith("_") for part in rest):
        return False
    return root == "hiperlab" or bool(_CLASS.match(_tail(rest)))


def _tail(parts: Sequence[str]) -> str:
    """`Class` or `Class.from_pretrained`, the part that names the callable."""
    return ".".join(parts[-2:]) if parts[-1].startswith("from_") else parts[-1]


def check_targets(config: Any, extra: Sequence[str]) -> None:
    """Refuse the first target outside the allowed list, before anything is imported.

    Raises:
        UserError: names the key, the target, what is allowed and how to allow more.
    """
    for key, target in targets(config):
        if not is_allowed(target, extra):
            raise UserError(
                f"{key}={target} is not allowed: expected something of hiperlab or a class of "
                f"{', '.join(ALLOWED[1:])}. If you trust it, add allowed_targets=[{target.split('.')[0]}]."
            )
