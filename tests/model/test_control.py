"""Attention maps in a control's hands: nothing changes without one, and gradients survive replayed layers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from hiperlab.model.attention_control import Record, cross_maps, layer_of
from hiperlab.model.conditioning import Conditioning, concatenate
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
