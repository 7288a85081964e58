"""The package's imports, read from its source: no circles, and late ones only where they spare something heavy."""

from __future__ import annotations

import ast
import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401 - as in a notebook

import hiperlab
from hiperlab.cli.process import collector_paused

ROOT = Path(hiperlab.__file__).parent
_ENTRY = re.compile(r"(hiperlab(?:\.\w+)+):\w+")  # "module:function", as an entry point is named
_FOLDER = re.compile(r"(hiperlab(?:\.\w+)+)\.")  # the head of f"hiperlab.miniature.{stage}"
# Libraries that are large or extras, and that most runs never need.
HEAVY = ("cv2", "matplotlib", "mlflow", "onnxruntime", "open_clip", "optuna", "peft", "timm", "trackio", "wandb")
HEAVY += ("diffusers.loaders", "hiperlab.world.draw", "pytorch_lightning.loggers")  # they load peft, skia, MLflow
# Loaded by nothing on the way to the first training step: what draws, scores, logs to W&B or compiles brings them.
UNUSED = ("cv2", "diffusers.pipelines.stable_diffusion", "onnxruntime", "open_clip", "optuna", "pandas", "scipy")
UNUSED += ("skia", "sklearn", "tensorboard", "timm", "torch._inductor.compile_fx", "torch.onnx", "wandb")
# What answers --help, --version or a mistake within a second: torch and the rooms above come in only when they run.
QUICK = ("hiperlab.cli.", "hiperlab.run.main", "hiperlab.sweep.", "hiperlab.miniature.main", "hiperlab.bench.main")


# Not on Windows: modules, and names of `os` and `signal`.
POSIX = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}
POSIX_NAMES = {"fork", "getpgid", "getuid", "killpg", "setsid", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2"}


class Import(NamedTuple):
    """One imported module, whole, where `late` says whether inside a function."""

    target: str
    line: int
    late: bool


def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = ["hiperlab", *file.relative_to(ROOT).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST, late: bool = False) -> Iterator[Import]:
    """All imports of a module, those of functions and those by name ("module:function") too; none for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute here"
            yield from (Import(f"{node.module}.{alias.name}", node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (entry := _ENTRY.fullmatch(node.value)):
            yield Import(entry[1], node.lineno, late=False)
        elif isinstance(node, ast.JoinedStr) and (folder := _folder(node)):
            yield Import(f"{folder}.*", node.lineno, late=False)
        yield from imports(node, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def _folder(text: ast.JoinedStr) -> str | None:
    """The package whose modules an f-string names, if that is what it does."""
    head = text.values[0]
    named = _FOLDER.fullmatch(head.value) if isinstance(head, ast.Constant) else None
    return named[1] if named else None


def graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the package's own modules it imports."""
    edges: dict[str, set[str]] = {}
    for name, tree in trees.items():
        targets = {each.target for each in imports(tree)}
        for package in [target.removesuffix("*") for target in targets if target.endswith("*")]:
            targets |= {each for each in trees if each.startswith(package) and not each.endswith("__main__")}
        # "hiperlab.files.expand" is a name in the module "hiperlab.files"
        found = {target if target in trees else target.rpartition(".")[0] for target in targets}
        edges[name] = found & trees.keys() - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or over others (strongly connected components)."""
    reached = {name: _reached(name, edges) for name in edges}
    groups = {frozenset(each for each in reached[name] if name in reached[each]) for name in edges}
    return sorted(sorted(group) for group in groups if group)


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """What a module imports, at any depth; itself only if a circle leads back."""
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += edges[name]
    return seen


def test_circles_are_found() -> None:
    """Two that need each other, one that leads there, and one on its own."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
    late = "def f():\n    import x.y\nif TYPE_CHECKING:\n    import z\n"
    by_name = "a = 'hiperlab.run.stages:main'\nb = f'hiperlab.run.{a}'"
    named = [Import("hiperlab.run.stages", 5, False), Import("hiperlab.run.*", 6, False)]
    assert list(imports(ast.parse(late + by_name))) == [Import("x.y", 2, True), *named]


def test_no_circles() -> None:
    """Counting imports inside functions and the one by name: a circle is a circle however late it closes."""
    assert circles(graph(modules())) == []


def test_late_imports_spare_something_heavy() -> None:
    """An import inside a function hides what a module needs: only to spare a heavy extra or to answer at once."""
    hidden = [
        f"{name}:{each.line}: {each.target}"
        for name, tree in modules().items()
        if not name.startswith(QUICK)
        for each in imports(tree)
        if each.late and not f"{each.target}.".startswith(tuple(f"{heavy}." for heavy in HEAVY))
    ]
    assert not hidden, "\n".join(hidden)


def loaded(code: str) -> set[str]:
    """All modules that a fresh process has once it ran `code`; it may say nothing on stderr, and a failure raises."""
    code += "\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.slow
def test_a_run_imports_only_what_trains() -> None:
    """Seconds of every start: torch, Lightning, diffusers and what these load; with nothing left for the collector."""
    run = loaded(
        "import gc\nfrom hiperlab.run.main import _job\n_job()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    floor = loaded("import hydra.main, torch, pytorch_lightning\nfrom diffusers import AutoencoderKL, DDPMScheduler")
    assert {"hiperlab.run.stages", "torch"} <= run
    ours = run - floor
    assert not ours & set(UNUSED)
    assert {name.partition(".")[0] for name in ours} - {name.partition(".")[0] for name in floor} <= {"hiperlab", "PIL"}


def test_the_collector_goes_on_where_torch_is_loaded() -> None:
    """In a notebook rubbish may wait that holds models: it must not be kept for good."""
    frozen = gc.get_freeze_count()
    with collector_paused():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs while a module is imported, but for what a `try` guards: its functions' bodies do not."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try):
            yield node
            yield from at_import(node)


def test_windows_can_import_everything() -> None:
    """Nothing that only POSIX has is needed to import a module."""
    needed = []
    for name, tree in modules().items():
        for node in at_import(tree):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names} & POSIX
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = {node.attr} & POSIX_NAMES if node.value.id in ("os", "signal") else set()
            else:
                continue
            needed += [f"{name}: {each}" for each in found]
    assert not needed, needed
