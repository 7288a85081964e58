"""Evaluation prompts: the published lists shipped as text files, or a person's own file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hiperlab.data.concept import SLOT
from hiperlab.errors import UserError, near

# Everyday scenes of things that are seldom personalised; ours, for what should not have changed.
UNRELATED = (
    "a photo of a red bicycle leaning against a brick wall",
    "a photo of a bowl of fruit on a kitchen table",
    "a street with old houses after the rain",
    "an oil painting of a sailing ship at sea",
    "a photo of two people walking along a river",
    "a photo of a mountain lake at sunrise",
    "a watercolor painting of a lighthouse",
    "a photo of a plate of spaghetti",
    "a photo of a train standing at a station",
    "a pencil sketch of an old tree",
    "a photo of a bookshelf beside a window",
    "a photo of a horse on a green field",
)


def unrelated_to(word: str) -> tuple[str, ...]:
    """Texts about other things than a class noun, those of `UNRELATED` that name none of its words."""
    own = re.compile("|".join(rf"\b{re.escape(each)}s?\b" for each in word.split()), re.IGNORECASE)
    return tuple(text for text in UNRELATED if not own.search(text))


def prompt_lists() -> dict[str, str]:
    """Name -> text of every shipped list."""
    folder = files("hiperlab.data").joinpath("prompts")
    found = (f for f in folder.iterdir() if f.name.endswith(".txt"))
    return {f.name.removesuffix(".txt"): f.read_text(encoding="utf-8") for f in found}


def load_prompts(source: str | Sequence[str], key: str = "data.prompts") -> tuple[str, ...]:
    """The prompts of a list.

    Args:
        source: name of a shipped list ("neti"), path of a text file (one prompt per line, "#" starts a comment
            line), or the prompts themselves.
        key: the setting, for messages.

    Returns:
        prompts, each with the slot "{}".

    Raises:
        UserError: unknown name, unreadable file, no prompt, or prompts without "{}".
    """
    if not isinstance(source, str):
        return _checked(list(source), key)
    shipped = prompt_lists()
    if source in shipped:
        return _checked(_lines(shipped[source]), source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"prompt list {source!r} is neither a shipped list nor a file.{near(source, shipped)}")
    try:
        return _checked(_lines(path.read_text(encoding="utf-8-sig")), source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {source} cannot be read as UTF-8 text ({error}).") from error


def with_class(texts: Sequence[str], word: str) -> tuple[str, ...]:
    """Let the class noun follow the placeholder: "a {} in the snow" -> "a {} cat in the snow"."""
    return tuple(text.replace(SLOT, f"{SLOT} {word}") for text in texts)


def _lines(text: str) -> list[str]:
    """Prompts of a file: lines that are neither empty nor comments."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _checked(prompts: list[str], source: str) -> tuple[str, ...]:
    """Refuse an empty list and prompts that would not show the concept."""
    if not prompts:
        raise UserError(f"prompt list {source} holds no prompt: write one per line, with '{SLOT}' for the concept.")
    lacking = [prompt for prompt in prompts if SLOT not in prompt]
    if lacking:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise UserError(f"prompt {lacking[0]!r}{more} in {source} lacks '{SLOT}', the placeholder's slot: add it.")
    return tuple(prompts)
