"""Batches are a pure function of (seed, micro step, rank, world size), however they are fetched."""

import random
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from hiperlab.data import module
from hiperlab.data.batch import Batch
from hiperlab.data.dataset import DataSet
from hiperlab.data.images import in_range, to_levels, to_pixels
from hiperlab.data.module import ConceptData, MicroBatches, view_order
from hiperlab.data.world import load_named
from hiperlab.errors import UserError

SIZE = 16


def cats(*names: str, flip: float = 0.5) -> DataSet:
    return load_named(
        list(names), 64, placeholder=None, word=None, property="object", prompts=None, class_noun="none",
        captions="auto", masks="auto", max_views=None, held_out=0, references=None, center_crop=False, flip=flip,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one() -> DataSet:
    return cats("puppy")


@pytest.fixture(scope="module")
def four() -> DataSet:
    return cats("cats", "puppy", "teddy", "bunny")


def data(dataset: DataSet, rows: int = 2, accumulate: int = 1, workers: int = 0, **trainer: int) -> ConceptData:
    """A data module, attached to a stand-in trainer if its numbers are given."""
    made = ConceptData(dataset, seed=5, size=SIZE, micro_batch_size=rows, accumulate=accumulate, num_workers=workers)
    if trainer:
        made.trainer = SimpleNamespace(**{"global_step": 0, "global_rank": 0, "world_size": 1, **trainer})  # type: ignore
    return made


def first(made: ConceptData, count: int) -> list[Batch]:
    return list(islice(iter(made.train_dataloader()), count))


def equal(a: Batch, b: Batch) -> bool:
    return a.prompts == b.prompts and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.pixels, batch.concept, batch.sample, batch.view, batch.flip]


def rows_of(batch: Batch, keep: torch.Tensor) -> Batch:
    """The rows where `keep` is true."""
    prompts = [p for p, k in zip(batch.prompts, keep.tolist()) if k]
    return Batch(batch.pixels[keep], prompts, *(x if x is None else x[keep] for x in batch[2:]))


def test_what_a_batch_holds(four: DataSet) -> None:
    batch = first(data(four, rows=3), 2)[1]
    assert batch.pixels.shape == (12, 3, SIZE, SIZE) and batch.pixels.dtype == torch.float32
    assert batch.concept.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert batch.sample.tolist() == [3, 4, 5] * 4
    for i, prompt in enumerate(batch.prompts):
        concept = four.concepts[batch.concept[i]]
        assert prompt in {t.replace("{}", concept.placeholder) for t in concept.templates}
        expected = to_pixels(concept.views[batch.view[i]], SIZE, "squeeze", bool(batch.flip[i]))
        assert torch.equal(batch.pixels[i], expected)


