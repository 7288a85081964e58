"""LoRA's own promises: files that diffusers and PEFT read back, files made elsewhere. Numbers: tests/parity."""

from __future__ import annotations

import copy
import json
import logging
from fractions import Fraction

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from hiperlab.base import artifact
from hiperlab.base.method import Step
from hiperlab.errors import UserError
from hiperlab.formats import lora as files
from hiperlab.formats import lora_diffusion
from hiperlab.method.lora import LoRA, modules_named, resized
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.offsets import LowRank, Offsets
from hiperlab.model.text import with_weights
from tests.composed import SUBJECTS, batch, build, train
from tests.pipeline import pipeline

CAT = SUBJECTS[0]
ZERO = torch.zeros(1, dtype=torch.long)


def fitted(stack, **changes) -> LoRA:
    """With offsets large enough to be seen in a prediction."""
    method = build("lora", stack, [CAT], **changes)
    assert isinstance(method, LoRA)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in [*method.down.values(), *method.up.values()]:
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return method.eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([400])


@torch.no_grad()
def ours(method, inputs, text="a photo of a <my-cat>"):
    return method.model.predict(*inputs, method.condition(Step([text], ZERO, ZERO)))


@torch.no_grad()
def theirs(pipe, inputs, text="a photo of a sks cat"):
    ids = pipe.tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
    return pipe.unet(*inputs, encoder_hidden_states=pipe.text_encoder(ids)[0], return_dict=False)[0]


def test_low_rank_by_hand() -> None:
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    changed = LowRank(down, up, 0.5).apply(torch.ones(2, 2))
    assert changed.tolist() == [[2.5, 4.0], [3.0, 5.0]]
    kernel = LowRank(torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1), 1.0).apply(torch.zeros(5, 3, 3, 3))
    assert kernel.shape == (5, 3, 3, 3) and kernel.unique().tolist() == [2.0]


def test_convolution_equals_two_convolutions() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(*s, generator=generator) for s in ((2, 3, 3, 3), (5, 2, 1, 1), (1, 3, 6, 6)))
    weight = LowRank(down, up, 1.0).apply(torch.zeros(5, 3, 3, 3))
    conv = torch.nn.functional.conv2d
    torch.testing.assert_close(conv(x, weight), conv(conv(x, down), up), atol=1e-4, rtol=1e-4)


def test_resizing_keeps_the_product() -> None:
    down, up = torch.randn(2, 3), torch.randn(5, 2)
    wider = resized(down, up, 4)
    assert wider[0].shape == (4, 3) and wider[1].shape == (5, 4)
    assert torch.equal(wider[1] @ wider[0], up @ down)


def test_different_strengths_are_different_offsets() -> None:
    down, up, keys = torch.ones(1, 2), torch.ones(2, 1), torch.zeros(1, 1, 77, 32)
    half, whole = (Offsets({"a": LowRank(down, up, scale)}) for scale in (0.5, 1.0))
    with pytest.raises(AssertionError, match="calls of their own"):
        concatenate([Conditioning(keys, offsets=half), Conditioning(keys, offsets=whole)])


@pytest.mark.parametrize("prompt", ["a <my-cat> on a sofa", "a <my-cat> cat on a sofa"])
def test_identifier_stands_before_the_noun_once(stack, prompt) -> None:
    method = build("lora", stack, [CAT])
    with torch.no_grad():
        states = method.condition(Step([prompt], ZERO, ZERO)).keys[0]
        torch.testing.assert_close(states, stack.encode_text(["a sks cat on a sofa"]), atol=1e-5, rtol=0)
    assert CAT.with_words("two <my-cat> cats", "sks cat") == "two sks cat cats"


