"""StyleDiffusion: its networks against torch's modules, its files, its schedule, resuming, and what it refuses."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hiperlab.errors import UserError
from hiperlab.formats import stylediffusion as files
from hiperlab.layer.mapping import MappingNetworks, value_rows, value_states
from hiperlab.model.vision_loader import tiny_tower
from tests.composed import SUBJECTS, build
from tests.run.test_run_edit_methods import run

# ---- the networks ----------------------------------------------------------------------------------------------------


def theirs(tokens: int, rows: int) -> nn.ModuleDict:
    """One network as the authors build it (stylediffusion.py, Trainer.__init__), with norms that change something."""
    norm = nn.BatchNorm1d(rows)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.3)
    block = nn.Sequential(nn.Conv1d(rows, rows, 1), norm, nn.LeakyReLU(0.01))
    return nn.ModuleDict(
        {
            "conv_start": nn.Conv1d(tokens, rows, 1),
            "conv_block": nn.Sequential(block),
            "conv_end": nn.Conv1d(rows, rows, 1),
        }
    )


def forward(network: nn.ModuleDict, tokens: Tensor) -> Tensor:
    return network["conv_end"](network["conv_block"](network["conv_start"](tokens)))


@pytest.fixture
def trained() -> list[nn.ModuleDict]:
    torch.manual_seed(3)
    return [theirs(5, 8) for _ in range(3)]


def test_networks_are_batch_norm_in_training_mode_one_by_one(trained, tmp_path) -> None:
    torch.save(trained, tmp_path / "theirs.pth")
    made = MappingNetworks(3, tokens=5, rows=8, seed=0)
    made.load_state_dict(files.read(tmp_path / "theirs.pth"))
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    for step, network in enumerate(trained):
        wanted = torch.cat([forward(network.train(), tokens[row : row + 1]) for row in range(2)])
        torch.testing.assert_close(made(tokens, step), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(made(tokens, step), forward(network.eval(), tokens), atol=1e-2)
    together = forward(trained[0].train(), tokens)
    assert not torch.allclose(made(tokens, 0), together, atol=1e-3), "pictures of a batch do not mix here"


def test_value_states_by_hand() -> None:
    text = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    scale, shift = torch.tensor([[[2.0, 3.0], [4.0, 5.0]]]), torch.tensor([[[0.5, 0.0], [-1.0, 1.0]]])
    mapped = torch.cat([scale, shift], dim=1)
    wanted = torch.tensor([[[2.5, 6.0], [11.0, 21.0]], [[10.5, 18.0], [27.0, 41.0]]])
    assert torch.equal(value_states(text, mapped, "affine"), wanted)
    assert torch.equal(value_states(text, scale, "direct"), scale.expand(2, 2, 2))
    assert (value_rows("affine", 77), value_rows("direct", 77)) == (154, 77)
    with pytest.raises(UserError, match="affine or direct"):
        value_rows("afine", 77)


def test_every_timestep_starts_alike_and_copies_go_one_way() -> None:
    made = MappingNetworks(3, tokens=197, rows=154, seed=0)
    assert sum(p.numel() for p in made.parameters()) == 3 * 78_540
    assert all(torch.equal(p[0], p[2]) for p in made.parameters())
    bound = 197**-0.5
    weight = made.conv_start.weight[0].detach()
    assert float(weight.abs().max()) <= bound and float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter[0] += 1
    made.copy(0, 1)
    assert all(torch.equal(p[0], p[1]) and not torch.equal(p[1], p[2]) for p in made.parameters())


# ---- the authors' files ----------------------------------------------------------------------------------------------


def test_files_go_there_and_back(trained, tmp_path) -> None:
    torch.save(trained, tmp_path / "modules.pth")
    found = files.read(tmp_path / "modules.pth")
    written = files.write(tmp_path / "states.pth", found)
    again = files.read(written)
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    fresh = theirs(5, 8)
    fresh.load_state_dict(torch.load(written, weights_only=True)[1], strict=True)
    tokens = torch.randn(1, 5, 16)
    assert torch.equal(forward(fresh, tokens), forward(trained[1], tokens))


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("what", ["evil", "tensor", "short", "torn", "infinite"])
def test_other_files_are_refused(what, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    state = trained[0].state_dict()
    if what == "evil":
        torch.save([trained[0], _Evil()], path)
    elif what == "tensor":
        torch.save(torch.zeros(3), path)
    elif what == "short":
        state.pop("conv_end.bias")
        torch.save([state], path)
    elif what == "infinite":
        state["conv_end.bias"][0] = torch.inf
        torch.save([state], path)
    else:
        path.write_bytes(pickle.dumps([1], protocol=2)[:3])
    wanted = {"tensor": "no StyleDiffusion file", "short": "lacks conv_end.bias", "infinite": "NaN or infinite"}
    with pytest.raises(UserError, match=wanted.get(what, "broken or holds more than tensors")):
        files.read(path)
    assert not (tmp_path / "evil").exists()


# ---- the method ------------------------------------------------------------------------------------------------------


def test_values_are_fitted_for_targets_up_to_tau_v(stack) -> None:
    """Keys are always the rows' own texts; the source row reads fitted values at every step."""
    method = build("style_diffusion", stack, SUBJECTS[:1], steps=4, tau_v=0.5)
    method.path_step.fill_(3)
    texts = [method.source, "a photo of a cat on a sofa"]
    states = stack.encode_text(texts)
    conditional, unconditional = method.edit_conditions(texts, "")
    with torch.no_grad():
        for step in range(4):
            found = conditional(step)
            assert torch.allclose(found.keys[0], states, atol=1e-6)
            fitted = method.values(step, states)
            torch.testing.assert_close(found.values[0, :1], fitted[:1])
            torch.testing.assert_close(found.values[0, 1:], fitted[1:] if step < 2 else states[1:])
            assert not torch.allclose(fitted, states, atol=1e-2)
            assert unconditional(step).values is None


