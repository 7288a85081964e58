"""NeTI, and Textual Inversion and XTI as its special cases, against the numbers of the authors' own code.

The letters a ... i, t are the groups of golden/neti/README.md. Limits are its suggested ones.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from hiperlab.base.method import Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.formats import neti as files
from hiperlab.layer import fourier
from hiperlab.layer.nested_dropout import keep_first
from hiperlab.loss.diffusion import denoising_loss
from hiperlab.method.neti import NeTI, add_bypass, rescale
from hiperlab.method.ti import TextualInversion
from hiperlab.method.xti import ExtendedTextualInversion
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.sampler import Sampler, denoise
from tests.parity import golden

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture(scope="module", params=["golden", "slice"])
def source(request) -> str:
    """The full golden folder, and the slice of it that is committed."""
    return request.param


@pytest.fixture(scope="module")
def root(source) -> Path:
    return golden.folder("neti") if source == "golden" else golden.SLICE / "neti"


@pytest.fixture(scope="module")
def cfg(root):
    return golden.config(root / "config.json")


@pytest.fixture(scope="module")
def twin(cfg, source):
    return golden.twin(cfg["resolution"], source)


@pytest.fixture(scope="module")
def subject(cfg):
    return Subject("golden", cfg["placeholder"], cfg["super_category"])


def build(twin, cfg, subject, *, bypass=True, rescale_mode="joint", positional_encoding=True) -> NeTI:
    return NeTI(
        twin,
        [subject],
        ADAMW,
        seed=cfg["seed"],
        positional_encoding=positional_encoding,
        sigma_t=cfg["sigma_t"],
        sigma_l=cfg["sigma_l"],
        num_time_anchors=cfg["anchors"],
        bypass=bypass,
        rescale_mode=rescale_mode,
        nested_dropout=cfg["nested_dropout_prob"],
        coin_rows=cfg["batch"],
        truncation=None,
    )


def load(method: NeTI, g, *sources: str) -> NeTI:
    """Fill the mapper from golden prefixes; later ones win."""
    tensors = {"target_norm": g["ids/target_norm"].float()}
    for source in sources:
        tensors |= {f"mapper.{name}": value for name, value in golden.pick(g, source).items()}
    if method.mapper.positional_encoding:
        tensors["mapper.w"] = g["mapper_encoder/w"]
    method.load_artifact(0, tensors)
    return method


@pytest.fixture
def neti(twin, cfg, subject, g) -> NeTI:
    return load(build(twin, cfg, subject), g, "mapper/")


def authors(root: Path, folder: str) -> Path:
    """The mapper file that the authors' code saved."""
    found = sorted((root / folder).glob("mapper-steps-*.pt"))
    return found[0] if found else pytest.skip(f"{folder}/ is not in the committed slice")


def filled(cfg, prompts) -> list[str]:
    return [prompt.replace("{}", cfg["placeholder"]) for prompt in prompts]


def ids(method, cfg, prompts):
    """Token ids as the authors' tokenizer gives them, with the placeholder's own id."""
    tokens = method.model.tokenize(prompts, method.slots)
    return torch.where(tokens.slots >= 0, cfg["placeholder_token_id"], tokens.ids)


def test_a_positional_encoding(g, cfg, twin) -> None:
    code = fourier.encode(g["a/t"], g["a/l"], g["a/w"])
    golden.close("a encoding", code, g["a/encoding"], 2e-6, absolute=True)
    golden.close("a encoding, scalar path", code, g["a/encoding_scalar_path"], 2e-6, absolute=True)
    rows = fourier.anchors(g["a/w"], cfg["anchors"], cfg["unet_layers"], twin.num_timesteps)
    order = fourier.encode(g["a/anchor_t"], g["a/anchor_l"], g["a/w"])
    golden.close("a anchors' order", rows, order, 1e-7, absolute=True)
    first = g["a/init_layer_weight_first_20_rows"]
    golden.close("a first rows", rows[: len(first)], first, 2e-6, absolute=True)
    golden.close("a row sums", rows.sum(1), g["a/init_layer_weight_rowsum"], 1e-4)
    golden.close("a column sums", rows.sum(0), g["a/init_layer_weight_colsum"], 1e-4)
    basic = fourier.normalised_pair(g["a/t"], g["a/l"], twin.num_timesteps, cfg["unet_layers"])
    golden.close("a basic encoding", basic, g["a/basic_encoding"], 1e-6)