def test_start_is_peft_gaussian(stack) -> None:
    method = build("lora", stack, [CAT], rank=8)
    assert all(not value.any() for value in method.up.values())
    values = torch.cat([value.detach().flatten() for value in method.down.values()])
    assert abs(float(values.std()) * 8 - 1) < 0.02 and abs(float(values.mean())) < 0.005


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_encoder": True, "alpha": 2.0},
        {"text_encoder": True, "alpha": 1.0, "rank": 3},
        {"targets": ["to_k"]},
        {
            "targets": ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
            "text_encoder": True,
            "text_targets": ["fc1"],
        },
        {"text_encoder": True, "text_targets": ["q_proj", "v_proj"]},
        {"targets": ["conv1", "conv2", "to_q"], "text_encoder": True, "text_targets": ["q_proj", "out_proj"]},
    ],
)
def test_files_are_read_back(stack, inputs, tmp_path, settings) -> None:
    """By diffusers' pipeline (two files), by PEFT, and by a method of other settings."""
    method = fitted(stack, **settings)
    text_encoder = bool(settings.get("text_encoder"))
    written = method.export(0, tmp_path, steps=1)
    assert [path.relative_to(tmp_path).as_posix() for path in written[:3]] == [
        "pytorch_lora_weights.safetensors", "my-cat.safetensors", "peft/adapter_model.safetensors",
    ]  # fmt: skip
    expected = ours(method, inputs)
    assert not torch.allclose(expected, theirs(pipeline(stack), inputs), atol=1e-2)
    for name in ("pytorch_lora_weights.safetensors", "my-cat.safetensors"):
        pipe = pipeline(stack)
        if name == "my-cat.safetensors" and settings.get("text_targets") == ["q_proj", "v_proj"]:
            with pytest.raises(ValueError, match="Could not automatically infer"):  # METHODS.md says so
                pipe.load_lora_weights(tmp_path, weight_name=name)
            continue
        pipe.load_lora_weights(tmp_path, weight_name=name)
        torch.testing.assert_close(theirs(pipe, inputs), expected, atol=1e-4, rtol=1e-4, msg=name)
    pipe = pipeline(stack)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "peft")
    if text_encoder:
        pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, tmp_path / "peft_text_encoder")
    torch.testing.assert_close(theirs(pipe, inputs), expected, atol=1e-4, rtol=1e-4)
    for path in written[:2]:
        other = build("lora", stack, [CAT], rank=7, alpha=3.5, targets=["ff.net.2"])
        other.load_foreign(0, path)
        torch.testing.assert_close(ours(other.eval(), inputs), expected, atol=1e-4, rtol=1e-4, msg=path.name)


def test_every_file_carries_alpha(stack, tmp_path) -> None:
    fitted(stack, alpha=2.0, text_encoder=True).export(0, tmp_path, steps=1)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = list(file.keys())
    assert header["unet.lora_alpha"] == header["text_encoder.lora_alpha"] == 2 and header["unet.r"] == 4
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0.self_attn.") for key in keys)
    kohya = load_file(tmp_path / "my-cat.safetensors")
    assert {float(value) for key, value in kohya.items() if key.endswith(".alpha")} == {2.0}
    assert {key.split("_")[1] for key in kohya} == {"unet", "te"}
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 2


def test_kohya_with_other_layers_and_ranks(stack, inputs, tmp_path, caplog) -> None:
    """As kohya trains it: feed-forward, 1x1 convolutions, two ranks; against the weights changed by hand."""
    generator = torch.Generator().manual_seed(1)
    block = "down_blocks.0.attentions.0"
    states, deltas = {}, {}
    for name, rank, alpha in ((f"{block}.proj_in", 2, 1.0), (f"{block}.transformer_blocks.0.ff.net.2", 3, 6.0)):
        weight = stack.unet.get_parameter(f"{name}.weight")
        more = (1,) * (weight.dim() - 2)
        down = 0.3 * torch.randn(rank, weight.shape[1], *more, generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], rank, *more, generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        states |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        deltas[f"{name}.weight"] = alpha / rank * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(states, tmp_path / "found.safetensors")
    method = build("lora", stack, [CAT])
    with caplog.at_level(logging.INFO):
        method.load_foreign(0, tmp_path / "found.safetensors")
    assert "rank 3, 2 U-Net and 0 text layers" in caplog.text
    changed = copy.deepcopy(stack)
    with torch.no_grad():
        for name, delta in deltas.items():
            changed.unet.get_parameter(name).add_(delta)
        expected = changed.predict(*inputs, Conditioning(stack.encode_text(["a photo of a sks cat"])[None]))
    torch.testing.assert_close(ours(method.eval(), inputs), expected, atol=1e-5, rtol=1e-5)


def test_text_encoder_offsets_train(stack) -> None:
    method = build("lora", stack, [CAT], text_encoder=True)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    train(method, 2)
    text = {key: value for key, value in method.up.items() if key.startswith("text/")}
    assert len(text) == 12 and all(bool(value.any()) for value in text.values())
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(method.negative_condition("", "", [0]).keys[0], stack.encode_text([""]))


