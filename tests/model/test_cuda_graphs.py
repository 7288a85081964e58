"""CUDA graphs of U-Net calls: what is recorded, when it is replayed, and that one memory never answers twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.model import cuda_graphs
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.cuda_graphs import SEEN, CudaGraphs
from hiperlab.model.row_offsets import RowOffsets
from hiperlab.model.tiny import tiny, tiny_sdxl

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def stack():
    return tiny(seed=0, size=128).double()


class Recorder:
    """Stands in for torch.cuda.make_graphed_callables: one memory for inputs and one for outputs, as there."""

    def __init__(self) -> None:
        self.made = 0
        self.replays = 0

    def __call__(self, call: Callable[..., Tensor], examples: tuple[Tensor, ...], allow_unused_input: bool) -> Any:
        self.made += 1
        call(*examples)
        inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in examples]
        output = call(*examples).detach().clone()
        recorder = self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Tensor) -> Tensor:
                recorder.replays += 1
                for mine, theirs in zip(inputs, given, strict=True):
                    mine.detach().copy_(theirs)
                with torch.set_grad_enabled(any(each.requires_grad for each in inputs)):
                    ctx.found = call(*inputs)
                output.copy_(ctx.found.detach())
                return output.detach()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
                wanted = [each for each in inputs if each.requires_grad]
                found = iter(torch.autograd.grad(ctx.found, wanted, gradient, allow_unused=True))
                return tuple(next(found) if each.requires_grad else None for each in inputs)

        return Replay.apply


def inputs(seed: int, rows: int = 2, offsets: bool = False) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    beside = None
    if offsets:
        which = torch.arange(rows) % 2
        beside = RowOffsets({LAYER: (normal(2, 4, 32), normal(2, 64, 4))}, torch.ones(2).double(), which)
    latents, keys, values = normal(rows, 4, 16, 16).detach(), normal(1, rows, 77, 32), normal(1, rows, 77, 32)
    when = torch.randint(1000, (rows,), generator=generator)
    return latents, when, Conditioning(keys, values if offsets else None, row_offsets=beside)


def leaves(states: Conditioning) -> list[Tensor]:
    found = [states.keys, *([] if states.values is None else [states.values])]
    return found + [
        each for tensors in (states.row_offsets.changes.values() if states.row_offsets else ()) for each in tensors
    ]


def test_a_pooled_row_and_sizes_are_inputs_of_the_graph() -> None:
    """Of SDXL: another text or another size is another answer of the same graph."""
    stack, recorder = tiny_sdxl(seed=0, size=64).double(), Recorder()
    graphs = CudaGraphs(stack._call, recorder)
    latents, when = torch.ones(1, 4, 8, 8, dtype=torch.float64), torch.tensor([300])
    for number in range(SEEN + 3):
        states = stack.condition_text(["a cat", "a dog on a mat"]).rows([number % 2]).to(torch.float64)
        assert states.sizes is not None
        states = states.sized(states.sizes * (1 + number))
        with torch.no_grad():
            found, expected = graphs(latents, when, states), stack._call(latents, when, states)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert recorder.made == 1 and recorder.replays == 3


@pytest.mark.parametrize("offsets", [False, True])
def test_replayed_calls_give_what_eager_ones_do(stack, offsets) -> None:
    recorder = Recorder()
    graphs = CudaGraphs(stack._call, recorder)
    for seed in range(SEEN + 3):
        call, same = inputs(seed, offsets=offsets), inputs(seed, offsets=offsets)
        found, expected = graphs(*call), stack._call(*same)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        found.square().sum().backward()
        expected.square().sum().backward()
        for mine, theirs in zip(leaves(call[2]), leaves(same[2]), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=1e-8)
    assert recorder.made == 1 and recorder.replays == 3


def test_an_answer_outlives_the_next_one(stack) -> None:
    graphs = CudaGraphs(stack._call, Recorder())
    with torch.no_grad():
        answers = [(graphs(*inputs(seed)), stack._call(*inputs(seed))) for seed in range(SEEN + 3)]
    for found, expected in answers:
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_second_call_before_the_backward_of_the_first_runs_eagerly(stack) -> None:
    """Its replay would overwrite what the first one's backward reads."""
    recorder = Recorder()
    graphs = CudaGraphs(stack._call, recorder)
    for seed in range(SEEN + 1):
        graphs(*inputs(seed)).sum().backward()
    assert recorder.replays == 1
    first, second = inputs(7), inputs(8)
    (graphs(*first).sum() + graphs(*second).square().sum()).backward()
    assert recorder.replays == 2
    same = inputs(7), inputs(8)
    (stack._call(*same[0]).sum() + stack._call(*same[1]).square().sum()).backward()
    for call, other in zip((first, second), same, strict=True):
        torch.testing.assert_close(call[2].keys.grad, other[2].keys.grad, atol=1e-10, rtol=1e-8)
    graphs(*inputs(9)).sum().backward()
    assert recorder.replays == 3


def test_each_form_has_its_own_graph_and_there_are_not_too_many(stack, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    recorder = Recorder()
    graphs = CudaGraphs(stack._call, recorder)
    with torch.no_grad():
        for rows in (1, 2, 3):
            for seed in range(SEEN + 2):
                graphs(*inputs(seed, rows))
    assert recorder.made == 2 and recorder.replays == 4 and "further ones run without" in caplog.text


def test_what_cannot_be_recorded_runs_without(stack, caplog) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = CudaGraphs(stack._call, refuses)
    with torch.no_grad():
        for seed in range(SEEN + 2):
            torch.testing.assert_close(graphs(*inputs(seed)), stack._call(*inputs(seed)), atol=1e-12, rtol=0)
    assert caplog.text.count("cannot be recorded") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_switch_is_refused() -> None:
    with pytest.raises(UserError, match="sees no GPU"):
        tiny(seed=0, size=64).optimise(
            channels_last=False, compile=False, gradient_checkpointing=False, cuda_graphs=True
        )
    with pytest.raises(UserError, match="goes with neither"):
        tiny(seed=0, size=64).optimise(
            channels_last=False, compile=True, gradient_checkpointing=False, cuda_graphs=True
        )
