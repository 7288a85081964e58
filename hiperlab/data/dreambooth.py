"""The DreamBooth data set in its released layout: one folder per subject and prompts_and_classes.txt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from hiperlab.data.dataset import ConceptSettings, ConceptSource, DataSet, data_set, folder_of, names_of
from hiperlab.data.images import OnBad, read_folder
from hiperlab.errors import UserError, near

CLASSES_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")  # the release's live subjects; all others get the object prompts


def load(
    dir: str | None,
    subject: str | None,
    concepts: str | Sequence[str] | None,
    on_bad_image: OnBad,
    **settings: Unpack[ConceptSettings],
) -> DataSet:
    """Read one subject (`subject`) or several (`concepts`) of the released data set.

    The class noun is the released one ("stuffed animal") unless `word` says otherwise, the evaluation prompts are
    dreambooth_live for cats and dogs, else dreambooth_object, unless `prompts` does.

    Args:
        dir: the folder that holds prompts_and_classes.txt, or the one above ("dataset" in the authors' repository).
        subject: e.g. "cat2".
        concepts: several subjects; excludes `subject`.
        on_bad_image: "stop" or "skip".
        settings: see `ConceptSettings`.

    Raises:
        UserError: not this layout, unknown subject, unusable pictures.
    """
    root = _root(folder_of(dir, "data.dir=dreambooth/dataset"))
    classes = read_classes(root / CLASSES_FILE)
    names = _chosen(subject, concepts, classes)
    for name in names:
        if not (root / name).is_dir():
            raise UserError(f"{root} lists subject {name} but has no folder of that name: complete the download.")
    found = [
        ConceptSource(
            name,
            classes[name],
            partial(read_folder, root / name, on_bad_image),
            "dreambooth_live" if classes[name] in LIVE_CLASSES else "dreambooth_object",
        )
        for name in names
    ]
    return data_set(found, **settings)


def read_classes(path: Path) -> dict[str, str]:
    """Subject -> class noun, the lines "cat2,cat" between the headings Classes and Prompts.

    Raises:
        UserError: the file holds no such line.
    """
    classes: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() == "Prompts":
            break
        subject, comma, word = (part.strip() for part in line.partition(","))
        if comma and subject != "subject_name":
            classes[subject] = word
    if not classes:
        raise UserError(f"{path} lists no subject: expected lines like 'cat2,cat' below 'Classes', as released.")
    return classes


def _root(folder: Path) -> Path:
    """The folder that holds the list of classes."""
    for root in (folder, folder / "dataset"):
        if (root / CLASSES_FILE).is_file():
            return root
    raise UserError(
        f"data.dir={folder} has no {CLASSES_FILE}: name the released data set's folder, "
        "or use data=folder for pictures of your own."
    )


def _chosen(subject: str | None, concepts: str | Sequence[str] | None, classes: dict[str, str]) -> list[str]:
    """The subjects asked for, each a released one."""
    if subject and concepts:
        raise UserError(f"data.subject={subject} and data.concepts exclude each other: use one of them.")
    if not subject and not concepts:
        raise UserError(f"data.subject is missing, e.g. data.subject=cat2.{near('', classes)}")
    names = names_of(concepts if concepts else subject or "")
    for name in names:
        if name not in classes:
            raise UserError(f"DreamBooth has no subject {name!r}.{near(name, classes)}")
    return names