def test_steps_that_training_did_not_come_to_have_the_last_network(stack) -> None:
    method = build("style_diffusion", stack, SUBJECTS[:1], steps=3, inner_steps=2, inner_decay=0.0)
    optimizer = method.configure_optimizers()
    for _ in range(3):
        method.training_step(None, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(method.path_step) == 1 and int(method.num_updates) == 1 and not method.finished
    kept = method.artifact(0)["networks.conv_end.weight"]
    assert torch.equal(kept[1], kept[2]) and not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], method.networks.conv_end.weight[1])
    assert "path_step" not in method.artifact(0)


def test_other_towers_and_files_are_refused(stack, trained, tmp_path) -> None:
    tiny_tower(seed=0, width=16).network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="16 wide, tiny's text states 32"):
        build("style_diffusion", stack, SUBJECTS[:1], tower=str(tmp_path))
    for name, wrong in (("attention_loss", "mae"), ("value_form", "afine"), ("tau_v", 2.0)):
        with pytest.raises(UserError, match=name):
            build("style_diffusion", stack, SUBJECTS[:1], **{name: wrong})
    path = files.write(tmp_path / "short.pth", build("style_diffusion", stack, SUBJECTS[:1]).networks.state_dict())
    with pytest.raises(UserError, match=r"set sampler\.steps=2"):
        build("style_diffusion", stack, SUBJECTS[:1], steps=3).load_foreign(0, path)
    with pytest.raises(UserError, match="no cross-attention map"):
        build("style_diffusion", stack, SUBJECTS[:1], attention_pixels=9).training_step(None, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["style_diffusion", "null_text"])
def test_resumed_half_way_through_a_timestep_is_bit_identical(name, tmp_path) -> None:
    folder = tmp_path / "run"
    command = ["stages=[fit]", f"method={name}", "method.inner_steps=3", "fit.steps=6", f"outputs_dir='{tmp_path}'"]
    assert run(folder, *command) == 0
    (path,) = (folder / "artifacts").glob("*.safetensors")
    whole = load_file(path)
    path.unlink()
    assert run(folder, *command, f"resume='{folder}/checkpoints/step-000004.ckpt'") == 0  # one update into timestep 1
    again = load_file(path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
