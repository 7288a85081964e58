"""What a result depends on besides its config: versions, code state, device, memory."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hiperlab

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "diffusers",
    "transformers",
    "torchmetrics",
    "open_clip_torch",
    "timm",
    "wandb",
    "safetensors",
    "accelerate",
    "numpy",
    "pillow",
    "matplotlib",
)


def environment() -> dict[str, Any]:
    """Plain values for environment.json. Holds no host, user or machine path."""
    return {
        "hiperlab": hiperlab.__version__,
        "git": git_state(Path(hiperlab.__file__).parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device_name(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": command(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether anything differs from it; None outside a repository or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    tracked = _git(folder, "ls-files", "--", "__init__.py")  # an installed copy may lie inside somebody's repository
    if not commit or not tracked:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def device_name() -> str:
    """The accelerator in words, or the processor."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)
    return f"cpu ({platform.processor() or platform.machine()})"


def command() -> str:
    """The command line as one would type it: the interpreter and the program without their folders."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:  # started with -m
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        program = [os.path.basename(sys.argv[0])] if sys.argv and sys.argv[0] else []
    return shlex.join(["python", *program, *sys.argv[1:]])


def peak_memory() -> dict[str, int]:
    """Most bytes in use so far: "process" (resident) and, with CUDA, "cuda" (allocated on this process's device).

    On Windows only the latter: its own count is not asked for.
    """
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kibibytes on Linux
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


class Room:
    """Room for things of about one size: together they may take a quarter of a device's free memory, the first all.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.free = free_memory(device)
        self.used = self.count = 0

    def take(self, size: int) -> None:
        """One more is there, of so many bytes."""
        self.used, self.count = self.used + size, self.count + 1

    @property
    def for_another(self) -> bool:
        """Whether one more of their mean size may be made."""
        return not self.count or self.used + self.used / self.count <= self.free / 4


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of a CPU's, what Linux says can be had, elsewhere half of all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        values = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(values["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 2**32


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
