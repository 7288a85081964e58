"""Attention maps, Prompt-to-Prompt, DDIM inversion and editing against the numbers of StyleDiffusion's authors.

Items are named as in golden/stylediffusion/README.md; limits are ten times the figures it gives, relative to the
largest reference value. The committed slice holds Prompt-to-Prompt's tables and two of its controllers. Prompts and
settings are the files' metadata; sizes, timesteps and layers are what the tensors' names and shapes say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from hiperlab.edit.attention_maps import CrossEdit, blend_mask, square, tokens_mask
from hiperlab.edit.prompt_to_prompt import AttentionEdits, Pair, PromptToPrompt, edit
from hiperlab.edit.token_alignment import encode, equalizer, refinement, replacement, time_table, word_indices
from hiperlab.model.attention_control import Record, layer_of
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.inversion import invert, move, predict_noise, previous, timesteps
from hiperlab.model.tiny import clip_tokenizer
from tests.parity import golden


@pytest.fixture(scope="module")
def root() -> Path:
    return golden.folder("stylediffusion")


@pytest.fixture(scope="module")
def twin(root):
    return golden.twin(8 * read(root, "common")["latent0"].shape[-1], "golden")


@pytest.fixture(scope="module", params=["golden", "slice"])
def tables(request) -> Path:
    """Where Prompt-to-Prompt's tables are: they need no twin, so a fresh clone has them too."""
    return golden.folder("stylediffusion") if request.param == "golden" else golden.SLICE / "stylediffusion"


def read(root: Path, name: str) -> dict[str, Tensor]:
    return golden.tensors(root / f"{name}.safetensors")


