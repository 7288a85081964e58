"""Every data group composes and instantiates as it is typed, and every mistake gets one helpful answer."""

import inspect
import logging
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import pytest
from omegaconf import OmegaConf
from PIL import Image

from hiperlab.data.concept import Concept, fill
from hiperlab.data.dataset import DataSet, default_placeholder, file_name
from hiperlab.data.dreambooth import read_classes
from hiperlab.data.prompts import UNRELATED, load_prompts, unrelated_to
from hiperlab.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
CLASSES = (
    "Classes\n\nsubject_name,class\ncat2,cat\nwolf_plushie,stuffed animal\n\n"
    "Prompts\n\nprompt_list = [\n'a {0}, {1}'\n]\n"
)


def load(group: str, *overrides: str) -> DataSet:
    """What `data=<group> data.key=value ...` gives."""
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{group}.yaml"), OmegaConf.from_dotlist(list(overrides)))
    return hydra.utils.instantiate(config)


def photos(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40 + i, 30), (10 * i, 90, 60)).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture
def dreambooth(tmp_path: Path) -> Path:
    root = tmp_path / "dreambooth"
    photos(root / "cat2")
    photos(root / "wolf_plushie", 3)
    (root / "prompts_and_classes.txt").write_text(CLASSES)
    return root


def merged(path: Path) -> Any:
    """A yaml file over those its defaults list names, as Hydra merges them."""
    config: Any = OmegaConf.load(path)
    below = [merged(CONF / f"{name}.yaml") for name in config.pop("defaults", []) if name != "_self_"]
    return OmegaConf.merge(*below, config)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_yaml_and_loader_name_the_same_settings(path: Path) -> None:
    """The first line describes, the target is in this room, every argument is in the yaml and has no other default.

    What all loaders of a kind take, a loader takes as one named value, so that its own arguments are few.
    """
    assert path.read_text().startswith("# ")
    config = merged(path)
    assert config._target_.startswith("hiperlab.data.")
    loader = hydra.utils.get_method(config._target_)
    own = inspect.signature(loader).parameters.copy()
    own.pop("settings")
    (shared,) = get_args(get_type_hints(loader)["settings"])
    assert {*own, *get_type_hints(shared)} == {k for k in config if not k.startswith("_")}
    assert all(p.default is p.empty for p in own.values()) and len(own) <= 6


def test_folder_of_own_photographs(tmp_path: Path) -> None:
    photos(tmp_path / "My cat")
    data = load("folder", f"dir={tmp_path / 'My cat'}")
    (concept,) = data.concepts
    assert (concept.name, concept.placeholder, concept.word) == ("My-cat", "<my-cat>", "object")
    assert [v.size for v in concept.views] == [(40, 30), (41, 30)] and concept.sources == ("0.jpg", "1.jpg")
    assert concept.prompts == load_prompts("neti") and len(concept.templates) == 27 and concept.note == ""
    assert (data.crop, data.flip) == (None, None)
    named = load("folder", f"dir={tmp_path / 'My cat'}", "name=tom", "placeholder=<tom>", "word=cat", "max_views=1")
    assert (named.concepts[0].name, named.concepts[0].placeholder, named.concepts[0].word) == ("tom", "<tom>", "cat")
    assert len(named.concepts[0].views) == 1


