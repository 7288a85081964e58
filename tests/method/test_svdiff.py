"""SVDiff: the rectifier by hand, which layers move, two rates, decay, several subjects, files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hiperlab.base.composition import Composition
from hiperlab.errors import UserError
from hiperlab.method.svdiff import SVDiff
from hiperlab.model.offsets import Added, Offsets
from hiperlab.model.spectral import Shifted, Spectrum, decomposed, spectra
from hiperlab.model.weight_changes import sum_changes
from tests.composed import SUBJECTS, build, kept, train

CAT = SUBJECTS[0]


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_by_hand() -> None:
    """diag(3, 1): the first value moves by half of 2, the second falls to 0 and not below."""
    w = torch.diag(torch.tensor([3.0, 1.0]))
    shifted = Shifted(decomposed(w), torch.tensor([2.0, -4.0]), 0.5).apply(w)
    torch.testing.assert_close(shifted, torch.diag(torch.tensor([4.0, 0.0])), atol=1e-6, rtol=0)


def test_a_norm_layers_weight_is_one_number_long() -> None:
    """W' = w relu(|w| + delta) / |w|: longer or shorter, never another direction."""
    w = torch.tensor([3.0, -4.0])
    torch.testing.assert_close(Shifted(decomposed(w), torch.tensor([5.0])).apply(w), 2 * w, atol=1e-6, rtol=0)
    gone = Shifted(decomposed(w), torch.tensor([-6.0])).apply(w)
    torch.testing.assert_close(gone, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 3, 3), (7,)])
def test_is_the_product_of_three_matrices(shape) -> None:
    w = weight(*shape)
    u, s, vt = torch.linalg.svd(w.reshape(1, -1) if w.dim() == 1 else w.reshape(len(w), -1), full_matrices=False)
    shift = weight(len(s) + 20)[: len(s)]
    naive = (u @ torch.diag((s - 1.5 * shift).clamp(min=0)) @ vt).reshape(shape)
    torch.testing.assert_close(Shifted(decomposed(w), shift, -1.5).apply(w), naive, atol=1e-5, rtol=0)
    assert torch.equal(Shifted(decomposed(w), 0 * shift).apply(w), w), "without a shift bit for bit"


def test_every_layer_of_both_networks_has_shifts(stack) -> None:
    method = build("svdiff", stack, [CAT])
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    for module, own in ((stack.unet, method.unet_shifts), (stack.text_module, method.text_shifts)):
        weights = {name for name, value in module.named_parameters() if name.endswith(".weight")}
        assert {f"{key.replace('/', '.')}.weight" for key in own} == weights, "biases stay, every weight moves"
        for name, layer in module.named_modules():
            if isinstance(layer, kinds):
                numbers = own[name.replace(".", "/")].numel()
                one = isinstance(layer, nn.GroupNorm | nn.LayerNorm)
                assert numbers == (1 if one else min(layer.weight.flatten(1).shape))
    assert not build("svdiff", stack, [CAT], text_encoder=False).text_shifts


def test_decomposed_once_per_network(stack, monkeypatch) -> None:
    build("svdiff", stack, [CAT])
    monkeypatch.setattr("hiperlab.model.spectral.decomposed", None)
    assert spectra(stack.unet) is spectra(stack.unet)
    build("svdiff", stack, [CAT])


def test_norm_layers_have_their_own_rate(stack) -> None:
    """Adam's first step is the rate itself; nothing is decayed yet, as shifts start at 0."""
    method = build("svdiff", stack, [CAT], norm_lr=3e-5)
    train(method, 1)
    every = [*method.unet_shifts.items(), *method.text_shifts.items()]
    for norm, rate in ((True, 3e-5), (False, 1e-3)):
        moved = max(float(shift.detach().abs().max()) for name, shift in every if ("norm" in name) == norm)
        assert moved == pytest.approx(rate, rel=1e-3)


def test_decay_pulls_towards_the_frozen_weights(stack) -> None:
    """AdamW with no gradient multiplies a shift by 1 - lr decay, in each group by its own rate."""
    changes = {"optimizer": {"lr": 0.1, "weight_decay": 0.5}, "norm_lr": 0.01}
    method = kept("svdiff", stack, CAT, **changes)
    optimizer = method.configure_optimizers()
    before = {name: value.clone() for name, value in method.named_parameters() if value.requires_grad}
    for value in method.parameters():
        value.grad = torch.zeros_like(value) if value.requires_grad else None
    optimizer.step()
    now = dict(method.named_parameters())
    for name, value in before.items():
        torch.testing.assert_close(now[name].detach(), value * (0.995 if "norm" in name else 0.95))