def several(stack, count: int = 3, **changes) -> LoRA:
    """Several concepts, each with matrices of its own."""
    method = build("lora", stack, SUBJECTS[:count], **changes)
    assert isinstance(method, LoRA)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in [*method.down.values(), *method.up.values()]:
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return method.eval()


@pytest.mark.parametrize("text_encoder", [False, True])
def test_concepts_drawn_side_by_side_are_what_each_is_alone(stack, text_encoder, tmp_path) -> None:
    """Pictures, through guidance and each one's own text encoder; and its files."""
    together = several(stack, text_encoder=text_encoder)
    how = {"steps": 2, "guidance": 7.5, "negative": "blurry"}
    order = [2, 0, 1, 2]
    texts = [f"a <{SUBJECTS[number].name}> on a sofa" for number in order]
    pictures = together.sample(texts, [0, 1, 2, 3], concepts=order, **how)
    for row, number in enumerate(order):
        alone = build("lora", stack, [SUBJECTS[number]], text_encoder=text_encoder)
        alone.load_artifact(0, together.artifact(number))
        torch.testing.assert_close(alone.sample([texts[row]], [row], **how)[0], pictures[row], atol=2e-4, rtol=0)
        for method, index, folder in ((alone, 0, "alone"), (together, number, "together")):
            (tmp_path / f"{folder}{row}").mkdir()
            method.export(index, tmp_path / f"{folder}{row}", steps=1)
        one, other = (load_file(tmp_path / f"{f}{row}" / files.DIFFUSERS) for f in ("alone", "together"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert float((pictures[0] - pictures[3]).abs().max()) > 1e-2


def test_class_pictures_of_each_ones_noun(stack) -> None:
    """Concepts of two nouns share a step: each row has a class row of its own noun behind it."""
    method = build("lora", stack, SUBJECTS[:2], prior={"weight": 1.0, "count": 2, "steps": 1, "folder": None})
    rows = method.prepare_batch(batch(SUBJECTS[:2], [0, 1]))
    assert rows.prompts[4:] == ["a photo of cat"] * 2 + ["a photo of dog"] * 2
    for noun, part in (("cat", slice(4, 6)), ("dog", slice(6, 8))):
        alone = build("lora", stack, [s for s in SUBJECTS if s.word == noun],
                      prior={"weight": 1.0, "count": 2, "steps": 1, "folder": None})  # fmt: skip
        mine = alone.prepare_batch(batch(list(alone.concepts), [0, 1]))
        assert torch.equal(rows.pixels[part], mine.pixels[2:])


def test_files_of_other_ranks_and_layers_beside_one_another(stack, inputs, tmp_path) -> None:
    """Each is what it is alone, whatever the files before and after it hold."""
    kinds = ({"rank": 2, "targets": ["to_k"]}, {"rank": 8, "alpha": 4.0}, {"rank": 3, "text_encoder": True})
    for number, kind in enumerate(kinds):
        made = several(stack, 1, **kind)
        (tmp_path / str(number)).mkdir()
        made.export(0, tmp_path / str(number), steps=1)
    paths = [tmp_path / str(number) / files.DIFFUSERS for number in range(3)]
    together = build("lora", stack, SUBJECTS[:3]).eval()
    for number, path in enumerate(paths):
        together.load_foreign(number, path)
    for number, path in enumerate(paths):
        alone = build("lora", stack, [SUBJECTS[number]]).eval()
        alone.load_foreign(0, path)
        text = f"a <{SUBJECTS[number].name}>"
        with torch.no_grad():
            one = stack.predict(*inputs, alone.condition(Step([text], ZERO, ZERO)))
            many = stack.predict(*inputs, together.condition(Step([text], ZERO + number, ZERO)))
        torch.testing.assert_close(many, one, atol=1e-4, rtol=1e-4)


def test_strengths_are_variants(stack, inputs) -> None:
    method = fitted(stack, strength=[1.0, 0.5, 0.0])
    assert method.variants == ("strength=1.0", "strength=0.5", "strength=0.0")
    how = {"steps": 1, "guidance": 7.5}
    whole, none = (method.sample(["a <my-cat>"], [1], variant=f"strength={m}", **how) for m in ("1.0", "0.0"))
    assert torch.equal(whole, method.sample(["a <my-cat>"], [1], **how))
    bare = build("lora", stack, [CAT]).sample(["a <my-cat>"], [1], **how)
    torch.testing.assert_close(none, bare, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, bare, atol=1e-3)
    step = Step(["a <my-cat>"], ZERO, ZERO, samples=ZERO)
    changes = build("lora", stack, [CAT], strength=[0.2]).condition(step).offsets.changes.values()
    assert {change.scale for change in changes} == {1.0}, "training is at full strength"


def test_published_prompt_is_the_only_one(stack) -> None:
    method = build("lora", stack, [CAT], prior={"weight": 0.0})
    item = batch([CAT], [0, 1])._replace(prompts=["a <my-cat> here", "a <my-cat> there"])
    assert method.prepare_batch(item).prompts == ["a photo of <my-cat>"] * 2
    assert build("lora", stack, [CAT], template=None, prior={"weight": 0.0}).prepare_batch(item) is item


def test_artifact_carries_alpha_and_needs_its_identifier(stack, inputs, tmp_path) -> None:
    method, path = fitted(stack, alpha=2.0), tmp_path / "cat.safetensors"
    artifact.write(path, method, 0, {"identifier": "sks"}, steps=1)
    other = build("lora", stack, [CAT])
    artifact.load_into(other, 0, path)
    assert torch.equal(ours(other.eval(), inputs), ours(method, inputs)), "alpha is the artifact's, not the setting's"
    with pytest.raises(UserError, match=r"learnt with method\.identifier=sks, this run has zwx"):
        artifact.load_into(build("lora", stack, [CAT], identifier="zwx"), 0, path)


def test_identifier_of_several_tokens_is_noted(stack, caplog) -> None:
    with caplog.at_level(logging.INFO):
        build("lora", stack, [CAT])
        assert "identifier" not in caplog.text
        build("lora", stack, [CAT], identifier="sksksk")
    assert "method.identifier=sksksk is" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"unet.a.lora_A.weight": torch.ones(1, 2)}, "not one of a pair"),
        ({"unet.a.lora.down.weight": torch.ones(1, 2), "unet.a.weight": torch.ones(2, 1)}, "not one of a pair"),
        ({"lora_te2_a.lora_down.weight": torch.ones(1, 2)}, "SDXL"),
        ({"lora_unet_a.hada_w1_a": torch.ones(1, 2)}, "LoHa"),
        ({"lora_unet_a.dora_scale": torch.ones(1, 2)}, "DoRA"),
        ({"a.lora_A.weight": torch.full((1, 2), float("nan")), "a.lora_B.weight": torch.ones(2, 1)}, "NaN"),
        ({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}, "does not have"),
        ({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 3)}, "damaged or of another kind"),
        (
            {"conv_in.lora_A.weight": torch.ones(1, 7, 3, 3), "conv_in.lora_B.weight": torch.ones(32, 1, 1, 1)},
            "it is",
        ),
        ({"lora_unet_a.lora_down.weight": torch.ones(1, 2)}, "diffusers can convert"),
    ],
)
def test_other_files_are_named(stack, tmp_path, content, message) -> None:
    save_file(content, tmp_path / "found.safetensors")
    with pytest.raises(UserError, match=message):
        build("lora", stack, [CAT]).load_foreign(0, tmp_path / "found.safetensors")


