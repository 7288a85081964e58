"""Work that waits for the U-Net at the same time shares its calls, and gets what it would get alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from hiperlab.model.attention_control import Record, cross_maps
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import Added, Offsets
from hiperlab.model.row_offsets import RowOffsets
from hiperlab.model.shared_calls import Call, Calls, alone, together, within
from hiperlab.model.tiny import tiny

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def stack():
    return tiny(seed=0, size=128).double()


@pytest.fixture
def sizes(stack, monkeypatch):
    """Rows of each call that the U-Net really gets."""
    found: list[int] = []
    plain = stack.predict

    def predict(latents, timestep, conditioning):
        found.append(len(latents))
        return plain(latents, timestep, conditioning)

    monkeypatch.setattr(stack, "predict", predict)
    return found


def call(seed: int, rows: int, **how) -> Call:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, 16, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(how.pop("layers", 1), rows, 77, 32, generator=generator, dtype=torch.float64)
    when = torch.randint(1000, (rows,), generator=generator)
    return Call(latents, when, Conditioning(states.requires_grad_(), **how))


def chain(seed: int, rows: int, length: int, **how) -> Calls[torch.Tensor]:
    """So many calls, each from what the one before found."""
    step = call(seed, rows, **how)
    latents = step.latents
    for _ in range(length):
        latents = (yield Call(latents, step.timestep, step.conditioning)) / 2
    return latents


def test_results_are_those_of_each_alone(stack, sizes) -> None:
    """Different numbers of rows, of calls and of states per layer; one ends before the others, one asks nothing."""
    works = [(0, 2, 3, {}), (1, 1, 1, {"layers": 16}), (2, 3, 2, {}), (3, 1, 0, {})]
    expected = [alone(stack, chain(*work, **how)) for *work, how in works]
    assert sizes == [2, 2, 2, 1, 3, 3]
    sizes.clear()
    found = together(stack, [chain(*work, **how) for *work, how in works])
    assert sizes == [6, 5, 2]
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-12, rtol=0)


def test_gradients_stay_with_their_own(stack) -> None:
    def grad(rows: int, many: bool) -> list[torch.Tensor]:
        calls = [call(seed, rows) for seed in range(3)]

        def work(mine: Call) -> Calls[torch.Tensor]:
            return (yield mine).square().sum()

        losses = together(stack, map_works(work, calls)) if many else [alone(stack, work(each)) for each in calls]
        torch.stack(losses).sum().backward()
        return [each.conditioning.keys.grad for each in calls]  # type: ignore[misc]

    for mine, one in zip(grad(2, True), grad(2, False), strict=True):
        torch.testing.assert_close(mine, one, atol=1e-12, rtol=1e-10)


def map_works(work, calls):
    return [work(each) for each in calls]


def test_only_calls_of_one_kind_are_joined(stack, sizes) -> None:
    """Changed weights have a U-Net of their own; a call without a gradient is none with; other layers stay apart."""
    delta = torch.zeros_like(stack.unet.get_parameter(LAYER)) + 0.1
    which = torch.zeros(1, dtype=torch.long)
    beside = [RowOffsets({LAYER: (delta[None] * k,)}, torch.ones(1), which) for k in (1, 2)]

    @torch.no_grad()
    def quiet() -> Calls[torch.Tensor]:
        return (yield call(9, 1))

    def changed() -> Offsets:
        return Offsets({LAYER: Added(delta)})

    def makers():
        return [
            chain(0, 1, 1), chain(1, 1, 1), quiet(), quiet(),
            chain(2, 1, 1, offsets=changed()), chain(3, 1, 1, offsets=changed()),
            chain(4, 1, 1, row_offsets=beside[0]), chain(5, 1, 1, row_offsets=beside[1]),
        ]  # fmt: skip

    expected = [alone(stack, each) for each in makers()]
    sizes.clear()
    found = together(stack, makers())
    assert sorted(sizes) == [1, 1, 2, 2, 2]
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-12, rtol=0)
    assert found[0].requires_grad and not found[2].requires_grad


def test_changed_weights_that_can_be_had_beside_the_layers_are_shared(stack, sizes) -> None:
    """Alone a call takes them into the weights, bit for bit; two that differ go together, each row with its own."""
    delta = torch.zeros_like(stack.unet.get_parameter(LAYER)) + 0.1
    which, one = torch.zeros(2, dtype=torch.long), torch.ones(1, dtype=torch.float64)

    def work(k: int, **how) -> Calls[torch.Tensor]:
        return chain(k, 2, 1, offsets=Offsets({LAYER: Added(k * delta)}), **how)

    def both(k: int) -> Calls[torch.Tensor]:
        return work(k, row_offsets=RowOffsets({LAYER: (k * delta[None],)}, one, which))

    expected = [alone(stack, work(k)) for k in (1, 2)]
    assert all(torch.equal(alone(stack, both(k)), wanted) for k, wanted in zip((1, 2), expected, strict=True))
    sizes.clear()
    found = together(stack, [both(1), both(2)])
    assert sizes == [4]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(found[0], alone(stack, chain(1, 2, 1)), atol=1e-3)


def test_controls_see_their_own_rows(stack) -> None:
    def records() -> list[Record | None]:
        return [Record(cross_maps(16)), None, Record(cross_maps(64))]

    alone_, shared = records(), records()
    expected = [alone(stack, chain(k, k + 1, 1, control=control)) for k, control in enumerate(alone_)]
    found = together(stack, [chain(k, k + 1, 1, control=control) for k, control in enumerate(shared)])
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-12, rtol=0)
    for seen, wanted in zip(shared, alone_, strict=True):
        assert (seen is None) == (wanted is None)
        if seen is not None and wanted is not None:
            assert seen.maps.keys() == wanted.maps.keys() and seen.maps
            for layer, maps in wanted.maps.items():
                torch.testing.assert_close(seen.maps[layer], maps, atol=1e-12, rtol=0)


def test_calls_that_must_stay_apart_do(stack, sizes) -> None:
    """Rounding differs in a shared call, and a sampler that adds noise makes it grow."""
    calls = [call(0, 1), call(1, 1), replace(call(2, 2), apart=True)]

    def work(mine: Call) -> Calls[torch.Tensor]:
        return (yield mine)

    expected = alone(stack, work(calls[2]))
    sizes.clear()
    found = together(stack, map_works(work, calls))
    assert sizes == [2, 2] and torch.equal(found[2], expected)


def test_losses_wait_for_those_who_are_not_ready(stack, sizes) -> None:
    """Two that first have questions without a gradient, one and three of them, still share the call of their losses."""

    def work(seed: int, before: int) -> Calls[torch.Tensor]:
        step = call(seed, 1)
        yield from quietly(step, before)
        return (yield step).square().sum()

    @torch.no_grad()
    def quietly(step: Call, count: int) -> Calls[None]:
        for _ in range(count):
            yield Call(step.latents, step.timestep, step.conditioning)

    makers = [(0, 0), (1, 1), (2, 3)]
    expected = [alone(stack, work(*each)) for each in makers]
    sizes.clear()
    found = together(stack, [work(*each) for each in makers])
    assert sizes == [2, 1, 1, 3]
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-12, rtol=1e-12)


def test_a_context_is_left_while_a_work_waits(stack) -> None:
    """Also when it is given up, or fails."""
    inside: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        inside.append(name)
        try:
            yield
        finally:
            inside.remove(name)

    def work(name: str, calls: int) -> Calls[str]:
        try:
            for _ in range(calls):
                seen.append((name, list(inside)))
                yield call(0, 1)
            seen.append((name, list(inside)))
            if calls == 3:
                raise ValueError(name)
            return name
        finally:
            seen.append((f"{name} over", list(inside)))

    def contexts(*works: tuple[str, int]) -> list[Calls[str]]:
        return [within(partial(entered, name), work(name, calls)) for name, calls in works]

    assert together(stack, contexts(("a", 1), ("b", 2))) == ["a", "b"]
    assert all(found == [name.split(" ")[0]] for name, found in seen) and len(seen) == 7 and not inside
    with pytest.raises(ValueError, match="c"):
        alone(stack, contexts(("c", 3))[0])
    assert not inside
    (given_up,) = contexts(("d", 1))
    next(given_up)
    assert not inside
    given_up.close()
    assert seen[-1][0] == "d over" and not inside