def meta(root: Path, name: str) -> dict[str, str]:
    with safe_open(root / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def close(item: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    golden.close(f"stylediffusion {item}", ours, theirs, limit)


def text(twin, prompt: str) -> Conditioning:
    return Conditioning(twin.encode_text([prompt])[None])


def test_common(root, twin) -> None:
    g, m = read(root, "common"), meta(root, "common")
    for name in ("src", "tgt", "refine", "uncond"):
        prompt = m.get(f"prompt_{name}", "")
        assert torch.equal(twin.tokenize([prompt]).ids, g[f"input_ids.{name}"])
        close(f"common text_emb.{name}", twin.encode_text([prompt]), g[f"text_emb.{name}"], 4e-6)
    lengths = {f"timesteps_{steps}": steps for steps in golden.numbers(g, r"timesteps_(\d+)")}
    for name, steps in {"timesteps": int(m["num_ddim_steps"]), **lengths}.items():
        assert timesteps(steps) == g[name].flip(0).tolist()
    close("common alphas_cumprod", twin.alpha_bar, g["alphas_cumprod"], 1e-6)
    assert float(g["final_alpha_cumprod"]) == float(g["alphas_cumprod"][0])


def test_ddim(root, twin) -> None:
    g, m = read(root, "ddim"), meta(root, "ddim")
    steps = int(m["num_ddim_steps"])
    source, empty = text(twin, m["prompt_src"]), text(twin, "")
    recorded = golden.numbers(g, r"attn_target\.([1-9]\d*)\..*\.headmean")  # entry 0 is a sum, never a target
    (pixels,) = {g[name].shape[0] for name in g if name.endswith(".headmean")}
    found = invert(twin, g["latents"][:1], source, steps, lambda layer, size: layer.cross and size == pixels)
    close("ddim latents", found.latents[:, 0], g["latents"], 2e-5)
    assert recorded
    for k in recorded:
        number = {"down": 0, "up": 0}
        for layer, maps in found.maps.items():
            name = f"attn_target.{k}.{layer.place}_cross.{number[layer.place]}"
            number[layer.place] += 1
            close("ddim attn_target", maps[k, 0].mean(0), g[f"{name}.headmean"], 8e-6)
            for first in golden.numbers(g, rf"{re.escape(name)}\.first(\d+)tokens"):
                theirs = g[f"{name}.first{first}tokens"]
                close("ddim attn_target, all heads", maps[k, 0, :, :, :first], theirs, 8e-6)
        assert sum(number.values()) == sum(name.startswith(f"attn_target.{k}.") for name in g if "headmean" in name)
    runs = [name for name in g if name.startswith("recon_w")]
    assert runs
    for name in runs:
        guidance, z = float(name.removeprefix("recon_w")), g["latents"][-1:]
        for step, t in enumerate(reversed(timesteps(steps))):
            with torch.no_grad():
                noise = predict_noise(twin, z, t, source)
                if guidance > 1:
                    without = predict_noise(twin, z, t, empty)
                    noise = without + guidance * (noise - without)
            z = previous(twin, z, noise, t, steps)
            close(f"ddim {name}", z, g[name][step + 1 : step + 2], 2e-4)


def test_moves_are_inverse_to_each_other() -> None:
    z, noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    a, b = torch.tensor(0.3), torch.tensor(0.9)
    torch.testing.assert_close(move(move(z, noise, a, b), noise, b, a), z, atol=1e-5, rtol=0)


@torch.no_grad()
def test_unet_kv(root, twin) -> None:
    g, m = read(root, "unet_kv"), meta(root, "unet_kv")
    both = Conditioning(g["context_k"][None], g["context_v"][None])
    times = golden.numbers(g, r"noise_kv\.t(\d+)")
    assert times
    for t in times:
        for name, states in (("kv", both), ("plain", Conditioning(g["context_k"][None])), ("uncond", text(twin, ""))):
            close(f"unet_kv noise_{name}", predict_noise(twin, g["x"], t, states), g[f"noise_{name}.t{t}"], 1.5e-5)
    close("unet_kv context_k", twin.encode_text([m["prompt_src"]]), g["context_k"], 4e-6)
    seen: dict[str, Tensor] = {}
    modules = dict(twin.unet.named_modules())
    names = [name.removeprefix("attn2_out.") for name in g if name.startswith("attn2_out.")]
    handles = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})) for name in names
    ]
    middle = times[len(times) // 2]  # of the three, where the layers' outputs were recorded
    predict_noise(twin, g["x"], middle, both)
    plain = dict(seen)
    predict_noise(twin, g["x"], middle, both.controlled(Record(lambda layer, size: True)))
    for handle in handles:
        handle.remove()
    for name in names:
        close("unet_kv attn2_out", plain[name], g[f"attn2_out.{name}"], 1.5e-5)
        close("unet_kv attn2_out, maps made", seen[name], g[f"attn2_out.{name}"], 1.5e-5)


@torch.no_grad()
def test_attn(root, twin) -> None:
    g, m = read(root, "attn"), meta(root, "attn")
    states = Conditioning(twin.encode_text([m["prompt_src"], m["prompt_tgt"]])[None])
    records = []
    for t in json.loads(m["timesteps_used"]):
        records.append(Record(lambda layer, size: size <= 1024))
        predict_noise(twin, g["x"].expand(2, -1, -1, -1), t, states.controlled(records[-1]))
    number: dict[str, int] = {}
    for layer, maps in records[0].maps.items():
        kind = f"{layer.place}_{'cross' if layer.cross else 'self'}"
        name = f"step0.{kind}.{number.setdefault(kind, 0)}"
        number[kind] += 1
        theirs = g[f"{name}.headmean"]
        stride = (
            maps.shape[2] // theirs.shape[1]
        )  # of large maps only the first prompt and every so many-th query pixel
        close("attn maps", maps.mean(1)[: len(theirs), ::stride], theirs, 2.4e-5)
        if f"{name}.full" in g:
            close("attn maps, all heads", maps.flatten(0, 1), g[f"{name}.full"], 2.4e-5)
    assert sum(number.values()) == sum(name.endswith(".headmean") for name in g)
    sides = golden.numbers(g, r"aggregate\.cross\.res(\d+)\.select0")
    assert sides
    for side in sides:
        for row in golden.numbers(g, rf"aggregate\.cross\.res{side}\.select(\d+)"):
            chosen = [
                maps[row]
                for record in records
                for layer, maps in record.maps.items()
                if layer.cross and layer.place != "mid" and maps.shape[2] == side * side
            ]
            mean = torch.cat(chosen).mean(0).view(side, side, -1)
            close("attn aggregates", mean, g[f"aggregate.cross.res{side}.select{row}"], 3e-6)


def test_p2p_tables(tables) -> None:
    """Word indices, mappers, time tables and factors are the authors', number by number."""
    g, m, tokens = read(tables, "p2p"), meta(tables, "p2p"), clip_tokenizer()
    for name in sorted(m):
        kind = name.partition(".")[0]
        if kind == "replace":
            case = json.loads(m[name])
            for key, positions in case["word_inds"].items():
                side, _, word = key.partition(":")
                assert word_indices(case["prompts"]["ab".index(side)], word, tokens) == positions, key
            assert [encode(prompt, tokens) for prompt in case["prompts"]] == case["ids"]
            exact("p2p replace mapper", replacement(*case["prompts"], tokens), g[f"{name}.mapper"])
        elif kind == "refine":
            mapper, aligned = refinement(*json.loads(m[name])["prompts"], tokens)
            assert torch.equal(mapper, g[f"{name}.mapper"].long()), name
            exact("p2p refine alphas", aligned, g[f"{name}.alphas"])
        elif kind == "alpha_time":
            case = json.loads(m[name])
            windows = case["cross_replace_steps"]
            windows = dict(windows) if isinstance(windows, dict) else {"default_": windows}
            default = windows.pop("default_", (0.0, 1.0))
            table = time_table(case["prompts"][1], case["num_steps"], default, windows, tokens)
            exact("p2p alpha_time", table, g[name])
    for name, prompt in (("equalizer", "prompt_tgt"), ("equalizer_refine", "prompt_refine")):
        chosen, values = json.loads(m[name])
        exact("p2p equalizer", equalizer(m[prompt], dict(zip(chosen, values, strict=True)), tokens)[None], g[name])


KINDS_OF_EDIT = ("replace", "refine", "replace_reweight", "refine_reweight", "reweight_only")


@pytest.mark.parametrize("kind", KINDS_OF_EDIT)
def test_p2p_controllers(tables, kind) -> None:
    """What comes out of a step, and what the store holds afterwards: the edited map."""
    g, m, tokens = read(tables, "p2p"), meta(tables, "p2p"), clip_tokenizer()
    case = json.loads(m["controllers"])
    source, target = case["prompts_refine" if kind.startswith("refine") else "prompts_replace"]
    mapper, aligned = None, None
    if kind.startswith("replace"):
        mapper = replacement(source, target, tokens)
    elif kind.startswith("refine"):
        mapper, aligned = refinement(source, target, tokens)
    chosen, values = json.loads(m["equalizer_refine" if kind.startswith("refine") else "equalizer"])
    factors = equalizer(target, dict(zip(chosen, values, strict=True)), tokens) if "reweight" in kind else None
    table = time_table(target, case["num_steps"], case["cross"], {}, tokens)
    pair = Pair(CrossEdit(table, mapper, aligned, factors), region=torch.zeros(2, 77))

    def rows(maps: Tensor) -> Tensor:
        return maps.unflatten(0, (case["batch"], case["heads"])).clone()

    half, pixels = case["batch"], g["in.cross"].shape[1]
    edits = AttentionEdits([pair], case["num_steps"], case["self"], case["uncond_self"], pixels, 0.3, guided=True)
    cross, within = layer_of("down_blocks.0.attn2"), layer_of("down_blocks.0.attn1")
    steps = golden.numbers(g, rf"out\.{kind}\.step(\d+)\.cross")
    if not steps:
        pytest.skip(f"{kind} is not in the committed slice; the full golden folder has it")
    for step in steps:
        edits.sums.clear()
        control, maps = edits.at(step), rows(g["in.cross"])
        assert control.wants(cross, pixels)
        found = control(cross, torch.cat([maps, maps]))
        exact("p2p edited maps", found[half:].flatten(0, 1), g[f"out.{kind}.step{step}.cross"])
        uncond = found[:half].flatten(0, 1)
        if f"stored.{kind}.step{step}.cross" in g:
            exact("p2p stored maps", edits.sums[cross].flatten(0, 1), g[f"stored.{kind}.step{step}.cross"])
        if kind == "replace":
            maps = rows(g["in.self"])
            found = torch.cat([maps, maps])
            if control.wants(within, g["in.self"].shape[1]):
                found = control(within, found)
            exact("p2p self maps", found[half:].flatten(0, 1), g[f"out.replace.step{step}.self"])
            exact("p2p P2Plus maps", found[:half].flatten(0, 1), g[f"out.replace.step{step}.uncond_self"])
            exact("p2p P2Plus cross maps", uncond, g[f"out.replace.step{step}.uncond_cross"])
            assert bool(g["big_self_unchanged"]) and not control.wants(within, 34 * 34)


def test_p2p_blend(tables) -> None:
    g, m, tokens = read(tables, "p2p"), meta(tables, "p2p"), clip_tokenizer()
    case = json.loads(m["blend"])
    source, target = case["prompts"]

    def region(words) -> Tensor:
        chosen = [
            [position for word in of_text for position in word_indices(text, word, tokens)]
            for text, of_text in zip((source, target), words, strict=True)
        ]
        return torch.stack([tokens_mask(positions, 77) for positions in chosen])

    table = torch.zeros(case["num_steps"] + 1, 77)
    size = tuple(g["blend.x_t"].shape[-2:])
    for kind, fixed in (("plain", None), ("substruct", region(case["substruct"]))):
        pair = Pair(CrossEdit(table), region(case["words"]), fixed)
        pixels = next(value for name, value in g.items() if name.startswith("blend.up_cross.")).shape[1]
        edits = AttentionEdits([pair], case["num_steps"], 0.0, 0.0, pixels, case["th"][0], guided=True)
        for place in ("down", "up"):
            for number in golden.numbers(g, rf"blend\.{place}_cross\.(\d+)"):
                layer = layer_of(f"{place}_blocks.0.attentions.{number}.attn2")
                edits.store(layer, g[f"blend.{place}_cross.{number}"][:, None])
        maps = square(torch.cat(list(edits.sums.values()), dim=1))
        wide = g[f"blend.{kind}.mask"].bool()  # as recorded: before the kept words' regions are taken out
        if fixed is not None:
            inner = blend_mask(maps, fixed, size, case["th"][1], pool=False)
            assert torch.equal(inner, g["blend.substruct.mask_sub"].bool())
            wide = wide & ~inner
        assert torch.equal(edits.mask(maps, pair, size), wide)
        for call, active in enumerate(g[f"blend.{kind}.active"].tolist()):
            found = edits.blend(call, g["blend.x_t"])
            exact("p2p blend", found, g[f"blend.{kind}.out"] if active else g["blend.x_t"])


def exact(item: str, ours: Tensor, theirs: Tensor) -> None:
    close(item, ours, theirs.to(ours.dtype), 0.0)


RUNS = ("p2plus", "p2p", "replace_noeq", "novalue", "noattn", "refine", "recon")


@pytest.mark.parametrize("name", RUNS)
def test_edit(root, twin, name) -> None:
    """Whole edits from recorded networks: every row after every step."""
    g, m = read(root, "edit"), meta(root, "edit")
    steps = int(m["num_ddim_steps"])
    how = json.loads(m[name]) if name != "recon" else {**RECON, "prompts": [m["prompt_src"]]}
    seen = drawn(twin, read(root, "inner"), g["features"], g["x_T"], steps, float(m["guidance_scale"]), how)[0]
    close(f"edit {name}", torch.stack(seen), g[f"{name}.latents"], 2.4e-4)


@pytest.mark.slow
def test_edit64(root) -> None:
    """At 64 x 64 latents, with local blending: inversion, every row after every step, and the masks."""
    g, m = read(root, "edit64"), meta(root, "edit64")
    steps = int(m["num_ddim_steps"])
    stack = golden.twin(8 * g["latent0"].shape[-1], "golden")
    found = invert(stack, g["latent0"], text(stack, m["prompt_src"]), steps).latents[:, 0]
    close("edit64 latents", found, g["latents"], 1e-5)
    how = {
        **json.loads(m["taus"]), "replace": json.loads(m["replace"]), "prompts": json.loads(m["prompts"]),
        "equalizer": json.loads(m["equalizer"]), "blend": [pair[0] for pair in json.loads(m["blend"])],
        "blend_threshold": json.loads(m["blend_th"])[0],
    }  # fmt: skip
    guidance = float(m["guidance_scale"])
    seen, masks = drawn(stack, read(root, "inner"), g["features"], g["latents"][-1:], steps, guidance, how)
    close("edit64 edit", torch.stack(seen), g["edit.latents"], 2.5e-4)
    for step, mask in masks.items():
        assert torch.equal(mask, g["mask"][step].bool()), step
    assert masks, "blending was never active"


RECON = {"tau_v": 1.0, "tau_c": 0.0, "tau_s": 0.0, "tau_u": 0.0, "replace": True, "equalizer": None}


def drawn(stack, networks, features, start, steps, guidance, how) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Latents after each step, and local blending's masks by step, with learnt values as StyleDiffusion edits."""
    prompts = how["prompts"]
    settings = PromptToPrompt(
        "replace" if how["replace"] else "refine", how["tau_c"], how["tau_s"], how["tau_u"], {},
        dict(zip(*how["equalizer"], strict=True)) if how["equalizer"] else {}, how.get("blend"), None,
        how.get("blend_threshold", 0.3), False, None, False,
    )  # fmt: skip
    states = stack.encode_text(prompts)
    empty = Conditioning(stack.encode_text([""]).expand_as(states)[None])

    def conditional(step: int) -> Conditioning:
        scale, shift = mapped(networks, step, features).chunk(2, dim=1)
        values = states * scale + shift
        if step >= steps * how["tau_v"]:
            values = torch.cat([values[:1], states[1:]])
        return Conditioning(states[None], values[None])

    seen: list[Tensor] = []
    masks: dict[int, Tensor] = {}
    edits = settings.edits(stack.tokenizer, prompts[0], prompts[1:], steps, start.shape[-1], guided=True)
    masked = edits.mask

    def watched(maps: Tensor, pair: Pair, size: tuple[int, int]) -> Tensor:
        masks[len(seen)] = masked(maps, pair, size)
        return masks[len(seen)]

    edits.mask = watched  # type: ignore[method-assign]
    start = start.expand(len(prompts), -1, -1, -1)
    edit(stack, start, steps, conditional, lambda step: empty, guidance, edits, watch=lambda _, z: seen.append(z))
    return seen, masks


def mapped(networks: dict[str, Tensor], step: int, features: Tensor) -> Tensor:
    """M_i(E) (1, 154, D), written naively: batch norm over one picture, in training mode."""

    def convolve(name: str, x: Tensor) -> Tensor:
        return F.conv1d(x, networks[f"final.{step}.{name}.weight"], networks[f"final.{step}.{name}.bias"])

    x = convolve("conv_block.0.0", convolve("conv_start", features))
    x = F.batch_norm(
        x, None, None, networks[f"final.{step}.conv_block.0.1.weight"], networks[f"final.{step}.conv_block.0.1.bias"],
        training=True,
    )  # fmt: skip
    return convolve("conv_end", F.leaky_relu(x, 0.01))
