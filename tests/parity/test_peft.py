"""Ten PEFT tuners against huggingface/peft. Items are named as in golden/peft/README.md, with its limits, absolute.

Everything is read from meta.json and the files, so that another recorded set of the same form can be tried. The
committed slice holds two layers of every file. tests/method/test_peft.py compares with the installed package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.method.peft import Peft
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import ddim, denoise
from tests.composed import build as compose
from tests.composed import quick
from tests.parity import golden

TUNERS = ["lora", "rslora", "dora", "loha", "lokr", "oft", "boft", "hra", "ia3", "fourierft"]
OURS = {  # PEFT's setting -> ours
    "r": "rank", "lora_alpha": "alpha", "alpha": "alpha", "decompose_factor": "factor", "oft_block_size": "block",
    "boft_block_size": "block", "boft_n_butterfly_factor": "factors", "feedforward_modules": "feedforward",
    "n_frequency": "frequencies", "scaling": "scaling", "random_loc_seed": "location_seed",
}  # fmt: skip


def close(item: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    golden.close(f"peft {item}", ours, theirs, limit, absolute=True)


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("peft")


@pytest.fixture(scope="module")
def twin(g):
    return golden.twin(8 * g["sample"].shape[-1], "golden")


def test_every_recorded_tuner_is_compared(meta) -> None:
    assert list(meta["tuners"]) == TUNERS


def make(twin, meta, root, name: str, read: bool = True, **changes: Any) -> Peft:
    """The recorded adapter: settings of meta.json, values of the file."""
    how, settings = meta["tuners"][name], quick("peft")["tuners"][name]
    settings |= {OURS[key]: value for key, value in how.items() if OURS.get(key) in settings}
    settings["targets"] = meta["targets"]
    if name == "boft":
        settings["blocks"] = None
    method = compose("peft", twin, [Subject("it", "<it>", "cat")], tuner=name, tuners={name: settings}, **changes)
    assert isinstance(method, Peft)
    if read:
        method.load_foreign(0, root / f"saved_{name}" / "adapter_model.safetensors")
    return method.eval()


def predict(method: Peft, g, strength: float = 1.0) -> Tensor:
    changed = method.changed_weights(f"strength={strength}")
    states = Conditioning(g["encoder_hidden_states"][None], offsets=changed.unet)
    return method.model.predict(g["sample"], g["timesteps"], states)


@torch.no_grad()
def test_base(twin, g) -> None:
    states = Conditioning(g["encoder_hidden_states"][None])
    close("pred.base", twin.predict(g["sample"], g["timesteps"], states), g["pred.base"], 1e-5)


@pytest.mark.parametrize("name", TUNERS)
def test_tuner(name, twin, meta, root, g) -> None:
    """Counts, prediction, loss, every gradient, half the strength."""
    method = make(twin, meta, root, name)
    trained = {key: p for key, p in method.adapters.items() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == meta["tuners"][name]["numbers"]
    assert len(trained) == meta["tuners"][name]["tensors_in_file"]
    ours = predict(method, g)
    close(f"pred.{name}", ours, g[f"pred.{name}"], 1e-5)
    assert float((g[f"pred.{name}"] - g["pred.base"]).abs().max()) > 1e-4
    loss = torch.nn.functional.mse_loss(ours, g["target"])
    close(f"loss.{name}", loss, g[f"loss.{name}"], 3e-6)
    loss.backward()
    gradients = golden.pick(g, f"grad.{name}.")
    assert len(gradients) == len(trained)
    for key, theirs in gradients.items():
        place = f"unet/{key.replace('magnitude_vector.weight', 'magnitude_vector')}".replace(".", "/")
        close(f"grad.{name}", trained[place].grad[0], theirs, 2e-8)
    if f"pred_half.{name}" in g:
        with torch.no_grad():
            close(f"pred_half.{name}", predict(method, g, 0.5), g[f"pred_half.{name}"], 1e-5)


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.parametrize("source", ["golden", "slice"])
def test_files(source, name, tmp_path) -> None:
    """What we write is what PEFT wrote: keys, shapes, values, settings; its other prefix is read as well."""
    root = golden.folder("peft") if source == "golden" else golden.SLICE / "peft"
    meta, twin = golden.config(root / "meta.json"), golden.twin(128, source)
    read = make(twin, meta, root, name)
    (written,) = read.export(0, tmp_path, 1)
    source = root / f"saved_{name}"
    ours, theirs = load_file(written), load_file(source / written.name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())
    mine, recorded = (json.loads((folder / "adapter_config.json").read_text()) for folder in (written.parent, source))
    for key in mine.keys() - {"target_modules", "inference_mode", "init_weights"}:
        assert mine[key] == recorded[key], key
    (other,) = make(twin, meta, root, name, key_prefix="base_model").export(0, tmp_path / "other", 1)
    assert load_file(other).keys() == {f"base_model.model.{key}" for key in theirs}
    fresh = make(twin, meta, root, name, read=False)
    fresh.load_foreign(0, other)
    assert all(torch.equal(value, read.adapters[key]) for key, value in fresh.adapters.items())


@pytest.mark.parametrize("name", TUNERS)
def test_start(name, twin, meta, root, g) -> None:
    with torch.no_grad():
        apart = float((predict(make(twin, meta, root, name, read=False), g) - g["pred.base"]).abs().max())
    theirs = meta["measured"][f"{name}.initial_change"]
    assert apart < 1e-5 if name != "fourierft" else 0.3 * theirs < apart < 3 * theirs


def test_sampling(twin, meta, root, g) -> None:
    method = make(twin, meta, root, "lora")
    changed, context = method.changed_weights(""), g["encoder_hidden_states"]
    states, empty = (Conditioning(context[row : row + 1][None], offsets=changed.unet) for row in (0, 1))
    latents = denoise(twin, g["sampling.latents_in"], ddim(5, 7.5).build(twin, 5), lambda t: states, empty, 7.5)
    close("sampling.latents_out", latents, g["sampling.latents_out"], 4e-4)


def test_a_file_of_another_setting_is_refused(twin, meta, root, tmp_path) -> None:
    shutil.copytree(root / "saved_rslora", tmp_path / "it")
    method = make(twin, meta, root, "rslora", read=False)
    for wrong in ({"use_rslora": False}, {"lora_alpha": 77}, {"peft_type": "OFT"}, {"alpha_pattern": {"to_k": 3}}):
        config = json.loads((root / "saved_rslora" / "adapter_config.json").read_text()) | wrong
        (tmp_path / "it" / "adapter_config.json").chmod(0o644)
        (tmp_path / "it" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=next(iter(wrong))):
            method.load_foreign(0, tmp_path / "it" / "adapter_model.safetensors")