def test_started_later_is_the_same_stream(four: DataSet) -> None:
    whole = first(data(four, accumulate=2), 9)
    resumed = first(data(four, accumulate=2, global_step=3), 3)
    assert all(equal(a, b) for a, b in zip(whole[6:], resumed, strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_two_ranks_are_one_rank_with_twice_the_rows(four: DataSet, rows: int) -> None:
    together = first(data(four, rows=2 * rows), 6)
    ranks = [first(data(four, rows=rows, global_rank=r, world_size=2), 6) for r in (0, 1)]
    for m, batch in enumerate(together):
        assert sorted(set(batch.sample.tolist())) == list(range(2 * rows * m, 2 * rows * (m + 1)))
        for r in (0, 1):
            assert equal(rows_of(batch, batch.sample // rows % 2 == r), ranks[r][m])


def test_two_micro_batches_are_one_larger(one: DataSet) -> None:
    """The out-of-memory remedy: half the rows, twice the accumulation, the same samples at a step."""
    large = first(data(one, rows=4), 2)
    small = first(data(one, rows=2, accumulate=2), 4)
    for step, batch in enumerate(large):
        joined = torch.cat([b.pixels for b in small[2 * step : 2 * step + 2]])
        assert torch.equal(batch.pixels, joined)


def test_alone_and_among_four(one: DataSet, four: DataSet) -> None:
    for alone, among in zip(first(data(one), 8), first(data(four), 8), strict=True):
        own = rows_of(among, among.concept == 1)
        assert equal(alone, own._replace(concept=alone.concept))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(four: DataSet, workers: int) -> None:
    ours, theirs = first(data(four), 7), first(data(four, workers=workers), 7)
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_neither_matter_nor_move(one: DataSet, workers: int) -> None:
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state()
        runs.append(first(data(one, workers=workers), 4))
        assert torch.equal(before, torch.get_rng_state())
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_epoch_shows_every_view_once_in_a_new_order() -> None:
    orders = [view_order(0, range(5 * e, 5 * e + 5), 5) for e in range(20)]
    assert all(sorted(o) == [0, 1, 2, 3, 4] for o in orders)
    assert len({tuple(o) for o in orders}) > 10
    assert view_order(0, [7, 3], 5) == [orders[1][2], orders[0][3]]  # any samples, any order


def test_flips_and_templates_follow_their_probabilities(one: DataSet) -> None:
    batches = [MicroBatches(one, 0, 8, 64, 0, 1)[m] for m in range(20)]
    flips = torch.cat([b.flip for b in batches]).float().mean()
    assert abs(flips - 0.5) < 0.06
    assert len({p for b in batches for p in b.prompts}) == 27
    assert not MicroBatches(cats("cats", flip=0.0), 0, 8, 64, 0, 1)[0].flip.any()
    assert MicroBatches(cats("cats", flip=1.0), 0, 8, 64, 0, 1)[0].flip.all()


def test_another_seed_is_another_stream(one: DataSet) -> None:
    a, b = (MicroBatches(one, seed, SIZE, 16, 0, 1)[0] for seed in (0, 1))
    assert a.prompts != b.prompts and a.view.tolist() != b.view.tolist() and a.flip.tolist() != b.flip.tolist()


def test_pixels_are_worked_out_once_and_only_while_they_fit(one: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return to_levels(*args, **kwargs)

    monkeypatch.setattr(module, "to_levels", counted)
    stream = MicroBatches(one, 0, SIZE, 5, 0, 1)
    before = [stream[m] for m in range(4)]
    assert len(calls) == 5
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * 3 * SIZE * SIZE)
    small = MicroBatches(one, 0, SIZE, 5, 0, 1)
    assert all(equal(a, small[m]) for m, a in enumerate(before)) and len(small.cache.kept) == 2
    before[0].pixels.zero_()  # a batch is the receiver's own: writing into it must not reach the cache
    assert not torch.equal(stream[0].pixels, before[0].pixels)


def test_a_random_crop_is_a_pure_function_of_the_sample_number(one: DataSet) -> None:
    """Every place along the long side occurs, pixels are those of that place, and micro batches do not matter."""
    ramp = Image.fromarray(np.tile(np.arange(4 * SIZE, dtype=np.uint8), (2 * SIZE, 1))).convert("RGB")  # 64 x 32
    concept = replace(one.concepts[0], views=(ramp,), sources=("ramp",))
    wide = replace(one, concepts=(concept,), crop="random", flip=0.0)
    batch = MicroBatches(wide, 0, SIZE, 96, 0, 1)[0]
    assert batch.offset is not None and set(batch.offset.tolist()) == set(range(SIZE + 1))
    whole = to_levels(ramp, SIZE, "random")
    assert whole.shape == (3, SIZE, 2 * SIZE)
    for row in range(0, 96, 7):
        start = int(batch.offset[row])
        assert torch.equal(batch.pixels[row], in_range(whole[:, :, start : start + SIZE]))
    assert batch.sizes is not None
    assert batch.sizes.tolist() == [[32, 64, 0, int(start), SIZE, SIZE] for start in batch.offset]
    small = MicroBatches(wide, 0, SIZE, 2, 0, 1)
    assert torch.equal(torch.cat([small[m].pixels for m in range(48)]), batch.pixels)
    assert MicroBatches(replace(wide, crop="middle"), 0, SIZE, 2, 0, 1)[0].offset is None


@pytest.mark.parametrize(
    ("crop", "turned", "flip", "expected"),
    [
        ("squeeze", False, 0.0, [32, 64, 0, 0]),  # nothing is cut off
        ("square", False, 0.0, [32, 64, 0, 8]),
        ("middle", False, 0.0, [32, 64, 0, 8]),
        ("middle", True, 1.0, [64, 32, 8, 0]),
        ("random", True, 1.0, [64, 32, None, 0]),
        ("random", False, 1.0, [32, 64, 0, None]),
    ],
)
def test_sizes_say_what_was_cut(one: DataSet, crop, turned, flip, expected) -> None:
    """Height, width, top and left, the side; the corner is that in the mirrored picture, where it is mirrored."""
    ramp = Image.fromarray(np.tile(np.arange(4 * SIZE, dtype=np.uint8), (2 * SIZE, 1))).convert("RGB")  # 64 x 32
    picture = ramp.transpose(Image.Transpose.TRANSPOSE) if turned else ramp
    concept = replace(one.concepts[0], views=(picture,), sources=("ramp",))
    batch = MicroBatches(replace(one, concepts=(concept,), crop=crop, flip=flip), 0, SIZE, 8, 0, 1)[0]
    assert batch.sizes is not None and batch.flip.tolist() == [bool(flip)] * 8
    for row, offset in enumerate([None] * 8 if batch.offset is None else batch.offset.tolist()):
        corner = None if offset is None else SIZE - offset if flip and not turned else offset
        assert batch.sizes[row].tolist() == [*(corner if each is None else each for each in expected), SIZE, SIZE]


class Recorder(pl.LightningModule):
    """One weight; remembers the sample numbers it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen += batch.sample.tolist()
        return (self.weight - batch.pixels.mean()).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_lightning_run_goes_on_where_it_stopped(one: DataSet, tmp_path, workers: int) -> None:
    """The real trainer: 2 steps, checkpoint, 3 more, against 5 in one go; 2 micro batches a step, 2 rows each."""

    def fit(steps: int, resume: str | None = None) -> tuple[Recorder, pl.Trainer]:
        model = Recorder()
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data(one, accumulate=2, workers=workers), ckpt_path=resume, weights_only=True)
        return model, trainer

    whole, _ = fit(5)
    assert whole.seen == list(range(20))
    part, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = fit(5, str(tmp_path / "a.ckpt"))
    assert part.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("setting", [{"rows": 0}, {"accumulate": 0}, {"workers": -1}])
def test_numbers_out_of_range(one: DataSet, setting: dict) -> None:
    with pytest.raises(UserError, match="is too small"):
        data(one, **setting)