def test_pickled_files_are_read_safely(stack, inputs, tmp_path) -> None:
    method = fitted(stack)
    method.export(0, tmp_path, steps=1)
    torch.save(load_file(tmp_path / "my-cat.safetensors"), tmp_path / "old.bin")
    other = build("lora", stack, [CAT])
    other.load_foreign(0, tmp_path / "old.bin")
    torch.testing.assert_close(ours(other.eval(), inputs), ours(method, inputs), atol=1e-5, rtol=1e-5)
    torch.save({"unet": Fraction(1, 2)}, tmp_path / "code.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        other.load_foreign(0, tmp_path / "code.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0, "alpha": 1}, "above 0"),
        ({"alpha": 0.0}, "above 0"),
        ({"targets": ["to_x"]}, "no layer's name ends in 'to_x'"),
        ({"strength": []}, "draws nothing"),
    ],
)
def test_mistakes_are_named(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build("lora", stack, [CAT], **changes)


def test_targets_are_whole_names(stack) -> None:
    assert len(modules_named(stack.unet, ["to_k"])) == 32
    assert len(modules_named(stack.unet, ["attn2.to_k"])) == 16
    with pytest.raises(UserError):
        modules_named(stack.unet, ["o_k"])


def strengths(adapter) -> dict[str, torch.Tensor]:
    return {name: up.flatten(1) @ down.flatten(1) for name, (down, up) in {**adapter.unet, **adapter.text}.items()}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "renamed.safetensors"])
