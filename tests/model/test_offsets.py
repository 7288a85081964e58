"""Weight offsets: they act as changed weights would, and the frozen stack does not notice."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.offsets import Added, Change, Offsets, parameter_names
from hiperlab.model.tiny import tiny


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents, keys = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(1, 2, 77, 32, generator=generator)
    return latents, torch.tensor([10, 700]), keys


def random_changes(unet, weights: str) -> dict[str, Change]:
    generator = torch.Generator().manual_seed(1)
    frozen = dict(unet.named_parameters())
    return {
        name: Added((0.1 * torch.randn(frozen[name].shape, generator=generator)).requires_grad_())
        for name in parameter_names(unet, weights)
    }


@pytest.mark.parametrize("weights", ["cross", "attention", "all"])
def test_offsets_equal_changed_weights(stack, inputs, weights) -> None:
    changes = random_changes(stack.unet, weights)
    before = {name: value.clone() for name, value in stack.unet.state_dict().items()}
    other = copy.deepcopy(stack)
    with torch.no_grad():
        for name, change in changes.items():
            other.unet.get_parameter(name).add_(change.tensors()[0])
        latents, t, keys = inputs
        ours = stack.predict(latents, t, Conditioning(keys, offsets=Offsets(changes)))
        assert torch.equal(ours, other.predict(latents, t, Conditioning(keys)))
        bare = stack.predict(latents, t, Conditioning(keys))
    assert not torch.allclose(ours, bare, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in stack.unet.state_dict().items())


def test_no_difference_is_the_bare_unet(stack, inputs) -> None:
    latents, t, keys = inputs
    nothing = Offsets({name: Added(torch.zeros_like(p)) for name, p in stack.unet.named_parameters()})
    with torch.no_grad():
        bare = stack.predict(latents, t, Conditioning(keys))
        assert torch.equal(stack.predict(latents, t, Conditioning(keys, offsets=nothing)), bare)


def test_gradients_are_those_of_the_weights_also_when_replayed(inputs) -> None:
    """Gradient checkpointing replays blocks after the call: with the frozen weights it would be wrong."""
    latents, t, keys = inputs
    found: list[dict[str, Tensor]] = []
    for switch in (False, True):
        stack = tiny(seed=0, size=128).optimise(channels_last=False, compile=False, gradient_checkpointing=switch)
        changes = random_changes(stack.unet, "all")
        stack.predict(latents, t, Conditioning(keys, offsets=Offsets(changes))).square().mean().backward()
        found.append({name: change.tensors()[0].grad for name, change in changes.items()})
        assert all(p.grad is None for p in stack.parameters())
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    stack = tiny(seed=0, size=128)
    weights = random_changes(stack.unet, "all")
    with torch.no_grad():
        for name, change in weights.items():
            stack.unet.get_parameter(name).add_(change.tensors()[0])
    stack.unet.requires_grad_(True)
    stack.predict(latents, t, Conditioning(keys)).square().mean().backward()
    for name, parameter in stack.unet.named_parameters():
        torch.testing.assert_close(found[0][name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_small_difference_survives_half_precision() -> None:
    weight = torch.full((3,), 1.0, dtype=torch.bfloat16)
    once = Added(torch.full((3,), 0.003))  # bf16 near 1 has steps of 0.0078
    assert torch.equal(once.apply(weight), weight)
    twice = Added(torch.full((3,), 0.006))
    assert twice.apply(weight).dtype == torch.bfloat16 and float(twice.apply(weight)[0]) > 1


@dataclass(frozen=True)
class LowRank(Change):
    """Another form of change needs these two functions and nothing else."""

    up: Tensor
    down: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down

    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down


def test_other_forms_fit(stack, inputs) -> None:
    latents, t, keys = inputs
    name = f"{stack.cross_attention[6]}.to_k.weight"
    out, width = stack.unet.get_parameter(name).shape
    up, down = torch.randn(out, 2).requires_grad_(), torch.randn(2, width).requires_grad_()
    ours = stack.predict(latents, t, Conditioning(keys, offsets=Offsets({name: LowRank(up, down)})))
    dense = stack.predict(latents, t, Conditioning(keys, offsets=Offsets({name: Added((up @ down).detach())})))
    torch.testing.assert_close(ours, dense)
    ours.square().mean().backward()
    assert up.grad is not None and down.grad is not None


def test_a_call_has_one_set_of_weights(stack, inputs) -> None:
    keys = inputs[2]
    value = torch.ones(1, 4)
    one, again, other = (Offsets({"a": Added(each)}) for each in (value[0], value[0], torch.ones(4)))
    assert one.same(again) and not one.same(other) and not one.same(Offsets({"b": Added(value[0])}))
    joined = concatenate([Conditioning(keys), Conditioning(keys, offsets=one), Conditioning(keys, offsets=again)])
    assert joined.offsets is one and joined.rows([0, 5]).offsets is one and joined.to(torch.float64).offsets is one
    with pytest.raises(AssertionError, match="calls of their own"):
        concatenate([Conditioning(keys, offsets=one), Conditioning(keys, offsets=other)])


def test_names_are_checked(stack, inputs) -> None:
    latents, t, keys = inputs
    with pytest.raises(KeyError, match="nowhere"):
        stack.predict(latents, t, Conditioning(keys, offsets=Offsets({"nowhere": Added(torch.zeros(1))})))
    with pytest.raises(UserError, match="Choose cross, attention, all"):
        parameter_names(stack.unet, "most")
    cross = parameter_names(stack.unet, "cross")
    assert cross and all(".attn2." in name for name in cross)