def test_sub_folders_as_concepts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photos(tmp_path / "set" / name)
    data = load("folder", f"dir={tmp_path}/set", "concepts=[b,a]", "word=[cat,dog]", "placeholder=[<x>,<y>]")
    assert [(c.name, c.placeholder, c.word) for c in data.concepts] == [("b", "<x>", "cat"), ("a", "<y>", "dog")]
    assert [c.name for c in load("folder", f"dir={tmp_path}/set", "concepts=a").concepts] == ["a"]
    assert [c.word for c in load("folder", f"dir={tmp_path}/set", "concepts=[a,b]", "word=cat").concepts] == ["cat"] * 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dir=null"], "data.dir is missing"),
        (["dir={root}/sett"], "Did you mean set"),
        (["dir={root}/nowhere/at/all"], "does not exist"),
        (["dir={root}/set/a/0.jpg"], "is a file"),
        (["dir={root}/set"], r"sub-folders do: a, b\. Use data\.dir=.*set/a for one, or data\.concepts=\[a,b\]"),
        (["dir={root}/empty"], "holds no picture"),
        (["dir={root}/set", "concepts=[a,c]"], "names 'c', which is no sub-folder"),
        (["dir={root}/set", "concepts=[../set/a]"], "no sub-folder"),
        (["dir={root}/set", "concepts=[a,a]"], "the name 'a'"),
        (["dir={root}/set", "concepts=[a,b]", "placeholder=<x>"], "the placeholder '<x>'"),
        (["dir={root}/set", "concepts=[a,b]", "word=[cat]"], "1 entries for 2 concepts"),
        (["dir={root}/set", "concepts=[a,b]", "name=c"], "exclude each other"),
        (["dir={root}/set/a", "name=a/b"], "cannot be a file name"),
        (["dir={root}/set/a", "placeholder=two words"], "one word without spaces"),
        (["dir={root}/set/a", "word="], "no class word"),
        (["dir={root}/set/a", "property=objekt"], "Did you mean object"),
        (["dir={root}/set/a", "prompts=netti"], "Did you mean neti"),
        (["dir={root}/set/a", "prompts=[a cat]"], "lacks"),
        (["dir={root}/set/a", "class_noun=promts"], "Did you mean prompts"),
        (["dir={root}/set/a", "flip=2"], "data.flip=2 is no probability"),
        (["dir={root}/set/a", "on_bad_image=ignore"], "stop or skip"),
    ],
)
def test_mistakes_are_answered(tmp_path: Path, overrides: list[str], said: str) -> None:
    for name in ("a", "b"):
        photos(tmp_path / "set" / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match=said) as error:
        load("folder", *(o.replace("{root}", str(tmp_path)) for o in overrides))
    assert isinstance(error.value if isinstance(error.value, UserError) else error.value.__cause__, UserError)


def test_dreambooth_layout(dreambooth: Path) -> None:
    (cat,) = load("dreambooth", f"dir={dreambooth}", "subject=cat2").concepts
    assert (cat.name, cat.placeholder, cat.word, len(cat.views)) == ("cat2", "<cat2>", "cat", 2)
    assert cat.prompts == load_prompts("dreambooth_live")
    both = load("dreambooth", f"dir={dreambooth.parent}/dreambooth", "concepts=[wolf_plushie,cat2]").concepts
    assert [(c.word, len(c.views)) for c in both] == [("stuffed animal", 3), ("cat", 2)]
    assert both[0].prompts == load_prompts("dreambooth_object")
    one_up = dreambooth.parent / "repository"
    one_up.mkdir()
    dreambooth.rename(one_up / "dataset")
    assert load("dreambooth", f"dir={one_up}", "subject=cat2").concepts[0].name == "cat2"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["subject=cat3"], "Did you mean cat2"),
        ([], "data.subject is missing.* Choices: cat2, wolf_plushie"),
        (["subject=cat2", "concepts=[cat2]"], "exclude each other"),
        (["subject=gone"], "no folder of that name"),
        (["subject=cat2", "dir={root}/cat2"], "has no prompts_and_classes.txt"),
    ],
)
def test_dreambooth_mistakes(dreambooth: Path, overrides: list[str], said: str) -> None:
    (dreambooth / "prompts_and_classes.txt").write_text(
        CLASSES.replace("cat2,cat", "cat2,cat\ngone,toy") if "subject=gone" in overrides else CLASSES
    )
    with pytest.raises(Exception, match=said):
        load("dreambooth", f"dir={dreambooth}", *(o.replace("{root}", str(dreambooth)) for o in overrides))


def test_class_noun(dreambooth: Path) -> None:
    def texts(choice: str) -> Concept:
        return load("dreambooth", f"dir={dreambooth}", "subject=cat2", f"class_noun={choice}").concepts[0]

    assert texts("none").prompts[0] == "a {} in the jungle" and texts("none").templates[0] == "a photo of a {}"
    assert (
        texts("prompts").prompts[0] == "a {} cat in the jungle" and texts("prompts").templates[0] == "a photo of a {}"
    )
    assert texts("all").templates[0] == "a photo of a {} cat"


