"""Templates and prompt lists are the published ones; a list that cannot show the concept is refused."""

import re
from pathlib import Path

import pytest

from hiperlab.data.prompts import load_prompts, prompt_lists, with_class
from hiperlab.data.templates import templates
from hiperlab.errors import UserError


def test_template_counts() -> None:
    """The authors' counts (NeTI's constants.py): 27 templates, all different; 19 of style, of which 17 differ."""
    thing, style = templates("object"), templates("style")
    assert (len(thing), len(set(thing))) == (27, 27)
    assert (len(style), len(set(style))) == (19, 17)
    assert all(t.count("{}") == 1 and t.endswith(" {}") for t in thing + style)
    assert all(t.endswith(" in the style of {}") for t in style)
    with pytest.raises(UserError, match="Did you mean object"):
        templates("objekt")


@pytest.mark.parametrize(
    ("name", "count"), [("neti", 15), ("neti_validation", 4), ("dreambooth_object", 25), ("dreambooth_live", 25)]
)
def test_shipped_lists(name: str, count: int) -> None:
    prompts = load_prompts(name)
    assert len(prompts) == len(set(prompts)) == count
    assert all(p.count("{}") == 1 and re.fullmatch(r"[A-Za-z {}]+", p) for p in prompts)


def test_every_shipped_list_loads_and_says_its_source() -> None:
    assert {"neti", "neti_validation", "dreambooth_object", "dreambooth_live"} <= set(prompt_lists())
    for name, text in prompt_lists().items():
        assert load_prompts(name) and text.startswith("# ")


def test_the_dreambooth_lists_share_what_they_should() -> None:
    """Ten places and five looks are common to both; clothes are for pets, more places for things."""
    assert len(set(load_prompts("dreambooth_live")) & set(load_prompts("dreambooth_object"))) == 15
    assert "a {} wearing a santa hat" in load_prompts("dreambooth_live")


def test_own_file_and_own_list(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\ufeff# mine\n\n  a {} on the moon \n{} as a knight\n", encoding="utf-8")
    assert load_prompts(str(file)) == ("a {} on the moon", "{} as a knight")
    assert load_prompts(["a {}"]) == ("a {}",)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Did you mean neti"):
        load_prompts("netti")
    file = tmp_path / "mine.txt"
    file.write_text("a cat\na {}\na dog\n")
    with pytest.raises(UserError, match=r"'a cat' \(and 1 more\) .* lacks '\{\}'"):
        load_prompts(str(file))
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no prompt"):
        load_prompts(str(file))
    file.write_bytes(b"caf\xe9 {}")
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts(str(file))


def test_with_class() -> None:
    assert with_class(["a {} in the snow", "{} and {}"], "cat") == ("a {} cat in the snow", "{} cat and {} cat")
