"""A person's own photographs: one folder per concept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from hiperlab.data.dataset import ConceptSettings, ConceptSource, DataSet, data_set, file_name, folder_of, names_of
from hiperlab.data.images import OnBad, picture_files, read_folder
from hiperlab.errors import UserError, near

PROMPTS = "neti"  # evaluation prompts where the user names none


def load(
    dir: str | None,
    concepts: str | Sequence[str] | None,
    name: str | None,
    on_bad_image: OnBad,
    **settings: Unpack[ConceptSettings],
) -> DataSet:
    """Read the pictures in `dir` as one concept, or those in its sub-folders `concepts` as one concept each.

    Args:
        dir: folder of pictures, or of sub-folders of pictures together with `concepts`.
        concepts: names of sub-folders, or None.
        name: the concept's name (None: the folder's); sub-folders always give their own.
        on_bad_image: "stop" or "skip".
        settings: see `ConceptSettings`.

    Raises:
        UserError: nothing usable there; the message says what is there.
    """
    folder = folder_of(dir, "data.dir=photos/my_cat")
    folders, names = [folder], [name or file_name(folder.resolve().name)]
    if concepts:
        if name:
            raise UserError(f"data.name={name} and data.concepts exclude each other: sub-folders give their own names.")
        chosen = names_of(concepts)
        folders, names = [_sub_folder(folder, c) for c in chosen], [file_name(c) for c in chosen]
    elif not picture_files(folder):
        raise UserError(_nothing_here(folder))
    pairs = zip(folders, names, strict=True)
    return data_set(
        [ConceptSource(n, "", partial(read_folder, f, on_bad_image), PROMPTS) for f, n in pairs], **settings
    )


def _sub_folders(folder: Path) -> dict[str, Path]:
    """Visible sub-folders by name."""
    return {p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}


def _sub_folder(folder: Path, name: str) -> Path:
    """One of the sub-folders; only a listed name counts, so "../elsewhere" is refused like any other unknown one."""
    subs = _sub_folders(folder)
    if name not in subs:
        raise UserError(f"data.concepts names {name!r}, which is no sub-folder of {folder}.{near(name, subs)}")
    return subs[name]


def _nothing_here(folder: Path) -> str:
    """Why a folder without pictures cannot be used, and what is probably meant."""
    with_pictures = [name for name, path in _sub_folders(folder).items() if picture_files(path)]
    if not with_pictures:
        return f"data.dir={folder} holds no picture: put the photographs (e.g. .jpg, .png) there."
    listed = ", ".join(with_pictures[:20]) + (", …" if len(with_pictures) > 20 else "")
    return (
        f"data.dir={folder} holds no picture itself, but its sub-folders do: {listed}. "
        f"Use data.dir={folder / with_pictures[0]} for one, or data.concepts=[{','.join(with_pictures[:2])}]."
    )