VARIANTS = {
    "default": ({}, ["mapper/"]),
    "no_norm": ({"rescale_mode": "none"}, ["mapper/"]),
    "no_bypass": ({"bypass": False}, ["mapper/", "b/no_bypass/mapper/"]),
    "no_pe": ({"positional_encoding": False}, ["b/no_pe/mapper/"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_b_mapper(name, twin, cfg, subject, g) -> None:
    options, sources = VARIANTS[name]
    method = load(build(twin, cfg, subject, **options), g, *sources)
    t, layer = g["b/t"], g["b/l"]
    code = method.mapper.encode(t, layer, 0)
    golden.close(f"b {name} input encoding", code, g[f"b/{name}/input_encoding"], 2e-6, absolute=True)
    golden.close(f"b {name} hidden", method.mapper.hidden(t, layer, 0), g[f"b/{name}/hidden"], 1e-5)

    def output(keep):
        return rescale(method.mapper(t, layer, 0, keep), method.target_norm.expand(len(t)), method.rescale_mode)

    golden.close(f"b {name} output", output(None), g[f"b/{name}/output"], 1e-5)
    cuts = g["b/truncation_idx"]
    truncated = torch.stack([output(torch.full_like(t, int(cut))) for cut in cuts])
    golden.close(f"b {name} truncated", truncated, g[f"b/{name}/output_truncated"], 1e-5)
    if name == "default":
        golden.close("b dropped", output(g["b/train_keep"]), g["b/default/output_train_dropped"], 1e-5)
        golden.close("b coin says no", output(None), g["b/default/output_train_coin_no"], 1e-5)


def test_g_rescaling_is_joint(g) -> None:
    norm = g["ids/target_norm"].float()
    ours = rescale(g["g/raw"], norm.expand(len(g["g/raw"])), "joint")
    golden.close("g normalised", ours, g["g/normalised"], 1e-5)
    base, bypass = ours.chunk(2, dim=-1)
    golden.close("g norm of whole", ours.norm(dim=-1), g["g/norm_of_whole"], 1e-5)
    golden.close("g norm of base half", base.norm(dim=-1), g["g/norm_of_base_half"], 1e-5)
    golden.close("g norm of bypass half", bypass.norm(dim=-1), g["g/norm_of_bypass_half"], 1e-5)
    raw = g["g/no_bypass_raw"]
    golden.close("g no bypass", rescale(raw, norm.expand(len(raw)), "joint"), g["g/no_bypass_normalised"], 1e-5)


def test_target_norm_is_the_super_categorys(neti, twin, cfg, subject, g) -> None:
    fresh = build(twin, cfg, subject)
    golden.close("ids target norm", fresh.target_norm[0], g["ids/target_norm"].float(), 1e-6)
    word = twin.word_embedding(cfg["super_category"])
    golden.close("ids embedding", word, g["ids/super_category_embedding"], 1e-7)


def test_c_text_encoder(neti, cfg, g) -> None:
    prompts = filled(cfg, cfg["prompts"])
    assert torch.equal(ids(neti, cfg, prompts), g["c/input_ids"])
    tokens = neti.model.tokenize(prompts, neti.slots)
    rows, positions, concept = tokens.occurrences()
    assert torch.equal(positions, g["c/placeholder_position"])
    for pair, (t, layer) in enumerate(zip(g["c/t"], g["c/l"], strict=True)):
        times = t.expand(len(prompts))
        vectors = neti.vectors(times, concept, None)[layer][None]
        base, bypass = vectors.chunk(2, dim=-1)
        from hiperlab.model import text as clip

        embedded = clip.embed(neti.model.text, tokens.ids, base, (rows, positions))[0]
        golden.close("c embeddings", embedded, g["c/embeddings"][pair], 2e-5)
        states = neti.model.hidden_states(tokens, base)
        golden.close("c before the final norm", states[0], g["c/pre_ln"][pair], 2e-5)
        both = neti.encode(prompts, times, None)
        golden.close("c keys", both.keys[layer], g["c/context"][pair], 2e-5)
        golden.close("c values", both.layer(int(layer))[1], g["c/context_bypass"][pair], 2e-5)
        changed = neti.model.normalise_text(add_bypass(states[0, rows, positions], bypass[0]))
        golden.close("c bypass row", changed, g["c/context_bypass"][pair][rows, positions], 2e-5)


def test_c_truncated_and_special_prompts(neti, twin, cfg, subject, g) -> None:
    prompts, pair = filled(cfg, cfg["prompts"]), 1
    t, layer = g["c/t"][pair].expand(len(prompts)), int(g["c/l"][pair])
    cut = torch.full((neti.model.layers, len(prompts)), int(g["b/truncation_idx"][2]))
    truncated = neti.encode(prompts, t, cut)
    golden.close("c truncated keys", truncated.keys[layer], g["c/truncated_context"], 2e-5)
    golden.close("c truncated values", truncated.layer(layer)[1], g["c/truncated_context_bypass"], 2e-5)
    plain = load(build(twin, cfg, subject, bypass=False), g, *VARIANTS["no_bypass"][1])
    golden.close("c no bypass", plain.encode(prompts, t, None).keys[layer], g["c/no_bypass_context"], 2e-5)
    two = filled(cfg, [cfg["two_placeholder_prompt"]])
    assert torch.equal(ids(neti, cfg, two), g["c/two_placeholders/input_ids"])
    twice = neti.encode(two, t[:1], None)
    golden.close("c two placeholders, keys", twice.keys[layer], g["c/two_placeholders/context"], 2e-5)
    golden.close("c two placeholders, values", twice.layer(layer)[1], g["c/two_placeholders/context_bypass"], 2e-5)
    negative = [cfg["negative_prompt"]]
    assert torch.equal(ids(neti, cfg, negative), g["c/negative_input_ids"])
    golden.close("c negative", neti.model.encode_text(negative), g["c/negative_context"], 2e-5)


def test_d_unet(neti, cfg, g) -> None:
    assert neti.model.cross_attention == cfg["cross_attention_call_order"]
    contexts = neti.encode(filled(cfg, cfg["prompts"]), g["d/timesteps"], None)
    golden.close("d contexts", contexts.keys, g["d/contexts"], 2e-5)
    assert contexts.values is not None
    golden.close("d contexts bypass", contexts.values, g["d/contexts_bypass"], 2e-5)
    outputs: dict[str, torch.Tensor] = {}
    modules = dict(neti.model.unet.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
        for name in neti.model.cross_attention
    ]
    prediction = neti.model.predict(g["d/latents"], g["d/timesteps"], contexts)
    for handle in handles:
        handle.remove()
    golden.close("d prediction", prediction, g["d/noise_pred"], 2e-5)
    for index, name in enumerate(neti.model.cross_attention):
        golden.close("d attention outputs", outputs[name], g[f"d/attn2_out/{index:02d}"], 2e-5)

    def predict(keys, values=None):
        return neti.model.predict(g["d/latents"], g["d/timesteps"], Conditioning(keys, values))

    keys, values = g["d/contexts"], g["d/contexts_bypass"]
    golden.close("d no bypass", predict(keys), g["d/noise_pred_no_bypass"], 2e-5)
    golden.close("d single context", predict(keys[:1]), g["d/noise_pred_single_context"], 2e-5)
    golden.close("d contexts times 4", predict(4 * keys, 4 * values), g["d/noise_pred_contexts_times_4"], 2e-5)


def test_e_latents(twin, g) -> None:
    from hiperlab.model.noise import sample_posterior

    moments = twin.encode_moments(g["e/pixel_values"])
    mean, logvar = moments.chunk(2, dim=1)
    golden.close("e vae mean", mean, g["e/vae_mean"], 1e-5)
    golden.close("e vae std", (0.5 * logvar).exp(), g["e/vae_std"], 1e-5)
    latents = twin.scale(sample_posterior(moments, g["e/vae_eps"]))
    golden.close("e latents", latents, g["e/latents"], 1e-5)
    golden.close("e noisy", twin.add_noise(latents, g["e/noise"], g["e/timesteps"]), g["e/noisy_latents"], 1e-5)


@pytest.mark.parametrize("case", ["nested", "plain"])
def test_e_loss_and_gradients(case, neti, cfg, g) -> None:
    prompts = filled(cfg, cfg["step_prompts"])
    assert torch.equal(ids(neti, cfg, prompts), g["e/input_ids"])
    contexts = neti.encode(prompts, g["e/timesteps"], g["e/keep"] if case == "nested" else None)
    if case == "nested":
        golden.close("e contexts", contexts.keys, g["e/nested/contexts"], 2e-5)
        rows, positions, _ = neti.model.tokenize(prompts, neti.slots).occurrences()
        assert contexts.values is not None
        golden.close("e bypass rows", contexts.values[:, rows, positions], g["e/nested/contexts_bypass_row"], 2e-5)
    prediction = neti.model.predict(g["e/noisy_latents"], g["e/timesteps"], contexts)
    golden.close(f"e {case} prediction", prediction, g[f"e/{case}/noise_pred"], 1e-5)
    target = neti.model.target(g["e/latents"], g["e/noise"], g["e/timesteps"])
    loss = denoising_loss(prediction, target).mean()
    golden.close(f"e {case} loss", loss, g[f"e/{case}/loss"], 1e-5)
    loss.backward()
    gradients = {name: p.grad[0] for name, p in neti.mapper.named_parameters() if p.grad is not None}
    expected = golden.pick(g, f"e/{case}/grad/")
    assert expected.keys() <= gradients.keys()
    for name, value in expected.items():
        golden.close(f"e {case} gradients", gradients[name], value, 1e-4)
    if case == "plain":
        weight = gradients["input_layer.weight"]
        golden.close("e plain row norms", weight.norm(dim=1), g["e/plain/grad_row_norm/input_layer.weight"], 1e-4)
        golden.close("e plain column norms", weight.norm(dim=0), g["e/plain/grad_col_norm/input_layer.weight"], 1e-4)


SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_truncated": ("DDIMScheduler", {}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_f_sampling(name, neti, cfg, g) -> None:
    scheduler, options = SAMPLERS[name]
    steps = cfg["dpm_steps"] if name == "dpmsolver" else cfg["steps"]
    sampler = Sampler(scheduler, steps, cfg["guidance"], options)
    variant = f"truncation={cfg['truncation_sample']}" if name == "ddim_truncated" else ""
    prompts = filled(cfg, [cfg["sample_prompt"]])
    used: list[Conditioning] = []
    trajectory: list[torch.Tensor] = []

    def condition(t):
        step = Step(prompts, torch.zeros(1, dtype=torch.long), t.expand(1), variant=variant)
        used.append(neti.condition(step))
        return used[-1]

    neti.eval()
    schedule = sampler.build(neti.model, steps)
    assert schedule.timesteps.tolist() == g[f"f/{name}/timesteps"].tolist()
    unconditional = Conditioning(neti.model.encode_text([cfg["negative_prompt"]])[None])
    latents = denoise(
        neti.model, g["f/initial_latents"], schedule, condition, unconditional, cfg["guidance"],
        watch=lambda _, z: trajectory.append(z),
    )  # fmt: skip
    golden.close(f"f {name} trajectory", torch.stack(trajectory), g[f"f/{name}/trajectory"], 1e-4)
    golden.close(f"f {name} latents", latents, g[f"f/{name}/final_latents"], 1e-4)
    if name == "ddim":
        golden.close("f first contexts", used[0].keys, g["f/ddim/contexts_step_first"], 2e-5)
        golden.close("f last contexts", used[-1].keys, g["f/ddim/contexts_step_last"], 2e-5)
        assert used[0].values is not None and used[-1].values is not None
        golden.close("f first bypass", used[0].values, g["f/ddim/contexts_bypass_step_first"], 2e-5)
        golden.close("f last bypass", used[-1].values, g["f/ddim/contexts_bypass_step_last"], 2e-5)
        golden.close("f decoded image", neti.model.decode(latents), g["f/ddim/decoded_image"], 1e-4)


@pytest.mark.parametrize("name", ["ti", "xti"])
def test_t_special_cases(name, twin, cfg, subject, g) -> None:
    method: TextualInversion | ExtendedTextualInversion
    if name == "ti":
        method = TextualInversion(twin, [subject], ADAMW, seed=0, num_vectors=1)
    else:
        method = ExtendedTextualInversion(twin, [subject], ADAMW, seed=0, sites="transformers")
    method.load_artifact(0, {"vectors": g[f"t/{name}/vectors"]})
    prompts = filled(cfg, cfg["step_prompts"])
    step = Step(prompts, torch.zeros(len(prompts), dtype=torch.long), g["e/timesteps"])
    contexts = method.condition(step)
    golden.close(f"t {name} context", contexts.layer(6)[0], g[f"t/{name}/context_layer_06"], 2e-5)
    prediction = twin.predict(g["e/noisy_latents"], g["e/timesteps"], contexts)
    golden.close(f"t {name} prediction", prediction, g[f"t/{name}/noise_pred"], 1e-5)
    loss = denoising_loss(prediction, twin.target(g["e/latents"], g["e/noise"], g["e/timesteps"])).mean()
    golden.close(f"t {name} loss", loss, g[f"t/{name}/loss"], 1e-5)
    loss.backward()
    assert method.vectors.grad is not None
    golden.close(f"t {name} gradient", method.vectors.grad[0], g[f"t/{name}/grad"], 1e-4)


def test_h_training_loop(neti, root, cfg, g, monkeypatch) -> None:
    """The authors' real loop, replayed through our `training_step` with their recorded draws."""
    from hiperlab import draws
    from hiperlab.base import method as contract
    from hiperlab.method import neti as module

    tokenizer, adam = neti.model.tokenizer, cfg["adam"]
    optimizer = torch.optim.AdamW(neti.param_groups(), lr=cfg["scaled_lr"], **adam)
    neti.train()
    for micro in range(cfg["opt_steps"] * cfg["accum"]):
        recorded = {"noise": g["h/noise"][micro], "timestep": g["h/timesteps"][micro]}
        monkeypatch.setattr(draws, "normal", lambda seed, purpose, samples, shape, r=recorded: r[purpose])
        monkeypatch.setattr(draws, "integers", lambda seed, purpose, samples, high, r=recorded: r[purpose])
        monkeypatch.setattr(module, "draw_keep", lambda *args, micro=micro: g["h/keep"][micro])
        monkeypatch.setattr(contract.Method, "clean_latents", lambda self, batch, micro=micro: g["h/latents"][micro])
        prompts = [_text(tokenizer, row, cfg) for row in g["h/input_ids"][micro]]
        rows = len(prompts)
        zeros = torch.zeros(rows, dtype=torch.long)
        batch = Batch(torch.zeros(rows, 3, 8, 8), prompts, zeros, torch.arange(rows), zeros, zeros.bool())
        assert torch.equal(ids(neti, cfg, prompts), g["h/input_ids"][micro])
        loss = neti.training_step(batch, micro)
        golden.close("h loss", loss, g["h/loss"][micro], 1e-5)
        (loss / cfg["accum"]).backward()
        if (micro + 1) % cfg["accum"] == 0:
            optimizer.step()
            optimizer.zero_grad()
    final = golden.tensors(root / "checkpoint" / "checkpoint.safetensors")
    ours = neti.artifact(0)
    for name, value in golden.pick(final, "state_dict/").items():
        error = (ours[f"mapper.{name}"] - value).abs().max() / cfg["scaled_lr"]
        golden.close("h final weights / lr", error, torch.zeros(()), 0.1, absolute=True)


def _text(tokenizer, row, cfg) -> str:
    """The prompt whose tokens these are, decoded run by run: words of several tokens stay whole."""
    end = row.tolist().index(tokenizer.eos_token_id)
    parts: list[list[int]] = [[]]
    for token in row.tolist()[1:end]:
        if token == cfg["placeholder_token_id"]:
            parts.append([])
        else:
            parts[-1].append(token)
    return f" {cfg['placeholder']} ".join(tokenizer.decode(part).strip() for part in parts).strip()


def test_authors_checkpoint_loads(neti, twin, cfg, subject, root, g) -> None:
    fresh = build(twin, cfg, subject)
    fresh.load_foreign(0, authors(root, "checkpoint"))
    plain = golden.tensors(root / "checkpoint" / "checkpoint.safetensors")
    for name, value in golden.pick(plain, "state_dict/").items():
        assert torch.equal(fresh.artifact(0)[f"mapper.{name}"], value)
    assert torch.equal(fresh.artifact(0)["mapper.w"], plain["encoder/w"])


def test_authors_checkpoint_of_full_width(root, cfg) -> None:
    """Width 768, written by the authors' saver: our mapper gives their outputs."""
    from hiperlab.layer.mapper import Mapper

    checkpoint = files.read(authors(root, "checkpoint768"))
    check = golden.tensors(root / "checkpoint768" / "check.safetensors")
    model = checkpoint.cfg["model"]
    outputs = checkpoint.state["output_layer.0.weight"].shape[0]
    mapper = Mapper(
        1, outputs, num_layers=cfg["unet_layers"], num_timesteps=1000, seed=0, positional_encoding=True,
        num_time_anchors=model["num_pe_time_anchors"], **model["pe_sigmas"],
    )  # fmt: skip
    mapper.load_state_dict({name: value[None] for name, value in {**checkpoint.state, "w": checkpoint.w}.items()})
    norm = torch.tensor(model["target_norm"]).expand(len(check["check/t"]))
    for item, keep in (("output", None), ("output_truncated", check["check/truncation_idx"].expand(len(norm)))):
        ours = rescale(mapper(check["check/t"], check["check/l"], 0, keep), norm, "joint")
        golden.close(f"checkpoint768 {item}", ours, check[f"check/{item}"], 1e-5)


def test_written_checkpoint_is_theirs(neti, root, tmp_path) -> None:
    """What we write has the keys, shapes and encoder of what they wrote, and reads back the same."""
    mapper, embeds = neti.export(0, tmp_path, steps=1)
    theirs = files.read(authors(root, "checkpoint"))
    ours = files.read(mapper)
    assert {name: value.shape for name, value in ours.state.items()} == {n: v.shape for n, v in theirs.state.items()}
    assert ours.cfg["model"].keys() <= theirs.cfg["model"].keys(), "their parser refuses unknown keys"
    assert ours.cfg["data"].keys() <= theirs.cfg["data"].keys() and ours.cfg["log"].keys() <= theirs.cfg["log"].keys()
    for name, value in ours.state.items():
        assert torch.equal(value, neti.artifact(0)[f"mapper.{name}"])
    raw = torch.load(embeds, weights_only=True)
    assert {name: tuple(row.shape) for name, row in raw.items()} == {neti.concepts[0].placeholder: (neti.model.width,)}


def test_keep_first_by_hand() -> None:
    hidden = torch.arange(1.0, 5.0).expand(3, 4)
    expected = torch.tensor([[0.0, 0, 0, 0], [1, 2, 0, 0], [1, 2, 3, 4]])
    assert torch.equal(keep_first(hidden, torch.tensor([0, 2, 4])), expected)
