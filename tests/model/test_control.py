"""Attention maps in a control's hands: nothing changes without one, and gradients survive replayed layers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from hiperlab.model.attention_control import Control, Layer, Record, cross_maps, layer_of
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.shared_calls import Call, Calls, together
from hiperlab.model.tiny import tiny


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 77, 32, generator=generator)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10, 700]), Conditioning(states)


@torch.no_grad()
def test_without_a_control_self_attention_is_diffusers_own(stack) -> None:
    z, t, states = inputs()
    ours = stack.predict(z, t, states)
    other = tiny(seed=0, size=128)
    own = {name: AttnProcessor2_0() for name in other.unet.attn_processors if ".attn1." in name}
    other.unet.set_attn_processor({**other.unet.attn_processors, **own})
    assert torch.equal(ours, other.predict(z, t, states))


@torch.no_grad()
def test_a_record_changes_nothing_and_keeps_what_was_asked(stack) -> None:
    z, t, states = inputs()
    record = Record(cross_maps(64))
    torch.testing.assert_close(
        stack.predict(z, t, states.controlled(record)), stack.predict(z, t, states), atol=1e-5, rtol=0
    )
    assert [layer.place for layer in record.maps] == ["down"] * 2 + ["up"] * 3
    for maps in record.maps.values():
        assert maps.shape == (2, 8, 64, 77)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 8, 64), atol=1e-5, rtol=0)


def test_gradients_of_maps_survive_gradient_checkpointing() -> None:
    found = []
    for switch in (False, True):
        stack = tiny(seed=0, size=128).optimise(channels_last=False, compile=False, gradient_checkpointing=switch)
        stack.unet.train(switch)  # diffusers replays blocks in training mode only
        z, t, states = inputs()
        keys = states.keys.clone().requires_grad_()
        record = Record(cross_maps(256))
        out = stack.predict(z, t, Conditioning(keys).controlled(record))
        (out.square().mean() + sum(maps.square().sum() for maps in record.maps.values())).backward()
        assert len(record.maps) == 5
        found.append(keys.grad)
    assert torch.equal(found[0], found[1]) and found[0].abs().max() > 0


def test_a_control_belongs_to_a_whole_call() -> None:
    states = inputs()[2].controlled(Record(lambda layer, size: True))
    assert states.to(torch.float64).control is states.control
    with pytest.raises(AssertionError, match="whole call"):
        states.rows([0])
    with pytest.raises(AssertionError, match="join first"):
        concatenate([states, states])


def test_layers_know_their_place() -> None:
    layer = layer_of("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert (layer.place, layer.cross) == ("mid", False)


CONVOLUTION = "up_blocks.1.resnets.1.conv2"


class FirstRow(Control):
    """Every row's queries and keys of one layer, and its output of one convolution, are row 0's."""

    def wants(self, layer: Layer, pixels: int) -> bool:
        return layer.name == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"

    def attend(self, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().attend(layer, query[[0, 0]], key[[0, 0]], value)

    def outputs(self) -> list[str]:
        return [CONVOLUTION]

    def output(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return states[[0, 0]]


@torch.no_grad()
def test_queries_keys_and_outputs_can_be_another_rows(stack) -> None:
    """The rows that are read do not change, the others do, and nothing stays behind."""
    z, t, states = inputs()
    plain, changed = stack.predict(z, t, states), stack.predict(z, t, states.controlled(FirstRow()))
    torch.testing.assert_close(changed[0], plain[0], atol=1e-5, rtol=0)
    assert (changed[1] - plain[1]).abs().max() > 1e-3
    seen = []
    layer = stack.unet.get_submodule(CONVOLUTION)
    handle = layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    assert torch.equal(stack.predict(z, t, states), plain)
    stack.predict(z, t, states.controlled(FirstRow()))
    handle.remove()
    assert not layer._forward_hooks
    torch.testing.assert_close(seen[1][0], seen[0][0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_controls_of_shared_calls_see_their_own_rows(stack) -> None:
    z, t, states = inputs()
    controls = [None, FirstRow(), Record(cross_maps(64)), FirstRow()]

    def work(control: Control | None) -> Calls[torch.Tensor]:
        return (yield Call(z, t, states.controlled(control)))

    found = together(stack, [work(control) for control in controls])
    for ours, control in zip(found, controls, strict=True):
        expected = stack.predict(z, t, states.controlled(control))
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_outputs_are_not_replaced_under_a_gradient(stack) -> None:
    z, t, states = inputs()
    with pytest.raises(AssertionError, match="without gradients"):
        stack.predict(z, t, states.controlled(FirstRow()))
