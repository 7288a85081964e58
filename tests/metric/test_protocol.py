"""Protocols: the hash, the prompt cleaning, the shipped presets."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hiperlab.errors import UserError
from hiperlab.metric.contract import CLEANINGS, clean
from hiperlab.metric.protocol import Protocol
from tests.metric.conftest import CONF, load_protocol

PRESETS = sorted(path.stem for path in CONF.glob("*.yaml"))
HASHES = {  # of written-down numbers: another hash says that they may not be compared with new ones
    "customconcept101": "2cb6f65a3054",
    "dreambench_plus": "02dda2d61df0",
    "dreambooth": "4679191294e8",
    "dreambooth_full": "51fb57abc69b",
    "dti": "300d19cbeb7f",
    "edit": "fb2301631bf9",
    "edit_mini": "79eca30ea0df",
    "edit_twin": "a0df388a1ed7",
    "face": "4ed339aa23f9",
    "judge": "a5e7120b690f",
    "mini": "3f15f3b9e219",
    "mini_full": "d9b6b807b098",
    "mini_pictures": "ab82531ceeee",
    "mini_sets": "2926a02db493",
    "neti": "74b6ebde1c43",
    "pie_bench": "4a3a03c749cc",
    "stylediffusion": "b56036bb2921",
    "twin": "bfd3dfb5a89d",
}
OTHER = {"scale": "percent", "pairing": "max", "cleaning": "keep", "missing": "drop", "interpolation": "bilinear"}


def leaves(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all settings of a preset."""
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    return [path]


def changed(config: dict, path: tuple[str, ...]) -> dict:
    """The preset with another value at `path`."""
    config = copy.deepcopy(config)
    node = config
    for key in path[:-1]:
        node = node[key]
    old = node[path[-1]]
    if path[-1] == "encoder":
        new: Any = next(key for key in config["encoders"] if key != old)
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, list):
        new = [old[0] + 0.01, *old[1:]]
    elif isinstance(old, int):
        new = old + 1 if path[-1] != "crop" else old - 1
    else:
        new = OTHER.get(path[-1], f"{old}x")
    node[path[-1]] = new
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line describes it in --help"
    protocol = load_protocol(name)
    assert protocol.name == name and isinstance(protocol, Protocol)
    assert protocol.trained == (not name.endswith("twin"))
    assert {member.encoder for member in protocol.members.values()} == set(protocol.encoders)


def test_presets_keep_their_hashes() -> None:
    found = {name: load_protocol(name).hash for name in PRESETS}
    assert found == HASHES, "add a new preset's hash to HASHES; a changed one makes earlier numbers incomparable"
    assert len(set(HASHES.values())) == len(HASHES), "presets differ"


@pytest.mark.parametrize("name", ["twin", "dreambooth"])
def test_every_setting_changes_the_hash_except_the_place(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(config, dict)
    tried = 0
    for path in leaves(config):
        if path[-1] in ("_target_", "_convert_"):
            continue
        one = load_protocol(name, **changed(config, path))
        if path[-1] == "path":
            assert one.hash == load_protocol(name).hash
        else:
            assert one.hash != load_protocol(name).hash, path
            tried += 1
    assert tried > 15


def test_hash_is_the_same_in_another_process_and_order() -> None:
    here = load_protocol("dreambooth")
    code = (
        "from hydra.utils import instantiate; from omegaconf import OmegaConf; "
        f"p = instantiate(OmegaConf.load({str(CONF / 'dreambooth.yaml')!r})); print(p.hash)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == here.hash
    turned = Protocol(here.name, here.trained, here.encoders, dict(reversed(list(here.members.items()))))
    assert turned.hash == here.hash
    json.dumps(here.settings())


def test_the_protocol_is_cheap_to_make() -> None:
    code = "import sys, hiperlab.metric.protocol; print([m for m in ('open_clip', 'timm') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"members": {"clip_text": {"scale": "cosin"}}}, "scale=cosin is unknown. Did you mean cosine"),
        ({"members": {"clip_image": {"encoder": "clp"}}}, "encoder=clp is unknown. Did you mean clip"),
        ({"encoders": {"clip": {"preprocess": {"crop": 300}}}}, "crop <= resize"),
        ({"encoders": {"clip": {"preprocess": {"interpolation": "nearest"}}}}, "interpolation=nearest"),
    ],
)
def test_unknown_settings_are_named(change: dict, words: str) -> None:
    with pytest.raises(Exception) as caught:  # Hydra wraps what a constructor raises
        load_protocol("twin", **change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "cleaning", "expected"),
    [
        ("A photo of {} on a beach", "remove", "A photo of on a beach"),
        ("A photo of {} on a beach", "noun", "A photo of cat on a beach"),
        ("a {} cat in the jungle", "noun", "a cat in the jungle"),
        ("a {} cattle shed", "noun", "a cat cattle shed"),
        ("{} and {}", "noun", "cat and cat"),
        ("a <me> on the moon", "noun", "a cat on the moon"),
        ("a <me> on the moon", "remove", "a on the moon"),
        ("nothing of the kind", "noun", "nothing of the kind"),
    ],
)
def test_cleaning_by_hand(prompt: str, cleaning: str, expected: str) -> None:
    assert clean(prompt, "as sampled", "<me>", "cat", cleaning) == expected
    assert clean(prompt, "as sampled", "<me>", "cat", "keep") == "as sampled"


def test_the_noun_must_be_known() -> None:
    with pytest.raises(UserError, match="class noun"):
        clean("a {}", "a <me>", "<me>", "", "noun")


@given(st.text(max_size=20), st.sampled_from(["cat", "stuffed animal", "a+b", "\\d"]), st.sampled_from(CLEANINGS))
def test_no_placeholder_survives_cleaning(tail: str, word: str, cleaning: str) -> None:
    prompt = "a {} " + tail
    cleaned = clean(prompt, prompt.replace("{}", word), "<me>", word, cleaning)
    assert "{}" not in cleaned.replace(tail, "")
    assert cleaning == "remove" or word in cleaned


@pytest.mark.parametrize(
    ("cleaning", "wanted"),
    [
        ("noun", "a cat next to a dog"),
        ("remove", "a next to a dog"),
        ("keep", "a <tom> next to a <rex> dog"),
    ],
)
def test_texts_of_several_concepts_are_cleaned_of_each(cleaning: str, wanted: str) -> None:
    text = "a <tom> next to a <rex> dog"
    assert clean(text, text, ["<tom>", "<rex>"], ["cat", "dog"], cleaning) == wanted
