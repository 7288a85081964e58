"""Imagic's own promises; its numbers are in tests/parity/test_imagic.py."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from hiperlab.base.method import Step, Subject
from hiperlab.errors import UserError
from hiperlab.method.imagic import Imagic, interpolate
from tests.composed import ROOT, SUBJECTS, batch, build, train

DOG = Subject("dog", "<dog>", "dog", "a standing dog", ("a sitting dog",))


def condition(method, text, variant=""):
    with torch.no_grad():
        return method.condition(Step([text], torch.tensor([0]), torch.tensor([0]), variant=variant))


def trained_names(method, samples) -> set[str]:
    method.zero_grad()
    method.training_step(batch([DOG], samples), 0).backward()
    return {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}


def test_interpolation_by_hand() -> None:
    target, optimized = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0])
    assert interpolate(target, optimized, 0.0).tolist() == [1, 0]
    assert interpolate(target, optimized, 1.0).tolist() == [2, 4]
    assert interpolate(target, optimized, 1.5).tolist() == [2.5, 6]


def test_phases_follow_from_the_sample_number(stack) -> None:
    """5 steps of 3 samples, 40 % of them phase A: samples 0 to 5; whatever else happened before does not matter."""
    method = build("imagic", stack, [DOG], steps=5, batch_size=3)
    assert method.embedding_steps == 2
    assert trained_names(method, [12, 13, 14]) == {"offsets"}
    assert trained_names(method, [3, 4, 5]) == {"embedding"}
    assert trained_names(method, [0]) == {"embedding"}
    assert trained_names(method, [6]) == {"offsets"}


@pytest.mark.parametrize(("share", "phase_a"), [(0.4, 1000), (0.33334, 833), (0.0, 0), (1.0, 2500)])
def test_share_of_the_published_steps(stack, share, phase_a) -> None:
    assert build("imagic", stack, [DOG], steps=2500, embedding_share=share).embedding_steps == phase_a


def test_diffusers_experiment_has_its_500_and_1000_steps() -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", overrides=["experiment=imagic_diffusers", "hydra/launcher=basic"])
    assert cfg.method.steps == 1500 and round(cfg.method.embedding_share * cfg.method.steps) == 500
    assert cfg.method.model_lr == 2e-6 and cfg.method.optimizer.lr == 1e-3 and cfg.method.weights == "all"


def test_rates_of_the_phases(stack) -> None:
    text, weights = build("imagic", stack, [DOG]).configure_optimizers().param_groups
    assert text["lr"] == 2e-3 and weights["lr"] == 5e-7
    assert len(text["params"]) == 1 and len(weights["params"]) == 16 * 5  # q, k, v, out and its bias in each layer


def test_what_sampling_reads(stack) -> None:
    method = build("imagic", stack, [DOG], eta=[0.7, 0.2])
    assert method.variants == ("eta=0.7", "eta=0.2")
    with torch.no_grad():
        method.embedding.add_(1.0)
    fitted, target = method.embedding.detach()[0], stack.encode_text(["a sitting dog"])[0]
    for variant, eta in (("", 0.7), ("eta=0.2", 0.2), ("eta=1.2", 1.2)):
        states = condition(method, "a sitting <dog>", variant).keys[0, 0]
        torch.testing.assert_close(states, eta * target + (1 - eta) * fitted, atol=1e-5, rtol=0)
        assert torch.equal(condition(method, "a standing <dog>", variant).keys[0, 0], fitted), "source: the picture"


def test_weights_change_pictures_and_not_the_stack(stack) -> None:
    method = build("imagic", stack, [DOG])
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    how = {"steps": 2, "guidance": 7.5}
    plain = method.sample(["a sitting <dog>"], [1], **how)
    with torch.no_grad():
        for value in method.offsets.values():
            value.add_(0.05)
    assert not torch.allclose(method.sample(["a sitting <dog>"], [1], **how), plain, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


@pytest.mark.parametrize(("weights", "count"), [("cross", 80), ("attention", 160), ("all", 684)])
def test_choices_of_weights(stack, weights, count, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        method = build("imagic", stack, [DOG], weights=weights)
    assert len(method.offsets) == count
    assert ("GB besides the model" in caplog.text) == (weights == "all"), "the largest choice says what it costs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "none"}, "Choose cross, attention, all"),
        ({"embedding_share": 40}, "choose 0 to 1"),
        ({"eta": []}, "draws nothing"),
    ],
)
def test_mistakes_are_named(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build("imagic", stack, [DOG], **changes)


def test_several_pictures_or_processes_are_refused(stack, monkeypatch) -> None:
    with pytest.raises(UserError, match="one concept at a time"):
        build("imagic", stack, SUBJECTS[:2])
    method = build("imagic", stack, [DOG])
    monkeypatch.setattr(Imagic, "trainer", SimpleNamespace(world_size=2))
    with pytest.raises(UserError, match=r"trainer\.devices=1"):
        method.on_fit_start()


def test_micro_batches_do_not_matter_in_phase_a(stack) -> None:
    def gradient(parts):
        method = build("imagic", stack, [DOG], steps=10, batch_size=4)
        for part in parts:
            (method.training_step(batch([DOG], part), 0) * len(part) / 4).backward()
        return method.embedding.grad

    whole, halves = gradient([[0, 1, 2, 3]]), gradient([[0, 1], [2, 3]])
    torch.testing.assert_close(whole, halves, atol=1e-4 * float(whole.abs().max()), rtol=0)


def test_files_of_the_public_code(stack, tmp_path, caplog) -> None:
    method = build("imagic", stack, [DOG])
    train(method, 1)
    optimized, target, text = method.export(0, tmp_path, steps=1)
    assert text.read_text() == "a sitting dog"
    rows = torch.load(target, weights_only=True)
    assert rows.shape == (1, 77, 32) and rows.dtype == torch.float32
    torch.testing.assert_close(rows[0].detach(), stack.encode_text(["a sitting dog"])[0], atol=1e-6, rtol=0)
    fresh = build("imagic", stack, [DOG])
    with caplog.at_level(logging.WARNING):
        fresh.load_foreign(0, optimized)
    assert torch.equal(fresh.embedding, method.embedding) and "phase A only" in caplog.text
    with pytest.raises(UserError, match="nothing fitted"):
        fresh.load_foreign(0, target)
    torch.save(torch.zeros(1, 5, 32), tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"holds an embedding \(5, 32\)"):
        fresh.load_foreign(0, tmp_path / "short.pt")
