"""Offsets beside the layers, each row's own: what separate calls with changed weights give, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.offsets import Added, LowRank, Offsets
from hiperlab.model.row_offsets import RowOffsets, active, joined
from hiperlab.model.tiny import tiny

LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.1.attentions.2.proj_in",  # a convolution of 1 x 1
    "down_blocks.1.resnets.0.conv1",  # 3 x 3, padded
    "down_blocks.0.downsamplers.0.conv",  # with a stride
    "time_embedding.linear_1",  # reads (B, in)
)
WHOLE = (
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
    "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
    "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
)
CONCEPTS, RANK = 3, 4


@pytest.fixture(scope="module")
def stack():
    return tiny(seed=0, size=128).double()  # at 64 px the innermost group norm sees two numbers


@pytest.fixture
def pairs(stack):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.3).requires_grad_()

    found = {}
    for name in LAYERS:
        out, inputs, *sides = stack.unet.get_submodule(name).weight.shape
        low = normal(CONCEPTS, RANK, inputs, *sides), normal(CONCEPTS, out, RANK, *[1] * len(sides))
        found[f"{name}.weight"] = low
    for name in WHOLE:
        found[name] = (normal(CONCEPTS, *stack.unet.get_parameter(name).shape),)
    return found


SCALE = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
WHICH = torch.tensor([2, 0, 1, 2])


def inputs(rows: int = len(WHICH)):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, 16, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(1, rows, 77, 32, generator=generator, dtype=torch.float64)
    return latents, torch.tensor([1, 400, 800, 999])[:rows], states


def one_by_one(stack, pairs, latents, when, states):
    """The same rows, each in a call with changed weights."""
    rows = []
    for row, concept in enumerate(WHICH.tolist()):
        factor = float(SCALE[concept])
        changes = {
            name: LowRank(each[0][concept], each[1][concept], factor) if len(each) == 2
            else Added(factor * each[0][concept])
            for name, each in pairs.items()
        }  # fmt: skip
        own = Conditioning(states[:, row : row + 1], offsets=Offsets(changes))
        rows.append(stack.predict(latents[row : row + 1], when[row : row + 1], own))
    return torch.cat(rows)


def gradients(value, pairs):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [t for pair in pairs.values() for t in pair])])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_are_separate_calls(stack, pairs, checkpointing) -> None:
    latents, when, states = inputs()
    alone = one_by_one(stack, pairs, latents, when, states)
    used = copy.deepcopy(stack)
    used.optimise(channels_last=False, compile=False, gradient_checkpointing=checkpointing)
    used.unet.train(checkpointing)  # diffusers checkpoints in training mode only
    together = used.predict(latents, when, Conditioning(states, row_offsets=RowOffsets(pairs, SCALE, WHICH)))
    assert float((together - alone).detach().abs().max()) < 1e-12 * float(alone.detach().abs().max())
    weight = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, other = (gradients((each * weight).sum(), pairs) for each in (alone, together))
    assert float((one - other).norm()) < 1e-12 * float(one.norm())
    bare = stack.predict(latents, when, Conditioning(states))
    assert float((bare - alone).detach().abs().max()) > 1e-2 * float(bare.abs().max()), "the offsets matter"


def test_in_float32_it_is_rounding(stack, pairs) -> None:
    single = copy.deepcopy(stack).float()
    small = {name: tuple(tensor.detach().float() for tensor in each) for name, each in pairs.items()}
    latents, when, states = inputs()
    alone = one_by_one(stack, pairs, latents, when, states).detach()
    offsets = RowOffsets(small, SCALE.float(), WHICH)
    together = single.predict(latents.float(), when, Conditioning(states.float(), row_offsets=offsets))
    assert float((together - alone).abs().max()) < 1e-5 * float(alone.abs().max())


def test_a_call_leaves_nothing_behind(stack, pairs) -> None:
    latents, when, states = inputs()
    before = stack.predict(latents, when, Conditioning(states))
    stack.predict(latents, when, Conditioning(states, row_offsets=RowOffsets(pairs, SCALE, WHICH)))
    with pytest.raises(RuntimeError):  # states of another width
        stack.predict(latents, when, Conditioning(states[..., :5], row_offsets=RowOffsets(pairs, SCALE, WHICH)))
    assert active() is None and torch.equal(before, stack.predict(latents, when, Conditioning(states)))
    assert not any(module._forward_hooks for module in stack.unet.modules())


def test_rows_are_chosen_and_joined(stack, pairs) -> None:
    """Guidance's unconditional half goes through its picture's own offsets."""
    latents, when, states = inputs()
    whole = Conditioning(states, row_offsets=RowOffsets(pairs, SCALE, WHICH))
    both = concatenate([Conditioning(states.flip(1)), whole.rows([0, 1]), whole.rows([2, 3])])
    assert both.row_offsets is not None and both.row_offsets.which.tolist() == [2, 0, 1, 2, 2, 0, 1, 2]
    double = stack.predict(torch.cat([latents, latents]), torch.cat([when, when]), both)
    torch.testing.assert_close(double[4:], stack.predict(latents, when, whole), atol=1e-10, rtol=0)
    assert whole.rows([3, 0]).row_offsets.which.tolist() == [2, 2]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="3 rows without offsets beside 4"):
        joined([(None, 3), (whole.row_offsets, 4)])
    with pytest.raises(ValueError, match="calls of their own"):
        fewer = RowOffsets(dict(list(pairs.items())[:3]), SCALE, WHICH)
        joined([(fewer, 4), (whole.row_offsets, 4)])
    assert joined([(None, 3), (None, 1)]) is None


def test_offsets_of_different_memory_share_a_call(stack, pairs) -> None:
    latents, when, states = inputs()
    mine = Conditioning(states, row_offsets=RowOffsets(pairs, SCALE, WHICH))
    others = {name: tuple(tensor.detach() * 1.5 for tensor in each) for name, each in pairs.items()}
    theirs = Conditioning(states.flip(1), row_offsets=RowOffsets(others, SCALE.flip(0), WHICH))
    both = concatenate([Conditioning(states[:, :, :, :].repeat(1, 3, 1, 1)), mine, theirs, mine.rows([1, 2, 3, 0])])
    assert both.row_offsets is not None and both.row_offsets.which.tolist()[12:] == [2, 0, 1, 2, 5, 3, 4, 5, 0, 1, 2, 2]
    together = stack.predict(latents.repeat(3, 1, 1, 1), when.repeat(3), both.rows(range(12, 24)))
    torch.testing.assert_close(together[:4], stack.predict(latents, when, mine), atol=1e-10, rtol=0)
    torch.testing.assert_close(together[4:8], stack.predict(latents, when, theirs), atol=1e-10, rtol=0)


def test_other_layers_and_ranks_share_a_call(stack, pairs) -> None:
    """What one has no change of, or a smaller rank, is zeros to it."""
    latents, when, states = inputs()
    low = {name: each for name, each in pairs.items() if len(each) == 2}
    whole = {name: each for name, each in pairs.items() if len(each) == 1}
    for kind in (low, whole):
        names = list(kind)
        first = {name: kind[name] for name in names[:-1]}
        second = {name: tuple(tensor.detach() * 1.5 for tensor in kind[name]) for name in names[1:]}
        if kind is low:
            second = {name: (down[:, :2], up[:, :, :2]) for name, (down, up) in second.items()}
        mine = Conditioning(states, row_offsets=RowOffsets(first, SCALE, WHICH))
        theirs = Conditioning(states.flip(1), row_offsets=RowOffsets(second, SCALE.flip(0), WHICH))
        both = stack.predict(latents.repeat(2, 1, 1, 1), when.repeat(2), concatenate([mine, theirs]))
        torch.testing.assert_close(both[:4], stack.predict(latents, when, mine), atol=1e-10, rtol=0)
        torch.testing.assert_close(both[4:], stack.predict(latents, when, theirs), atol=1e-10, rtol=0)


def test_the_offset_is_worked_out_in_the_more_precise_type() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    pair = tuple(torch.randn(shape, generator=generator) * 1e-2 for shape in ((1, 2, 8), (1, 8, 2)))
    x = torch.randn(1, 3, 8, generator=generator).bfloat16()
    holder = nn.ModuleDict({"layer": layer})
    with RowOffsets({"layer.weight": pair}, torch.ones(1), torch.zeros(1, dtype=torch.long)).beside(holder):
        out = layer(x)
    offset = x.float() @ pair[0][0].T @ pair[1][0].T
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), nn.functional.linear(x, layer.weight).float() + offset, atol=4e-3, rtol=8e-3
    )
