"""Shared fixtures. One tiny stack serves the session: it is frozen, and tests check that it stays so."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from hiperlab.model.tiny import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two OpenMP threads on two busy cores are far slower than one each."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stack():
    """The twin at 128 px (16 x 16 latents), float32."""
    return tiny(seed=0, size=128)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how close the parity tests came: the largest error of each golden item."""
    from tests.parity.golden import WORST

    if WORST:
        terminalreporter.section("largest error per golden item")
        for item, error in sorted(WORST.items()):
            terminalreporter.write_line(f"{item:<34} {error:.1e}")