def test_gradients_of_both_networks_are_clipped_together(stack) -> None:
    method = build("svdiff", stack, [CAT])
    optimizer = method.configure_optimizers()
    for value in method.parameters():
        value.grad = torch.ones_like(value) if value.requires_grad else None
    method.configure_gradient_clipping(optimizer, 1.0)
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert float(torch.cat([g.flatten() for g in gradients]).norm()) == pytest.approx(1.0, abs=1e-4)
    assert len({float(g.max()) for g in gradients}) == 1


def test_several_subjects_add_their_shifts_before_the_rectifier() -> None:
    """1 - 2 + 1.5 leaves 0.5; changes added up as differences would leave 1.5."""
    w = torch.ones(1, 1)
    spectrum = Spectrum(w, w[0], w)
    down, up = Shifted(spectrum, torch.tensor([-1.0]), 2.0), Shifted(spectrum, torch.tensor([1.5]))
    both = sum_changes([Offsets({"w": down}), Offsets({"w": up}), Offsets({"w": Added(torch.full((1, 1), 10.0))})])
    assert both is not None
    assert float(both.changes["w"].apply(w)) == pytest.approx(10.5)
    assert float(sum_changes([Offsets({"w": down}), Offsets({"w": up})]).changes["w"].apply(w)) == pytest.approx(0.5)


def test_two_are_drawn_together(stack) -> None:
    methods = [kept("svdiff", stack, subject, seed) for seed, subject in enumerate(SUBJECTS[:2])]
    composition = Composition(methods)
    composition.materialise_weights()
    ours = composition._unet.changes["conv_in.weight"].apply(None)
    total = sum(method.unet_shifts["conv_in"][0] for method in methods)
    frozen = stack.unet.get_parameter("conv_in.weight")
    torch.testing.assert_close(ours, Shifted(decomposed(frozen), total).apply(frozen))


def test_strengths_are_variants(stack) -> None:
    method = kept("svdiff", stack, CAT, strength=[1.0, 0.0, -1.0]).eval()
    draw = {v: method.sample(["a <my-cat>"], [1], steps=1, guidance=7.5, variant=v) for v in method.variants}
    bare = build("svdiff", stack, [CAT]).eval().sample(["a <my-cat>"], [1], steps=1, guidance=7.5)
    torch.testing.assert_close(draw["strength=0.0"], bare, atol=1e-5, rtol=0)
    assert float((draw["strength=1.0"] - draw["strength=-1.0"]).abs().max()) > 1e-3
    changes = method.changed_weights("strength=-1.0").unet.changes.values()
    assert {change.scale for change in changes} == {-1.0}


def test_files(stack, tmp_path) -> None:
    method = kept("svdiff", stack, CAT)
    unet, text = method.export(0, tmp_path, 1)
    assert all(key.startswith("text_model.") for key in load_file(text)) and "conv_in.delta" in load_file(unet)
    other = kept("svdiff", stack, CAT, seed=2)
    for given in (unet, text):  # either of the two
        other.load_foreign(0, given)
        assert all(torch.equal(a, b) for a, b in zip(method.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match="text_encoder=true"):
        build("svdiff", stack, [CAT], text_encoder=False).load_foreign(0, unet)
    save_file({key.removeprefix("text_model."): value for key, value in load_file(text).items()}, text)
    other.load_foreign(0, unet)  # today's names of the text encoder
    assert torch.equal(other.text_shifts["final_layer_norm"], method.text_shifts["final_layer_norm"])
    text.unlink()
    other.load_foreign(0, unet)
    assert not any(value.any() for value in other.text_shifts.values()), "no second file: the frozen text encoder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states.pop("conv_in.delta"), "another network: conv_in differ"),
        (lambda states: states.update({"conv_in.delta": torch.zeros(1)}), "another network: conv_in differ"),
        (lambda states: states.update({"conv_in.weight": torch.zeros(1)}), "no spectral shifts: conv_in.weight"),
        (lambda states: states.clear(), "it is empty"),
    ],
)
def test_foreign_files_are_refused(change, message, stack, tmp_path) -> None:
    path, _ = kept("svdiff", stack, CAT).export(0, tmp_path, 1)
    states = load_file(path)
    change(states)
    save_file(states, path)
    with pytest.raises(UserError, match=message):
        build("svdiff", stack, [CAT]).load_foreign(0, path)


@pytest.mark.parametrize(("changes", "message"), [({"norm_lr": 0.0}, "above 0"), ({"strength": []}, "draws nothing")])
def test_settings_are_refused(changes, message, stack) -> None:
    with pytest.raises(UserError, match=message):
        build("svdiff", stack, [CAT], **changes)


def test_trains_alone_and_says_why() -> None:
    assert not SVDiff.stacks_concepts and "weights" in SVDiff.why_alone
