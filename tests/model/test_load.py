"""Loading from a folder: real layouts, v-prediction, and one clear line for each mistake."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

from hiperlab.errors import UserError
from hiperlab.model.kind import is_sdxl
from hiperlab.model.load import pretrained
from hiperlab.model.noise import add_noise, target
from hiperlab.model.text import inner
from hiperlab.model.tiny import tiny, tiny_sdxl


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    path = tmp_path_factory.mktemp("twin")
    stack.unet.save_pretrained(path / "unet")
    stack.vae.save_pretrained(path / "vae")
    stack.text.save_pretrained(path / "text_encoder")
    stack.tokenizer.save_pretrained(path / "tokenizer")
    DDIMScheduler.from_config(stack.scheduler_config).save_pretrained(path / "scheduler")
    return path


def test_folder_gives_the_same_stack(folder, stack) -> None:
    loaded = pretrained("copy", str(folder), size=128)
    for name, value in stack.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    loaded.base.check(stack.base, "an artifact")  # a copy under another name is the same base


def test_half_precision_copy_is_the_same_base(stack) -> None:
    half = tiny(seed=0, size=128)
    half.text.half()
    half.base.check(stack.base, "an artifact")


def test_v_prediction_folder(folder, tmp_path) -> None:
    copy = shutil.copytree(folder, tmp_path / "v")
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    stack = pretrained("sd21-like", str(copy), size=128)
    assert stack.prediction_type == "v_prediction"
    z0, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    t = torch.tensor([3, 900])
    velocity = stack.target(z0, noise, t)
    a = stack.alpha_bar[t][:, None, None, None]
    z_t = stack.add_noise(z0, noise, t)
    torch.testing.assert_close(a.sqrt() * z_t - (1 - a).sqrt() * velocity, z0, atol=1e-5, rtol=0)  # v gives back z0


def test_targets_by_hand() -> None:
    z0, noise, a = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([0.64])
    assert add_noise(z0, noise, a).item() == pytest.approx(0.8 * 2 + 0.6 * 3)
    assert target(z0, noise, a, "v_prediction").item() == pytest.approx(0.8 * 3 - 0.6 * 2)
    assert target(z0, noise, a, "epsilon") is noise
    with pytest.raises(ValueError, match="epsilon or v_prediction"):
        target(z0, noise, a, "sample")


def test_mistakes(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        pretrained("x", str(tmp_path / "nowhere"), size=512)
    (tmp_path / "half" / "unet").mkdir(parents=True)
    with pytest.raises(UserError, match="lacks scheduler, tokenizer, text_encoder, vae/"):
        pretrained("x", str(tmp_path / "half"), size=512)
    with pytest.raises(UserError, match="not a multiple of 8"):
        pretrained("x", str(folder), size=100)
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights"):
        pretrained("x", str(copy), size=128)
    inpaint = shutil.copytree(folder, tmp_path / "inpaint")
    stack = tiny(seed=0, size=128)
    from diffusers import UNet2DConditionModel

    settings = {key: value for key, value in stack.unet.config.items() if not key.startswith("_")}
    UNet2DConditionModel(**{**settings, "in_channels": 9}).save_pretrained(inpaint / "unet")
    with pytest.raises(UserError, match="takes 9 channels"):
        pretrained("x", str(inpaint), size=128)


def test_unreachable_hub_is_one_line(monkeypatch) -> None:
    from hiperlab.hub import hub_problem

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_problem.cache_clear()
    try:
        with pytest.raises(UserError, match=r"model\.path=nobody/nothing is not in the local hub cache") as caught:
            pretrained("x", "nobody/nothing", size=512)
    finally:
        hub_problem.cache_clear()
    assert "\n" not in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


def test_twin_is_a_function_of_its_seed() -> None:
    torch.manual_seed(5)
    one = tiny(seed=3, size=64).state_dict()
    after = torch.rand(1)
    torch.manual_seed(6)
    two = tiny(seed=3, size=64).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after), "building it leaves the global random state alone"


def test_the_same_base_with_more_words_is_the_same_base(stack, tmp_path) -> None:
    """As diffusers' whole pipeline after Textual Inversion saves it; and a tokenizer that names no length."""
    grown = tiny(seed=0, size=128)
    grown.tokenizer = copy.deepcopy(grown.tokenizer)  # the twins share one
    grown.tokenizer.add_tokens([f"<new{number}>" for number in range(8)])
    grown.text.resize_token_embeddings(len(grown.tokenizer))
    grown.base.check(stack.base, "an artifact")
    stack.base.check(grown.base, "an artifact")