def test_pefts_settings_beside_any_file_with_its_names(tmp_path, name) -> None:
    """Alpha per layer by regular expressions that PEFT matches to the end of a name, the first one counts."""
    pair = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    modules = ["down_blocks.0.attn.to_q", "down_blocks.0.attn.to_k", "up_blocks.1.attn.to_q"]
    tensors = {f"base_model.model.{m}.lora_{k}.weight": v.clone() for m in modules for k, v in pair.items()}
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    patterns = {r"^down_blocks\..*to_q": 8.0, "to_k": 1.0}
    config = {"r": 2, "lora_alpha": 4, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = strengths(files.read(tmp_path / name))
    meant = dict(zip(modules, (8.0, 1.0, 4.0), strict=True))
    for module, alpha in meant.items():
        torch.testing.assert_close(found[module], alpha / 2 * (pair["B"] @ pair["A"]))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"to_out": 3.0}}))
    with pytest.raises(UserError, match="alpha_pattern names 'to_out', and no layer"):
        files.read(tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        files.read(tmp_path / name)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["out_proj", "q_proj"]])
def test_our_files_with_some_of_the_text_layers_are_read_again(stack, tmp_path, targets) -> None:
    method = fitted(stack, text_encoder=True, text_targets=targets)
    for path in method.export(0, tmp_path, steps=1):
        if path.suffix == ".safetensors" and path.parent == tmp_path:
            read = files.read(path)
            assert {name.rsplit(".", 1)[-1] for name in read.text} == set(targets), path.name


def test_an_empty_lora_is_said(tmp_path, caplog) -> None:
    pair = {"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_B.weight": torch.zeros(2, 1)}
    save_file(pair, tmp_path / "empty.safetensors")
    files.read(tmp_path / "empty.safetensors")
    assert "changes nothing" in caplog.text


