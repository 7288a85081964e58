"""Directional Textual Inversion: steps on the sphere by hand, words of several tokens, files."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.optim.spherical import SphericalSGD
from tests.composed import SUBJECTS, build, train
from tests.pipeline import drawn, pipeline

CATS = SUBJECTS[:1]


def rows(*values: list[float]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_lr_is_the_tangent_of_the_angle() -> None:
    """Whatever the gradient's size, and whatever part of it points along the row."""
    v = rows([1.0, 0.0], [0.0, 1.0])
    optimizer = SphericalSGD([v], lr=0.75, beta=0.0, eps=1e-8)
    v.grad = torch.tensor([[5.0, -2.0], [3e-3, 7.0]], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(
        v.detach(), torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_steps_are_the_naive_formula(beta) -> None:
    """Prior, tangent, running mean of the squared length, step, back onto the sphere: in loops over rows."""
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(2, 3, 5, generator=generator, dtype=torch.float64), dim=-1)
    mu = torch.nn.functional.normalize(torch.randn(2, 3, 5, generator=generator, dtype=torch.float64), dim=-1)
    v, kappa, lr = torch.nn.Parameter(start.clone()), 0.3, 0.1
    optimizer = SphericalSGD([v], lr=lr, beta=beta, eps=1e-8)
    optimizer.pulls[v] = kappa * mu
    gradients = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    for gradient in gradients:
        v.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(v.grad, gradient)
    for k in range(2):
        for i in range(3):
            row, s = start[k, i], 0.0
            for step, gradient in enumerate(gradients[:, k, i], start=1):
                g = gradient - kappa * mu[k, i]
                g = g - torch.dot(g, row) * row
                s = beta * s + (1 - beta) * float(torch.dot(g, g))
                row = row - lr * g / (math.sqrt(s / (1 - beta**step)) + 1e-8)
                row = row / row.norm()
            torch.testing.assert_close(v[k, i].detach(), row, atol=1e-12, rtol=0)


def test_resumed_average_goes_on() -> None:
    """With beta > 0 the second moment and the count are state."""
    one, two = rows([0.6, 0.8]), rows([0.6, 0.8])
    gradients = torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, other = (SphericalSGD([each], lr=0.1, beta=0.9, eps=1e-8) for each in (one, two))
    for step, gradient in enumerate(gradients):
        if step == 2:
            state = other.state_dict()
            other = SphericalSGD([two], lr=0.1, beta=0.9, eps=1e-8)
            other.load_state_dict(state)
        for each, optimizer in ((one, first), (two, other)):
            each.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(one, two)


def test_norm_stays_and_rows_are_the_words_tokens(stack) -> None:
    method = build("dti", stack, [Subject("bear", "<bear>", "teddy bear")])
    table = stack.text.get_input_embeddings().weight
    ids = stack.tokenizer("teddy bear", add_special_tokens=False)["input_ids"]
    assert method.direction.shape == (1, 2, 32) and len(ids) == 2
    torch.testing.assert_close(method.prior[0], table[ids] / table[ids].norm(dim=1, keepdim=True))
    norms = table.norm(dim=1)
    train(method, 3)
    torch.testing.assert_close(method.vectors().norm(dim=-1), norms[norms > 0].mean().expand(1, 2), atol=1e-6, rtol=0)
    angle = torch.acos((method.direction * method.prior).sum(-1).clamp(max=1))
    assert (angle > 0.01).all() and (angle < 3 * math.atan(0.04) + 1e-4).all()


def test_starts(stack) -> None:
    """Random directions are each concept's own number, the mean row is one for all."""
    two = build("dti", stack, SUBJECTS[:2], init="random")
    assert torch.equal(two.direction[0], two.direction[1])
    assert torch.equal(build("dti", stack, CATS, init="random").direction[0], two.direction[0])
    assert not torch.equal(build("dti", stack, CATS, init="random", seed=1).direction[0], two.direction[0])
    mean = stack.text.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(build("dti", stack, CATS, init="mean").direction[0, 0], mean / mean.norm())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnitude": "median"}, "method.magnitude=median is unknown"),
        ({"init": "xinit"}, "method.init=xinit is unknown"),
        ({"kappa": -1.0}, "method.kappa=-1.0 is out of range"),
        ({"kappa": float("inf")}, "method.kappa=inf is out of range"),
        ({"initializer": " "}, "initial words have ' ' 0"),
    ],
)
def test_settings_out_of_range(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build("dti", stack, CATS, **changes)


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("beta", 1.0), ("eps", float("nan"))])
def test_optimizer_out_of_range(stack, name, value) -> None:
    with pytest.raises(UserError, match=f"method.optimizer.{name}="):
        SphericalSGD([rows([1.0, 0.0])], **{"lr": 0.1, "beta": 0.0, "eps": 1e-8, name: value})


def test_what_cannot_be_is_refused(stack) -> None:
    with pytest.raises(UserError, match="'cat' 1, 'teddy bear' 2"):
        build("dti", stack, [*CATS, Subject("bear", "<bear>", "teddy bear")])
    adam = build("dti", stack, CATS)
    adam._optimizer = lambda params: torch.optim.AdamW(params, lr=1e-3)
    with pytest.raises(UserError, match="AdamW leaves the sphere"):
        adam.configure_optimizers()


def test_plain_pipeline_draws_the_same_picture(stack, tmp_path) -> None:
    """The bare placeholder, which diffusers expands to both tokens; the expanded word would be expanded once more."""
    method = build("dti", stack, [Subject("bear", "<bear>", "teddy bear")])
    train(method, 2)
    method.export(0, tmp_path, steps=2)
    prompt = "a photo of <bear> on a beach"
    ours = method.sample([prompt], [7], steps=3, guidance=7.5)
    pipe = pipeline(stack)
    pipe.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    theirs = drawn(pipe, prompt, 7, stack.size)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_other_files(stack, tmp_path) -> None:
    """A word of plain Textual Inversion keeps its norm."""
    method, path = build("dti", stack, CATS), tmp_path / "ti.safetensors"
    row = 20 * torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    save_file({"<x>": row}, path)
    method.load_foreign(0, path)
    torch.testing.assert_close(method.vectors()[0], row)
    torch.testing.assert_close(method.direction.norm(dim=-1), torch.ones(1, 1))
    save_file({"<x>": torch.zeros(1, 32)}, path)
    with pytest.raises(UserError, match="a row of zeros"):
        method.load_foreign(0, path)
    save_file({"<x>": torch.ones(3, 32)}, path)
    with pytest.raises(UserError, match=r"method\.initializer to words of 3 tokens"):
        method.load_foreign(0, path)
