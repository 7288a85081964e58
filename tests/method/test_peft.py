"""The PEFT family: each tuner against huggingface/peft's own layers; starts, strengths, shared passes, files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hiperlab.base.method import Step
from hiperlab.errors import UserError
from hiperlab.layer.tuner import TUNERS, split, tuner
from hiperlab.method.peft import Peft
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.shared_calls import together
from hiperlab.model.tiny import tiny
from tests.composed import SUBJECTS, UNetCalls, batch, build, config, kept, quick, train

CAT = SUBJECTS[0]
TABLE = quick("peft")["tuners"]
LINEAR = ("lora", "rslora", "pissa", "loha", "lokr")  # PEFT's own strength multiplies the change
SCALED = ("oft", "boft", "hra", "ia3", "fourierft")  # PEFT has none; ours does the same


def way(name: str, **changes):
    """A tuner with the settings of the yaml but for the changes."""
    return tuner(name, {key: value for key, value in (TABLE[name] | changes).items() if key != "lr"})


def settings(name: str, **changes) -> dict:
    """`build`'s for a tuner with other settings."""
    return {"tuner": name, "tuners": {name: changes}}


class Net(nn.Module):
    """One layer of each kind, with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.point, self.conv = nn.Linear(16, 24), nn.Conv2d(24, 16, 1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x).view(-1, 24, 3, 3)
        return self.conv(torch.tanh(self.point(x)))


def configs() -> dict[str, tuple[dict, list[str], object]]:
    """Tuner -> our settings, the layers, PEFT's config."""
    import peft

    every, points, lin = ["lin", "point", "conv"], ["lin", "point"], ["lin"]
    rank = {"rank": 3, "alpha": 5.0}
    return {
        "lora": (rank, every, peft.LoraConfig(r=3, lora_alpha=5, target_modules=every)),
        "rslora": (rank, every, peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=every)),
        "dora": (rank, every, peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=every)),
        "loha": (rank, every, peft.LoHaConfig(r=3, alpha=5, target_modules=every)),
        "lokr": (
            {"rank": 1, "alpha": 5.0, "decompose_both": True},
            every,
            peft.LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=every),
        ),
        "lokr whole": (
            {"rank": 30, "alpha": 5.0, "factor": 4},
            every,
            peft.LoKrConfig(r=30, alpha=5, decompose_factor=4, target_modules=every),
        ),
        "oft": ({"block": 6}, points, peft.OFTConfig(oft_block_size=6, target_modules=points)),
        **{
            f"oft {k} terms": (
                {"block": 8, "terms": k},
                points,
                peft.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=k, target_modules=points),
            )
            for k in (2, 3, 4, 7)
        },
        "boft": (
            {"blocks": 4},
            every,
            peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=every),
        ),
        "hra": ({"rank": 4}, every, peft.HRAConfig(r=4, target_modules=every)),
        "ia3": ({"feedforward": []}, every, peft.IA3Config(feedforward_modules=[], target_modules=every)),
        "ia3 inputs": (
            {"feedforward": ["lin", "conv"]},
            every,
            peft.IA3Config(feedforward_modules=["lin", "conv"], target_modules=every),
        ),
        "fourierft": (
            {"frequencies": 20, "scaling": 30.0, "location_seed": 5},
            lin,
            peft.FourierFTConfig(n_frequency=20, scaling=30.0, random_loc_seed=5, target_modules=lin),
        ),
    }  # fmt: skip


