"""A method and its yaml are compared before anything is loaded; what differs is one line."""

from __future__ import annotations

import pytest

from hiperlab.base.capability import Exportable
from hiperlab.errors import UserError
from hiperlab.method.ti import TextualInversion
from hiperlab.run.session import check_method
from tests.composed import METHODS, quick


class Unfinished(TextualInversion, Exportable):
    """Writes nothing more; `composition_part` is taken away below."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_its_yaml_agree(name: str) -> None:
    check_method(quick(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_target_": "hiperlab.method.ti.Nothing"},
            r"cannot be loaded: module 'hiperlab\.method\.ti' has no attribute",
        ),
        ({"_target_": "hiperlab.method.nothing.Nothing"}, "cannot be loaded: No module named"),
        ({"strength": 1}, "the class takes no strength"),
        ({"num_vectors": None}, "the yaml lacks num_vectors"),
        ({"_target_": f"{__name__}.Unfinished"}, r"does not write composition_part, which its bases ask of it"),
    ],
)
def test_what_differs_is_named(change, message, monkeypatch) -> None:
    monkeypatch.setattr(Unfinished, "__abstractmethods__", frozenset({"composition_part"}))
    settings = {**quick("ti"), **change}
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        check_method(settings)
    assert "\n" not in str(caught.value)