@pytest.mark.parametrize("key", ["bundle_emb.my.cat.string_to_param.*", "bundle_emb.my.cat.clip_l"])
def test_an_embedding_in_the_same_file_is_drawn_with_it(stack, inputs, tmp_path, caplog, key) -> None:
    """As diffusers draws with the LoRA and the embedding loaded from files of their own."""
    source = fitted(stack, text_encoder=True)
    source.export(0, tmp_path, steps=1)
    vectors = torch.randn(2, stack.width, generator=torch.Generator().manual_seed(5))
    kohya = tmp_path / "my-cat.safetensors"
    save_file({**load_file(kohya), key: vectors}, tmp_path / "bundle.safetensors")
    method = build("lora", stack, [CAT], identifier="my.cat")
    method.load_foreign(0, tmp_path / "bundle.safetensors")
    pipe = pipeline(stack)
    pipe.load_lora_weights(tmp_path, weight_name=kohya.name)
    pipe.load_textual_inversion({"my.cat": vectors}, token="my.cat")
    expected = theirs(pipe, inputs, pipe.maybe_convert_prompt("a photo of a my.cat cat", pipe.tokenizer))
    torch.testing.assert_close(ours(method.eval(), inputs), expected, atol=1e-4, rtol=1e-4)
    other = build("lora", stack, [CAT])
    other.load_foreign(0, tmp_path / "bundle.safetensors")
    assert "method.identifier='my.cat' puts it there" in caplog.text
    torch.testing.assert_close(ours(other.eval(), inputs), ours(source, inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"brings the words my\.cat"):
        method.composition_part(Step(["a <my-cat>"], ZERO, ZERO))
    save_file({**load_file(kohya), key: vectors[:, :8].contiguous()}, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"word my\.cat of width 8"):
        method.load_foreign(0, tmp_path / "narrow.safetensors")


@pytest.mark.parametrize("feed_forward", ["second", "third", "none"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_cloneofsimos_files(stack, inputs, tmp_path, kind, feed_forward) -> None:
    """Pairs without names, in the order in which diffusers of 2022 and of 2023 held the layers."""
    unet, text = stack.unet, stack.text_module
    blocks = [name for name, part in unet.named_modules() if type(part).__name__ == "BasicTransformerBlock"]
    assert [f"{name}.transformer_blocks.0" for name in lora_diffusion.BLOCKS] == blocks, "the order of the U-Net itself"
    order = {"second": ["attn1", "ff", "attn2"], "third": ["attn1", "attn2", "ff"], "none": ["attn1", "attn2"]}
    names = []
    for block in blocks:
        for part in order[feed_forward]:
            inner = ["net.0.proj"] if part == "ff" else ["to_q", "to_k", "to_v", "to_out.0"]
            names += [f"{block}.{part}.{name}" for name in inner]
    heads = [
        f"encoder.layers.{number}.self_attn.{name}"
        for number in range(len(text.encoder.layers))
        for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    generator = torch.Generator().manual_seed(2)
    changed: dict[str, dict[str, torch.Tensor]] = {}
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for part, module, layers in (("unet", unet, names), ("text_encoder", text, heads)):
        for name in layers:
            weight = module.get_parameter(f"{name}.weight")
            up = 0.2 * torch.randn(weight.shape[0], 2, generator=generator)
            down = 0.2 * torch.randn(2, weight.shape[1], generator=generator)
            pairs.setdefault(part, []).append((up, down))
            changed.setdefault(part, {})[f"{name}.weight"] = weight + up @ down
    word = torch.randn(stack.width, generator=generator)
    if kind == "pt":
        path = tmp_path / "lora.pt"
        torch.save([value for pair in pairs["unet"] for value in pair], path)
        torch.save([value for pair in pairs["text_encoder"] for value in pair], tmp_path / "lora.text_encoder.pt")
        torch.save({"<s1>": word}, tmp_path / "lora.ti.pt")
        assert set(files.read(tmp_path / "lora.text_encoder.pt").text) == set(heads)
    else:
        path = tmp_path / "lora.safetensors"
        states = {
            f"{part}:{number}:{name}": value.contiguous()
            for part, rows in pairs.items()
            for number, pair in enumerate(rows)
            for name, value in zip(("up", "down"), pair, strict=True)
        }
        save_file({**states, "<s1>": word}, path, metadata={"<s1>": "<embed>"})
    method = build("lora", stack, [CAT], identifier="<s1>")
    method.load_foreign(0, path)
    tokens = stack.tokenize(["a photo of a <s1> cat"], {"<s1>": [0]})
    placed = word[None, None]
    states = with_weights(
        stack.text_module,
        changed["text_encoder"],
        lambda: stack.normalise_text(stack.hidden_states(tokens, placed))[0],
    )
    with torch.no_grad():
        expected = functional_call(
            unet, changed["unet"], inputs, {"encoder_hidden_states": Conditioning(states[None]), "return_dict": False}
        )[0]
    torch.testing.assert_close(ours(method.eval(), inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_damaged_file_of_cloneofsimo_is_refused(tmp_path) -> None:
    torch.save([torch.ones(4, 1), torch.ones(1, 4)] * 7, tmp_path / "seven.pt")
    with pytest.raises(UserError, match="7 pairs of matrices for unet"):
        files.read(tmp_path / "seven.pt")
    torch.save([torch.ones(4, 1)], tmp_path / "half.pt")
    with pytest.raises(UserError, match="lacks its other half"):
        files.read(tmp_path / "half.pt")


def test_dotted_names_with_alpha(tmp_path) -> None:
    """Diffusers' names with kohya's matrices and strengths, as some converters write them."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(1.0)}
    save_file({f"unet.{layer}.{key}": value for key, value in pair.items()}, tmp_path / "dotted.safetensors")
    ((down, up),) = files.read(tmp_path / "dotted.safetensors").unet.values()
    torch.testing.assert_close(up @ down, torch.full((4, 4), 1.0))  # 2 B A times alpha / r = 1 / 2


def test_mixed_ranks_saved_anew_by_diffusers_keep_their_strength(stack, inputs, tmp_path) -> None:
    pipe = pipeline(stack)
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 6},
        init_lora_weights=False,
    )  # fmt: skip
    pipe.unet.add_adapter(config)
    states = get_peft_model_state_dict(pipe.unet)
    metadata = pipe.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(states), unet_lora_adapter_metadata=metadata
    )
    method = build("lora", stack, [CAT])
    method.load_foreign(0, tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(ours(method.eval(), inputs), theirs(pipe, inputs), atol=1e-4, rtol=1e-4)


def test_names_of_the_original_checkpoint(tmp_path) -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 32), f"{key}.lora_up.weight": torch.ones(32, 1)}
    save_file({**tensors, f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "ldm.safetensors")
    (name,) = files.read(tmp_path / "ldm.safetensors").unet
    assert name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