def test_the_released_data_set() -> None:
    """Our shipped prompts are those of the released file; skipped where the data set is not there."""
    root = CONF.parents[1].parent / "shared" / "data" / "dreambooth"
    if not root.is_dir():
        pytest.skip(f"no DreamBooth data set at {root}")
    classes = read_classes(root / "prompts_and_classes.txt")
    assert len(classes) == 30 and sum(w in ("cat", "dog") for w in classes.values()) == 9
    released = re.findall(r"'(.*)'\.format", (root / "prompts_and_classes.txt").read_text())
    shipped = load_prompts("dreambooth_object") + load_prompts("dreambooth_live")
    assert [p.replace("{0} {1}", "{}") for p in released] == list(shipped)
    data = load("dreambooth", f"dir={root}", "concepts=[cat2,teapot]")
    assert [(c.name, c.word) for c in data.concepts] == [("cat2", "cat"), ("teapot", "teapot")]


def test_names_made_from_folders() -> None:
    assert [file_name(n) for n in ("My cat", "..", "élan", "-a-", "cat_2.v1")] == [
        "My-cat",
        "concept",
        "lan",
        "a",
        "cat_2.v1",
    ]
    assert default_placeholder("Cat2") == "<cat2>"


def test_fill_leaves_other_braces_alone() -> None:
    assert fill("a {} with {curly} and {}", "<x>") == "a <x> with {curly} and <x>"


def test_skip_is_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos(tmp_path / "a") / "bad.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(load("folder", f"dir={tmp_path}/a", "on_bad_image=skip").concepts[0].views) == 2
    assert "bad.jpg" in caplog.text


def test_held_out_pictures_are_the_last_ones_or_a_folder(tmp_path: Path) -> None:
    root, other = photos(tmp_path / "a", 5), photos(tmp_path / "b", 2)
    (whole,) = load("folder", f"dir={root}").concepts
    (some,) = load("folder", f"dir={root}", "held_out=2").concepts
    assert (some.sources, len(some.held_out)) == (("0.jpg", "1.jpg", "2.jpg"), 2) and len(whole.held_out) == 0
    assert [each.size for each in some.held_out] == [each.size for each in whole.views[3:]]
    (few,) = load("folder", f"dir={root}", "held_out=2", "max_views=1").concepts
    assert (few.sources, few.held_out[0].size) == (("0.jpg",), whole.views[1].size)
    (named,) = load("folder", f"dir={root}", f"references={other}").concepts
    assert len(named.views) == 5 and len(named.held_out) == 2
    both = load("folder", f"dir={tmp_path}", "concepts=[a,b]", f"references=[{other},null]").concepts
    assert [len(each.held_out) for each in both] == [2, 0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["held_out=5"], "data.held_out=5 leaves no picture of a to train on: there are 5. Hold out 4 at most"),
        (["held_out=-1"], "data.held_out=-1 is no number of pictures"),
        (["references=nowhere"], "data.references=nowhere does not exist"),
        (["references={root}", "held_out=1"], "exclude each other: add data.held_out=0"),
        (["references=[{root},{root}]"], "data.references has 2 entries for 1 concepts"),
    ],
)
def test_mistakes_with_held_out_pictures(tmp_path: Path, overrides: list[str], said: str) -> None:
    root = photos(tmp_path / "a", 5)
    with pytest.raises(Exception) as caught:
        load("folder", f"dir={root}", *(each.replace("{root}", str(root)) for each in overrides))
    assert said in str(caught.value)


def test_unrelated_prompts_do_not_name_the_class_noun() -> None:
    assert len(unrelated_to("dog")) == len(UNRELATED) == len(unrelated_to("art")), "no word of them is 'art'"
    assert "a photo of a red bicycle leaning against a brick wall" not in unrelated_to("Bicycle")
    assert not any("{}" in text for text in UNRELATED)
