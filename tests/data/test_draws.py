"""Draws are pure functions of (seed, purpose, sample number), and their streams are pinned by fixed values."""

import random

import numpy as np
import torch

from hiperlab.draws import generator, integers, normal, uniform


def test_fixed_values() -> None:
    """Committed numbers: if numpy, the key or the hash changes, every published seed would mean something else."""
    expected = torch.tensor(NORMAL)
    torch.testing.assert_close(normal(0, "noise", [0, 1], (2,)), expected, atol=1e-6, rtol=0)
    assert integers(0, "timestep", range(6), 1000).tolist() == INTEGERS
    torch.testing.assert_close(uniform(7, "flip", [0, 1]), torch.tensor(UNIFORM, dtype=torch.float64))
    assert generator(1, "order", 0).permutation(8).tolist() == ORDER


def test_order_and_neighbours_do_not_matter() -> None:
    together = normal(3, "noise", [5, 9, 7], (2, 4))
    assert torch.equal(together[1:2], normal(3, "noise", [9], (2, 4)))
    assert torch.equal(together.flip(0), normal(3, "noise", torch.tensor([7, 9, 5]), (2, 4)))
    assert integers(3, "t", [5, 9], 10**6).tolist()[::-1] == integers(3, "t", [9, 5], 10**6).tolist()


def test_seed_purpose_and_number_all_matter() -> None:
    keys: list[tuple] = [
        (0, "a", 1),
        (1, "a", 1),
        (0, "b", 1),
        (0, "a", 2),
        (0, "a", 1, 0),
        (
            0,
            "a1",
        ),
        (0, "a11"),
        (0, "a", 11),
    ]
    assert len({generator(*key).integers(2**62) for key in keys}) == len(keys)


def test_global_generators_neither_matter_nor_move() -> None:
    def draws() -> list[float]:
        return [*normal(0, "noise", [4], (3,)).flatten().tolist(), *uniform(0, "flip", [4]).tolist()]

    first = draws()
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()
        assert draws() == first
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state(legacy=False)["state"]["key"]).all()
        assert before[2] == random.getstate()


def test_distributions_are_what_they_say() -> None:
    z = normal(11, "noise", range(400), (50,))
    assert z.dtype == torch.float32 and z.shape == (400, 50)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03  # 4 standard errors
    u = uniform(11, "u", range(4000))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    t = integers(11, "t", range(4000), 4)
    assert t.dtype == torch.long and t.min() == 0 and t.max() == 3
    assert (torch.bincount(t, minlength=4) - 1000).abs().max() < 120


def test_no_samples_give_empty_tensors() -> None:
    assert normal(0, "noise", [], (2, 3)).shape == (0, 2, 3)
    assert integers(0, "t", [], 5).shape == (0,) and uniform(0, "u", []).shape == (0,)


# Worked out once with numpy 2.4 on x86-64.
NORMAL = [[-1.80638111, -1.45709443], [-0.90782243, 1.24164283]]
INTEGERS = [112, 338, 327, 374, 350, 762]
UNIFORM = [0.24914967506178387, 0.7733148209623346]
ORDER = [0, 3, 4, 2, 1, 7, 6, 5]
