"""What a comparison reads: the recorded folder that its module names as `GOLDEN`, whole or as the committed slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.parity import golden


@pytest.fixture(scope="module", params=["golden", "slice"])
def source(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(source, request) -> Path:
    name = request.module.GOLDEN
    return golden.folder(name) if source == "golden" else golden.SLICE / name


@pytest.fixture(scope="module")
def g(root) -> dict[str, Tensor]:
    """The recorded tensors; one that the slice leaves out skips the test."""
    return golden.tensors(root / "golden.safetensors")


@pytest.fixture(scope="module")
def meta(root) -> dict[str, Any]:
    return golden.config(root / "meta.json")
