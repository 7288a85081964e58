"""DreamBooth's own promises; its numbers are in tests/parity/test_lora.py, class pictures in tests/test_prior.py."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from hiperlab.base.method import Step
from hiperlab.errors import UserError
from hiperlab.method.dreambooth import DreamBooth
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import added
from hiperlab.optim.weight_decay import decay_whole_weights
from tests.composed import SUBJECTS, batch, build, train

CAT = SUBJECTS[0]
ZERO = torch.zeros(1, dtype=torch.long)
NO_PRIOR = {"prior": {"weight": 0.0}}


def fitted(stack, **changes) -> DreamBooth:
    method = build("dreambooth", stack, [CAT], **changes)
    assert isinstance(method, DreamBooth)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in [*method.unet_offsets.values(), *method.text_offsets.values()]:
            value.copy_(0.03 * torch.randn(value.shape, generator=generator))
    return method.eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([400])


@torch.no_grad()
def ours(method, inputs):
    return method.model.predict(*inputs, method.condition(Step(["a photo of a <my-cat>"], ZERO, ZERO)))


def _with_gradient(offset, gradient) -> float:
    """As Lightning does: the gradient is worked out inside the optimizer's step."""
    offset.grad = gradient
    return 0.0


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_decay_is_that_of_the_whole_weight(decay) -> None:
    """Ten steps of an offset beside ten steps of the weight itself, in float64."""
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight, offset = nn.Parameter(frozen.clone()), nn.Parameter(torch.zeros(1, 3, 4, dtype=torch.float64))
    settings = {"lr": 1e-2, "weight_decay": decay}
    plain = torch.optim.AdamW([weight], **settings)
    changed = decay_whole_weights(torch.optim.AdamW([offset], **settings), [(offset, frozen)])
    for _ in range(10):
        weight.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        gradient = weight.grad[None].clone()
        offset.grad = None
        plain.step()
        changed.step(lambda gradient=gradient: _with_gradient(offset, gradient))
    torch.testing.assert_close(frozen + offset[0], weight, atol=1e-12, rtol=0)


def test_weights_are_those_of_fine_tuning(stack) -> None:
    """Three clipped AdamW steps of ours against three on a copy of the U-Net itself."""
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    method = build("dreambooth", stack, [CAT], optimizer={"lr": 1e-3, "weight_decay": 0.1}, **NO_PRIOR)
    train(method, 3, clip=1.0)
    other = copy.deepcopy(stack)
    other.unet.requires_grad_(True)
    fake = build("dreambooth", other, [CAT], **NO_PRIOR)
    fake.unet_offsets = nn.ParameterDict()
    optimizer = torch.optim.AdamW(other.unet.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for k in range(3):
        fake.training_step(batch([CAT], [2 * k, 2 * k + 1]), k).backward()
        nn.utils.clip_grad_norm_(other.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights = added(method.unet_offsets).weights(stack.unet)
    moved = {name: value - before[f"unet.{name}"] for name, value in other.unet.named_parameters()}
    apart = sum(float((weights[name] - value).detach().square().sum()) for name, value in other.unet.named_parameters())
    assert apart < 1e-4 * sum(float(value.detach().square().sum()) for value in moved.values())
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


def test_class_rows_count_by_their_weight(stack) -> None:
    """loss(w) = instance + w * class: linear in w, and the class term is the frozen model's at the start."""
    found = [
        float(build("dreambooth", stack, [CAT], prior={"weight": w}).training_step(batch([CAT], [0, 1]), 0).detach())
        for w in (0.0, 0.5, 1.0)
    ]
    assert found[1] - found[0] > 0.1
    assert found[2] - found[0] == pytest.approx(2 * (found[1] - found[0]), rel=1e-5)


def test_text_encoder_trains_too(stack) -> None:
    method = build("dreambooth", stack, [CAT], text_encoder=True, **NO_PRIOR)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    train(method, 1)
    assert len(method.text_offsets) == len(list(stack.text_module.parameters()))
    with torch.no_grad():
        assert not torch.equal(method.negative_condition("", "", [0]).keys[0], stack.encode_text([""]))
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())
    assert not build("dreambooth", stack, [CAT]).text_offsets


def test_diffusers_and_transformers_read_it_back(stack, inputs, tmp_path) -> None:
    method = fitted(stack, text_encoder=True, export_weights=True)
    written = method.export(0, tmp_path, steps=1)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    ]  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    ids = stack.tokenize(["a photo of a sks cat"]).ids
    with torch.no_grad():
        theirs = unet(*inputs, encoder_hidden_states=text(ids)[0], return_dict=False)[0]
        bare = stack.predict(*inputs, Conditioning(stack.encode_text(["a photo of a sks cat"])[None]))
    torch.testing.assert_close(ours(method, inputs), theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(theirs, bare, atol=1e-2)
    for path in written:
        fresh = build("dreambooth", stack, [CAT], text_encoder=True)
        fresh.load_foreign(0, path)
        torch.testing.assert_close(ours(fresh.eval(), inputs), theirs, atol=1e-4, rtol=1e-4)


def test_foreign_networks_are_checked(stack, tmp_path, caplog) -> None:
    fitted(stack, text_encoder=True, export_weights=True).export(0, tmp_path, steps=1)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"more weights: set method\.weights=all"):
        build("dreambooth", stack, [CAT], weights="cross").load_foreign(0, path)
    with caplog.at_level(logging.WARNING):
        build("dreambooth", stack, [CAT]).load_foreign(0, path)
    assert "method.text_encoder=true" in caplog.text
    states = load_file(path)
    for change, message in (
        ({"more": torch.ones(1)}, "more differ"),
        ({"conv_in.bias": torch.ones(7)}, "conv_in.bias differ"),
        ({"conv_in.bias": states["conv_in.bias"] * float("nan")}, "NaN"),
    ):
        save_file({**states, **change}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=message):
            build("dreambooth", stack, [CAT]).load_foreign(0, tmp_path / "other.safetensors")


def test_nothing_else_is_written_unless_asked(stack, tmp_path) -> None:
    assert fitted(stack).export(0, tmp_path, steps=1) == [] and not list(tmp_path.iterdir())


def test_its_cost_is_said(stack, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        build("dreambooth", stack, [CAT], weights="cross")
        assert "GB besides the model" not in caplog.text
        build("dreambooth", stack, [CAT])
    assert "GB besides the model" in caplog.text and "method=lora" in caplog.text
