"""Two methods alive at once on one stack: each becomes what it becomes alone, and the stack stays bit-identical."""

from __future__ import annotations

import pytest
import torch

from hiperlab.base.method import Method
from tests.composed import SUBJECTS, batch, build, train

PAIRS = [
    (("lora", {"text_encoder": True}), ("dreambooth", {"text_encoder": True})),
    (("custom_diffusion", {}), ("ti", {})),
    (("imagic", {}), ("lora", {})),
]
CAT = SUBJECTS[0]


def make(stack, pair) -> list[Method]:
    return [build(name, stack, [CAT], **changes) for name, changes in pair]


def draw(method: Method) -> torch.Tensor:
    return method.sample(["a <my-cat>"], [1], steps=1, guidance=7.5)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(name for name, _ in pair))
def test_two_methods_in_turns(stack, pair) -> None:
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    together, alone = make(stack, pair), make(stack, pair)
    optimizers = [method.configure_optimizers() for method in together]
    for k in range(2):
        for method, optimizer in zip(together, optimizers, strict=True):
            method.train().training_step(batch([CAT], [2 * k, 2 * k + 1]), k).backward()
            draw(together[0])
            optimizer.step()
            optimizer.zero_grad()
    for method, lonely in zip(together, alone, strict=True):
        train(lonely, 2)
        ours, theirs = method.trainable_state(), lonely.trainable_state()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert torch.equal(draw(method), draw(lonely))
    after = stack.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in stack.parameters())
    assert all(parameter.grad is None for parameter in stack.parameters())