CASES = [
    "lora", "rslora", "dora", "loha", "lokr", "lokr whole", "oft", "oft 2 terms", "oft 3 terms", "oft 4 terms",
    "oft 7 terms", "boft", "hra", "ia3", "ia3 inputs",
    "fourierft",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_is_what_peft_computes(case) -> None:
    """Shapes and names of the adapter, and outputs of linear layers and convolutions whose biases are not zero."""
    from peft import get_peft_model, get_peft_model_state_dict

    ours, layers, theirs_config = configs()[case]
    mine, net = way(case.split()[0], targets=layers, **ours), Net()
    frozen = {name: (net.get_submodule(name).weight, net.get_submodule(name).bias) for name in layers}
    theirs = get_peft_model(Net(), theirs_config)
    with torch.no_grad():
        torch.manual_seed(1)
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
        states = get_peft_model_state_dict(theirs)
        for name, (weight, bias) in frozen.items():
            own = {
                key.removeprefix(f"base_model.model.{name}."): value
                for key, value in states.items()
                if key.startswith(f"base_model.model.{name}.")
            }
            start = mine.start(0, name, weight)
            assert {key: value.shape for key, value in start.items()} == {k: v.shape for k, v in own.items()}
            layer = net.get_submodule(name)
            layer.weight = nn.Parameter(weight + mine.difference(weight, own, 1.0))
            change = mine.bias_difference(bias, own, 1.0)
            layer.bias = nn.Parameter(bias if change is None else bias + change)
        x = torch.randn(2 * 9, 16)
        torch.testing.assert_close(net(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
        assert float((net(x) - Net()(x)).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_pissa_is_what_peft_computes_on_its_own_base() -> None:
    """Its start, and its product with the base weight that it takes the start's from."""
    from peft import LoraConfig, get_peft_model

    mine, weight = way("pissa", rank=3, alpha=5.0, targets=["lin"]), Net().lin.weight
    theirs = get_peft_model(
        Net(), LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=["lin"])
    ).base_model.model.lin
    start = mine.start(0, "lin", weight)
    torch.testing.assert_close(mine.scale * start["lora_B.weight"] @ start["lora_A.weight"],
                               weight.detach() - theirs.base_layer.weight.detach(), atol=1e-5, rtol=0)  # fmt: skip
    change = 0.1 * torch.ones(3, 16)
    with torch.no_grad():
        own = {**start, "lora_A.weight": theirs.lora_A["default"].weight + change,
               "lora_B.weight": theirs.lora_B["default"].weight}  # fmt: skip
        theirs.lora_A["default"].weight += change
        whole = theirs.base_layer.weight + theirs.get_delta_weight("default")
    torch.testing.assert_close(weight + mine.difference(weight, own, 1.0), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TUNERS)
def test_numbers_per_layer(name) -> None:
    """As counted by hand for a layer of 64 outputs and 32 inputs."""
    o, i, r = 64, 32, 8
    wanted = {
        "lora": r * (i + o), "rslora": r * (i + o), "dora": r * (i + o) + o, "pissa": r * (i + o),
        "loha": 2 * r * (i + o), "lokr": 8 * 4 + 8 * 8, "oft": i * 31 // 2, "boft": i * 4 + o, "hra": i * r, "ia3": o,
        "fourierft": 1000,
    }[name]  # fmt: skip
    start = way(name).start(0, "to_q", torch.randn(o, i, generator=torch.Generator().manual_seed(0)))
    assert sum(value.numel() for key, value in start.items() if key not in way(name).frozen) == wanted


@pytest.mark.parametrize("name", TUNERS)
def test_a_fresh_adapter_is_the_frozen_model(name) -> None:
    """Bit for bit, but for HRA's rounding; FourierFT starts elsewhere unless told to start at zero."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    apart = float(way(name).difference(weight, way(name).start(0, "to_q", weight), 1.0).abs().max())
    if name == "fourierft":
        assert apart > 0.1
        zero = way(name, zero_start=True)
        assert not zero.difference(weight, zero.start(0, "to_q", weight), 1.0).any()
    else:
        assert apart <= (1e-5 if name == "hra" else 0)


def test_an_odd_number_of_reflections_starts_elsewhere_and_says_so(caplog) -> None:
    weight = torch.eye(32)
    odd = way("hra", rank=3)
    assert float(odd.difference(weight, odd.start(0, "to_q", weight), 1.0).abs().max()) > 0.1
    assert "rank=3 is odd" in caplog.text


def test_hra_and_boft_turn_without_stretching() -> None:
    weight, generator = torch.eye(32), torch.Generator().manual_seed(0)
    for name in ("hra", "boft"):
        start = way(name).start(0, "to_q", weight)
        own = {key: v if key == "boft_s" else torch.randn(v.shape, generator=generator) for key, v in start.items()}
        turned = weight + way(name).difference(weight, own, 1.0)
        torch.testing.assert_close(turned @ turned.T, weight, atol=1e-4, rtol=0)


def test_dora_holds_the_length_fixed_for_the_gradient() -> None:
    """With m = |X| the gradient through d = m / |X| would cancel what X does along itself."""
    weight = torch.tensor([[3.0, 4.0]])
    dora = way("dora", rank=1, alpha=1.0)
    own = {key: value.requires_grad_() for key, value in dora.start(0, "to_q", weight).items()}
    (dora.difference(weight, own, 1.0) * weight).sum().backward()
    lora_alone = own["lora_A.weight"].detach() @ weight[0]
    torch.testing.assert_close(own["lora_B.weight"].grad[0], lora_alone)


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [(32, -1, (4, 8)), (64, -1, (8, 8)), (64, 4, (4, 16)), (36, 5, (4, 9)), (7, -1, (1, 7)), (64, 16, (16, 4))],
)
def test_lokr_splits_sides(size, factor, wanted) -> None:
    assert split(size, factor) == wanted


@pytest.mark.parametrize("name", TUNERS)
def test_rows_beside_the_layers_are_the_changed_weights(name) -> None:
    """What shared passes use: equal to weights of one's own, biases and convolutions included."""
    stack = tiny(seed=0, size=64).double()
    targets = {"targets": ["to_out.0", "proj_in", "conv1"]}
    if name in ("oft", "fourierft"):
        targets = {"targets": ["to_out.0", "to_k"]}
    method = kept("peft", stack, CAT, **settings(name, **targets)).double()
    latents, t = torch.ones(1, *stack.latent_shape, dtype=torch.float64), torch.tensor([300])
    with torch.no_grad():
        step = Step(["a <my-cat>"], torch.tensor([0]), t, latents)
        states = method.condition(step)
        own = stack.predict(latents, t, Conditioning(states.keys, offsets=states.offsets))
        beside = stack.predict(latents, t, Conditioning(states.keys, row_offsets=states.row_offsets))
        bare = stack.predict(latents, t, Conditioning(states.keys))
    torch.testing.assert_close(own, beside, atol=1e-8, rtol=0)
    assert float((own - bare).abs().max()) > 1e-4


def test_all_tuners_train_side_by_side(stack, monkeypatch) -> None:
    """Eleven trainings, one call of the U-Net."""
    asked = UNetCalls(stack, monkeypatch)
    methods = [build("peft", stack, [CAT], prior={"weight": 0.0}, **settings(name)).train() for name in TUNERS]
    losses = together(stack, [method.training_calls(batch([CAT], [0])) for method in methods])
    assert [call.rows for call in asked.taken()] == [len(TUNERS)]
    torch.stack(losses).sum().backward()
    for method in methods:
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TUNERS)
def test_strengths(name, stack) -> None:
    """None is the frozen model, but for DoRA, whose magnitudes stay; half is half the change."""
    method = kept("peft", stack, CAT, strength=[1.0, 0.5, 0.0], **settings(name))
    whole, half, none = (
        {key: change.delta.detach() for key, change in method.changed_weights(v).unet.changes.items()}
        for v in method.variants
    )
    assert (
        sum(value.numel() for value in whole.values()) and (name in LINEAR) + (name in SCALED) + (name == "dora") == 1
    )
    if name == "dora":
        assert any(value.abs().max() > 1e-3 for value in none.values())
        return
    assert not any(value.any() for value in none.values())
    for key, value in whole.items():
        torch.testing.assert_close(half[key], value / 2)


@pytest.mark.parametrize("name", TUNERS)
def test_files_with_text_encoder_and_both_prefixes(name, stack, tmp_path) -> None:
    how = {**settings(name), "text_encoder": True}
    if name in ("lokr", "fourierft"):
        how["text_targets"] = ["q_proj"]
    method = kept("peft", stack, CAT, key_prefix="base_model", **how)
    unet, text = method.export(0, tmp_path, 1)
    assert unet.parent.name == "peft" and text.parent.name == "peft_text_encoder"
    for given in (unet, text):
        other = build("peft", stack, [CAT], **how)
        other.load_foreign(0, given)
        for (key, mine), theirs in zip(method.adapters.items(), other.adapters.values(), strict=True):
            torch.testing.assert_close(mine, theirs, msg=key)
    with pytest.raises(UserError, match="text_encoder=true"):
        build("peft", stack, [CAT], **{**how, "text_encoder": False}).load_foreign(0, unet)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in TUNERS if name != "fourierft"])