def test_a_tokenizer_that_names_no_length_has_the_text_encoders(folder, tmp_path) -> None:
    copy = shutil.copytree(folder, tmp_path / "unsaid")
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    assert pretrained("copy", str(copy), size=128).tokenizer.model_max_length == 77


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def unet_name(name: str, plain: int = 0) -> str:
    """A weight's name in the original layout of Stable Diffusion 1, or of XL, where the up block `plain` differs."""
    if block := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)", name):
        way, number, kind, layer = block[1], int(block[2]), block[3], int(block[4])
        place = f"input_blocks.{3 * number + layer + 1}" if way == "down" else f"output_blocks.{3 * number + layer}"
        name = name.replace(block[0], f"{place}.{0 if kind == 'resnets' else 1}")
    elif block := re.match(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", name):
        number = int(block[2])
        place = f"input_blocks.{3 * number + 3}.0.op"
        if block[1] == "up":
            place = f"output_blocks.{3 * number + 2}.{1 if number == plain else 2}.conv"  # this one has no attention
        name = name.replace(block[0], place)
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            name = name.replace(ours, theirs, 1)
    if "transformer_blocks" not in name:
        for ours, theirs in RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return f"model.diffusion_model.{name}"


def vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{3 - int(match[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{3 - int(match[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for ours, theirs in (
        ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
        ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text model's weights as OpenCLIP keeps them: queries, keys and values in one matrix, the projection turned."""
    found = {"text_projection": state["text_projection.weight"].T}
    names = {
        "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
        "embeddings.token_embedding": "token_embedding", "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", "self_attn": "attn",
    }  # fmt: skip
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            three = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
        elif not re.search(r"[kv]_proj|text_projection", name):
            found[name] = value
    return found


@pytest.fixture(scope="module")
def xl():
    return tiny_sdxl(seed=0, size=64)


@pytest.fixture(scope="module")
def xl_folder(xl, tmp_path_factory):
    """As diffusers' pipeline saves it."""
    path = tmp_path_factory.mktemp("xl")
    (first, one), (second, two) = [(tower.text, tower.tokenizer) for tower in xl.towers]
    scheduler = EulerDiscreteScheduler.from_config(xl.scheduler_config)
    StableDiffusionXLPipeline(xl.vae, first, second, one, two, xl.unet, scheduler).save_pretrained(path)
    return path


def test_a_folder_of_sdxl(xl_folder, xl) -> None:
    """Detected, the same stack; without its list of parts, too, and with a switch that says how it reads no text."""
    assert is_sdxl(str(xl_folder))
    loaded = pretrained("copy", str(xl_folder), size=64, pooled_at="argmax")
    for name, value in xl.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.zero_negative and loaded.pools and loaded.pooled_at == "argmax" and loaded.layers == 17
    assert [tower.tokenizer.pad_token_id for tower in loaded.towers] == [49407, 0]
    index = xl_folder / "model_index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps({**said, "force_zeros_for_empty_prompt": False}))
    assert not pretrained("copy", str(xl_folder), size=64).zero_negative
    index.unlink()
    assert is_sdxl(str(xl_folder)) and pretrained("copy", str(xl_folder), size=64).zero_negative
    index.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"model.size=72 is not a multiple of 32. Choose 64 or 96"):
        pretrained("copy", str(xl_folder), size=72)


def test_a_single_file_of_sdxl(xl_folder, xl, tmp_path) -> None:
    states = {unet_name(name, plain=2): value for name, value in xl.unet.state_dict().items()}
    for name, value in xl.vae.state_dict().items():
        turned = "attentions" in name and value.dim() == 2
        states[vae_name(name)] = value[:, :, None, None] if turned else value
    first, second = (tower.text for tower in xl.towers)
    for name, value in inner(first).state_dict().items():
        states[f"conditioner.embedders.0.transformer.text_model.{name}"] = value
    states |= {f"conditioner.embedders.1.model.{name}": v for name, v in open_clip(second.state_dict()).items()}
    path = tmp_path / "xl-like.safetensors"
    save_file({name: value.contiguous().clone() for name, value in states.items()}, path)
    assert is_sdxl(str(path))
    loaded = pretrained("single", str(path), size=64, config=str(xl_folder))
    assert loaded.zero_negative and loaded.state_dict().keys() == xl.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, xl.state_dict()[name]), name


def test_a_single_file_of_the_original_layout(folder, stack, tmp_path) -> None:
    """Converted by diffusers, every weight is what the folder holds."""
    states = {unet_name(name): value for name, value in stack.unet.state_dict().items()}
    for name, value in stack.vae.state_dict().items():
        turned = "attentions" in name and value.dim() == 2  # linear layers here, 1x1 convolutions there
        states[vae_name(name)] = value[:, :, None, None] if turned else value
    for name, value in stack.text_module.state_dict().items():
        states[f"cond_stage_model.transformer.text_model.{name}"] = value
    path = tmp_path / "v1-like.safetensors"
    save_file({name: value.contiguous() for name, value in states.items()}, path)
    kind = shutil.copytree(folder, tmp_path / "kind", ignore=shutil.ignore_patterns("*.safetensors"))
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }  # fmt: skip
    (kind / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    loaded = pretrained("single", str(path), size=128, config=str(kind))
    ours = stack.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert loaded.prediction_type == stack.prediction_type and loaded.tokenizer.model_max_length == 77
    with pytest.raises(UserError, match="is of a single file"):
        pretrained("x", str(folder), size=128, config=str(folder))


def test_single_files_that_cannot_be_loaded(folder, tmp_path) -> None:
    (tmp_path / "v1-5.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle, which may run code"):
        pretrained("sd15", str(tmp_path / "v1-5.ckpt"), size=512)
    (tmp_path / "torn.safetensors").write_bytes(b"x")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("torn", "other"):
        with pytest.raises(UserError, match=r"cannot be loaded as a single file \(.+\)") as caught:
            pretrained("sd15", str(tmp_path / f"{name}.safetensors"), size=512, config=str(folder))
        assert "\n" not in str(caught.value)


def test_sdxl_is_told_from_the_names_of_its_parts(folder, tmp_path) -> None:
    """Of a folder, of its list of parts alone, of a single file; anything else is an earlier model, or nothing."""
    assert not is_sdxl(str(folder)) and not is_sdxl(str(tmp_path / "absent"))
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "model_index.json").write_text(json.dumps({"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    assert is_sdxl(str(listed))
    with pytest.raises(UserError, match="lacks scheduler, tokenizer, text_encoder, vae, unet, tokenizer_2, text_enc"):
        pretrained("x", str(listed), size=128)
    (listed / "model_index.json").write_text("[")
    assert not is_sdxl(str(listed))
    for key, found in (("conditioner.embedders.1.model.ln_final.weight", True), ("cond_stage_model.x", False)):
        save_file({key: torch.zeros(1)}, tmp_path / "one.safetensors")
        assert is_sdxl(str(tmp_path / "one.safetensors")) is found
    (tmp_path / "one.safetensors").write_bytes(b"torn")
    assert not is_sdxl(str(tmp_path / "one.safetensors"))