def test_peft_reads_our_file(name, stack, tmp_path) -> None:
    """Diffusers' `add_adapter` with our config, then PEFT's own loading: the same prediction."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    method = kept("peft", stack, CAT, size=0.02, **settings(name, targets=["to_k", "to_out.0"]))
    (path,) = method.export(0, tmp_path, 1)
    latents, t = torch.ones(1, *stack.latent_shape), torch.tensor([300])
    states = stack.encode_text(["a cat"])[None]
    with torch.no_grad():
        ours = stack.predict(latents, t, Conditioning(states, offsets=method.changed_weights("").unet))
        bare = stack.predict(latents, t, Conditioning(states))
        other = tiny(seed=0, size=128)
        inject_adapter_in_model(PeftConfig.from_pretrained(str(path.parent)), other.unet)
        result = set_peft_model_state_dict(other.unet, load_file(path))
        assert not result.unexpected_keys
        theirs = other.predict(latents, t, Conditioning(states))
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
    assert float((bare - ours).abs().max()) > 1e-4


def test_pissa_is_written_as_a_lora_of_twice_the_rank(stack, tmp_path) -> None:
    """The file alone makes the same weights from the unmodified base, as plain LoRA."""
    targets = {"targets": ["to_k"], "rank": 4, "alpha": 8.0}
    method = kept("peft", stack, CAT, **settings("pissa", **targets))
    (path,) = method.export(0, tmp_path, 1)
    lora = build("peft", stack, [CAT], **settings("lora", targets=["to_k"], rank=8, alpha=16.0))
    lora.load_foreign(0, path)
    ours, plain = (each.changed_weights("").unet.changes for each in (method, lora))
    for key, change in ours.items():
        torch.testing.assert_close(plain[key].delta, change.delta, atol=1e-5, rtol=0)


def test_artifact_of_another_scale_is_refused(stack) -> None:
    tensors = build("peft", stack, [CAT], **settings("lora", alpha=4.0)).artifact(0)
    with pytest.raises(UserError, match=r"method.tuners.lora.alpha=4, this run has 8"):
        build("peft", stack, [CAT]).load_artifact(0, tensors)


def test_drawing_several_prompts_shares_the_changed_weights(stack) -> None:
    method = kept("peft", stack, CAT, **settings("hra")).eval()
    how = {"steps": 1, "guidance": 7.5}
    three = method.sample(["a <my-cat>", "my <my-cat>", "the <my-cat>"], [1, 2, 3], batch_size=2, **how)
    assert three.shape[0] == 3
    with torch.no_grad():
        for number, value in enumerate(method.adapters.values()):
            value += torch.linspace(0, 1 + number % 3, value.numel()).view_as(value)
    again = method.sample(["a <my-cat>"], [1], **how)
    assert float((again[0] - three[0]).abs().max()) > 1e-4, "what was kept is made anew when it is trained on"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuner": "oftt"}, r"no such tuner\. Did you mean oft"),
        (settings("oft", targets=["conv1"]), "1x1 convolutions only, .*conv1 is a convolution 3x3"),
        (settings("fourierft", targets=["proj_in"]), "linear layers only"),
        (settings("boft", factors=2), "only one butterfly factor"),
        (settings("boft", block=4), "give one of the two"),
        (settings("boft", blocks=5), "which 5 does not divide"),
        (settings("lora", rank=0), "method.tuners.lora: rank=0"),
        (settings("lora", init="gausian"), "Did you mean gaussian"),
        (settings("ia3", feedforward=["to_kk"]), "none of the targets. Did you mean to_k"),
        (settings("lora", rnk=3), "rnk is missing or no setting. Did you mean rank"),
        (settings("pissa", rank=40), "singular values"),
        (settings("fourierft", frequencies=10**7), "so many at most"),
        (settings("lora", targets=[]), "trains nothing"),
        ({"key_prefix": "bse_model"}, "Did you mean base_model"),
        ({"strength": []}, "draws nothing"),
    ],
)
def test_settings_are_refused(changes, message, stack) -> None:
    with pytest.raises(UserError, match=message):
        build("peft", stack, [CAT], **changes)


def test_files_are_refused(stack, tmp_path) -> None:
    method = build("peft", stack, [CAT], **settings("lora", targets=["to_k"]))
    (path,) = method.export(0, tmp_path, 1)
    beside, states = path.parent / "adapter_config.json", load_file(path)
    plain = json.loads(beside.read_text())
    for wrong in ({"bias": "all"}, {"peft_type": "HRA"}, {"lora_alpha": 3}, {"rank_pattern": {"to_k": 2}}):
        beside.write_text(json.dumps(plain | wrong))
        with pytest.raises(UserError, match=next(iter(wrong))):
            method.load_foreign(0, path)
    beside.write_text(json.dumps(plain))
    save_file({key: value[:1] for key, value in states.items()}, path)
    with pytest.raises(UserError, match="does not fit"):
        method.load_foreign(0, path)
    save_file({"down.oft_R.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="another tuner's file"):
        method.load_foreign(0, path)
    beside.unlink()
    with pytest.raises(UserError, match="no scale"):
        method.load_foreign(0, path)


def test_oft_takes_a_divisor_with_a_warning(caplog) -> None:
    start = way("oft", block=10).start(0, "to_q", torch.eye(32))
    assert start["oft_R.weight"].shape == (4, 28) and "8 is taken" in caplog.text


def test_published_rates() -> None:
    rates = {name: config("peft", f"method.tuner={name}").method.optimizer.lr for name in TUNERS}
    assert rates.keys() == TABLE.keys()
    assert (rates["boft"], rates["hra"]) == (3e-5, 5e-3) and rates["oft"] == 1e-4
    assert config("peft", "method.tuner=hra", "method.optimizer.lr=0.5").method.optimizer.lr == 0.5


def test_trains_towards_the_picture(stack) -> None:
    """Every tuner's numbers move in two steps, those that are not to train stay."""
    for name in TUNERS:
        method = build("peft", stack, [CAT], **settings(name))
        assert isinstance(method, Peft)
        before = {key: value.detach().clone() for key, value in method.adapters.items()}
        train(method, 2)
        for key, value in method.adapters.items():
            assert torch.equal(value, before[key]) != value.requires_grad, f"{name} {key}"
