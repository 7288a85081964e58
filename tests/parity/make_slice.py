"""Cut the committed slice from the golden folders: `python -m tests.parity.make_slice`.

The slice lets a fresh clone check the core numbers without the full folders: groups a, b, c, g of golden/neti
(positional encoding, mapper, rescaling, text encoder with bypass), of the others what their functions say, and of the
twin's text encoder all but the embedding rows that no golden prompt uses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hiperlab.model.tiny import clip_tokenizer
from tests.parity import golden


def main() -> None:
    """Write tests/parity/slice anew, but for what was recorded on the tiny model and has no other source."""
    source, target = golden.folder("neti"), golden.SLICE / "neti"
    for folder in golden.SLICE.iterdir():
        meta = folder / "meta.json"
        if not (meta.is_file() and "tiny_seed" in golden.config(meta)):
            shutil.rmtree(folder)
    target.mkdir(parents=True)
    everything = load_file(source / "golden.safetensors")
    kept = {name: value for name, value in everything.items() if name.split("/")[0] in _GROUPS}
    save_file(kept, target / "golden.safetensors")
    shutil.copyfile(source / "config.json", target / "config.json")
    hiper = _hiper() + _lora()
    _mapping()
    _p2p()
    _e4t()
    _dti()
    _cross_initialization()
    _edits()
    _dvar()
    _dco()
    _svdiff()
    _peft()
    _sdxl()

    text = golden.folder("tiny-sd14") / "text_encoder"
    state = load_file(text / "model.safetensors")
    used = torch.cat([value.flatten() for name, value in kept.items() if name.endswith("input_ids")] + hiper)
    ids = torch.cat([used, kept["ids/super_category_token_id"].flatten()]).unique()
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    ids = ids[ids < len(state[name])]  # the placeholder's own id is no row
    state["rows"], state["ids"] = state.pop(name)[ids].clone(), ids
    (golden.SLICE / "text_encoder").mkdir()
    save_file(state, golden.SLICE / "text_encoder" / "model.safetensors")
    config = json.loads((text / "config.json").read_text())
    (golden.SLICE / "text_encoder" / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _hiper() -> list[torch.Tensor]:
    """The slice of golden/hiper; returns the tokens that its prompts use."""
    source, target = golden.folder("hiper"), golden.SLICE / "hiper"
    target.mkdir()
    everything = load_file(source / "golden.safetensors")
    save_file({name: everything[name] for name in _HIPER}, target / "golden.safetensors")
    with safe_open(source / "imagic.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in _IMAGIC}
        text = json.loads(file.metadata()["imagic"])
    del text["unet_names"]
    save_file(kept, target / "imagic.safetensors", {"imagic": json.dumps(text)})
    for name in ("meta.json", "hiper_embeddings_step0.pt", "hiper_embeddings_step100.pt"):
        shutil.copyfile(source / name, target / name)
    words = clip_tokenizer()(text["prompt"], return_tensors="pt").input_ids.flatten()
    return [everything[f"{name}_ids"].flatten() for name in ("source", "target", "uncond")] + [words]


def _lora() -> list[torch.Tensor]:
    """The slice of golden/lora; returns the tokens that its prompt uses."""
    source, target = golden.folder("lora"), golden.SLICE / "lora"
    target.mkdir()
    for name, kept in _LORA.items():
        with safe_open(source / name, "pt") as file:
            values = {key: file.get_tensor(key) for key in file.keys() if key.startswith(kept)}  # noqa: SIM118
            save_file(values, target / name, file.metadata())
    shutil.copyfile(source / "meta.json", target / "meta.json")
    return [load_file(target / "h_lora.safetensors")["text.input_ids"].flatten()]


def _e4t() -> None:
    """The slice of golden/e4t: whole files of what needs neither the U-Net nor a run of the scripts."""
    target = golden.SLICE / "e4t"
    target.mkdir(exist_ok=True)
    for name in _E4T:
        shutil.copyfile(golden.folder("e4t") / name, target / name)


def _dti() -> None:
    """The slice of golden/dti: the optimizer, both runs' gradients and directions, the files; no network reads them."""
    source, target = golden.folder("dti"), golden.SLICE / "dti"
    everything = load_file(source / "golden.safetensors")
    kept = {name: value for name, value in everything.items() if name.startswith("o.") or name.split(".")[-1] in _DTI}
    target.mkdir(exist_ok=True)
    save_file(kept, target / "golden.safetensors")
    shutil.copyfile(source / "meta.json", target / "meta.json")
    _saved(source, target)


def _cross_initialization() -> None:
    """The slice of golden/cross_initialization: starts, texts, gradients, files, and the vocabulary rows they use."""
    source, target = golden.folder("cross_initialization"), golden.SLICE / "cross_initialization"
    everything, meta = load_file(source / "golden.safetensors"), golden.config(source / "meta.json")
    kept = {name: value for name, value in everything.items() if name.split(".")[-1] in _CROSS}
    target.mkdir(exist_ok=True)
    save_file(kept, target / "golden.safetensors")
    for name in ("meta.json", "names.txt"):
        shutil.copyfile(source / name, target / name)
    _saved(source, target)
    texts = [*meta["names"], *(" ".join(run.get("initialize_tokens", [])) for run in meta["runs"].values())]
    words = [torch.tensor(ids, dtype=torch.long) for ids in clip_tokenizer()(texts)["input_ids"]]
    used = torch.cat([*words, *(value.flatten() for name, value in kept.items() if name.endswith("input_ids"))])
    state = load_file(golden.folder("tiny-sd14") / "text_encoder" / "model.safetensors")
    table = next(value for name, value in state.items() if name.endswith("token_embedding.weight"))
    ids = used.unique()
    ids = ids[ids < len(table)]
    save_file({"ids": ids, "rows": table[ids].clone()}, target / "vocabulary.safetensors")


def _dvar() -> None:
    """The slice of golden/dvar: all series, and the ratios of two settings."""
    source, target = golden.folder("dvar"), golden.SLICE / "dvar"
    everything = load_file(source / "golden.safetensors")
    kept = {name: value for name, value in everything.items() if name.startswith("v.") and name.endswith(_DVAR)}
    target.mkdir(exist_ok=True)
    save_file(kept, target / "golden.safetensors")
    shutil.copyfile(source / "meta.json", target / "meta.json")


def _dco() -> None:
    """The slice of golden/dco: predictions, noise and losses."""
    source, target = golden.folder("dco"), golden.SLICE / "dco"
    everything = load_file(source / "golden.safetensors")
    kept = {name: value for name, value in everything.items() if name.split(".")[-1] in _DCO}
    target.mkdir(exist_ok=True)
    save_file(kept, target / "golden.safetensors")
    shutil.copyfile(source / "meta.json", target / "meta.json")


def _svdiff() -> None:
    """The slice of golden/svdiff: single layers, frozen, shifts and recomposed."""
    source, target = golden.folder("svdiff"), golden.SLICE / "svdiff"
    everything, meta = load_file(source / "golden.safetensors"), golden.config(source / "meta.json")
    sizes = [shape[0] for shape in meta["shift_shapes"]]
    shifts = dict(zip(meta["shift_names"], everything["given.delta"].split(sizes), strict=True))
    twin = golden.twin(meta["run"]["resolution"], "golden")
    parts = {"unet.": twin.unet, "text.text_model.": twin.text_module}
    kept = {}
    for layer in meta["layers"]:
        prefix = next(prefix for prefix in parts if layer.startswith(prefix))
        kept[f"frozen.{layer}"] = parts[prefix].get_parameter(f"{layer.removeprefix(prefix)}.weight").contiguous()
        kept[f"given.delta.{layer}.delta"] = shifts[f"{layer}.delta"].clone()
        kept[f"given.weight.{layer}"] = everything[f"given.weight.{layer}"]
    target.mkdir()
    save_file(kept, target / "golden.safetensors")
    (target / "meta.json").write_text(json.dumps({"layers": meta["layers"]}) + "\n")


def _peft() -> None:
    """The slice of golden/peft: of every file the first two layers, with its whole config."""
    source, target = golden.folder("peft"), golden.SLICE / "peft"
    meta = golden.config(source / "meta.json")
    first = load_file(source / "saved_ia3" / "adapter_model.safetensors")
    layers = sorted(key.removesuffix(".ia3_l") for key in first)[:2]
    for name in meta["tuners"]:
        folder = f"saved_{name}"
        (target / folder).mkdir(parents=True)
        everything = load_file(source / folder / "adapter_model.safetensors")
        kept = {key: value for key, value in everything.items() if key.startswith(tuple(f"{each}." for each in layers))}
        save_file(kept, target / folder / "adapter_model.safetensors")
        shutil.copyfile(source / folder / "adapter_config.json", target / folder / "adapter_config.json")
    known = ("own_settings", "example_keys")
    tuners = {name: {k: v for k, v in how.items() if k not in known} for name, how in meta["tuners"].items()}
    (target / "meta.json").write_text(json.dumps({"targets": layers, "tuners": tuners}, indent=1) + "\n")


def _sdxl() -> None:
    """The slice of golden/sdxl: token ids, the learnt pair, and of every LoRA file a few layers of each network."""
    source, target = golden.folder("sdxl"), golden.SLICE / "sdxl"
    for name in ("ti", "lora"):
        (target / name).mkdir(parents=True)
    everything = load_file(source / "golden.safetensors")
    save_file({name: everything[name] for name in ("a.ids_1", "a.ids_2")}, target / "golden.safetensors")
    meta = golden.config(source / "meta.json")
    kept = {name: meta[name] for name in ("model", "set", "seed", "versions", "settings", "scripts")}
    (target / "meta.json").write_text(json.dumps(kept, indent=1) + "\n")
    for path in (source / "ti").iterdir():
        shutil.copyfile(path, target / "ti" / path.name)
    for path in (source / "lora").iterdir():
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if any(part in key.replace(".", "_") for part in _SDXL)]  # noqa: SIM118
            values = {key: file.get_tensor(key) for key in names}
            save_file(values, target / "lora" / path.name, file.metadata())


def _saved(source: Path, target: Path) -> None:
    """The authors' own files, in folders that can be written to wherever they were copied from."""
    for path in source.glob("saved_*/*"):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / path.name)


def _mapping() -> None:
    """The slice of golden/stylediffusion's mapping network: a picture, its tokens, what the network makes of them."""
    target = golden.SLICE / "stylediffusion"
    target.mkdir(exist_ok=True)
    everything = load_file(golden.folder("stylediffusion") / "mapping.safetensors")
    kept = {name: value for name, value in everything.items() if not name.startswith(_NOT_OF_MAPPING)}
    save_file(kept, target / "mapping.safetensors")


def _p2p() -> None:
    """Prompt-to-Prompt's tables and two of its controllers, which need a tokenizer only."""
    target = golden.SLICE / "stylediffusion"
    target.mkdir(exist_ok=True)
    with safe_open(golden.folder("stylediffusion") / "p2p.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if name.startswith(_P2P)}  # noqa: SIM118
        save_file(kept, target / "p2p.safetensors", file.metadata())


def _edits() -> None:
    """Of the inversions what needs no network."""
    for name, kept in _EDITS.items():
        source, target = golden.folder(name), golden.SLICE / name
        target.mkdir()
        everything = load_file(source / "golden.safetensors")
        save_file({key: everything[key] for key in kept}, target / "golden.safetensors")
        for file in ("meta.json", "source.png"):
            shutil.copyfile(source / file, target / file)


_EDITS = {
    "direct_inversion": ("image", "input_ids"),
    "masactrl": ("direct.picture",),
    "plug_and_play": ("image",),
    "edit_friendly_ddpm": ("pixel_values", "latent0", "main.noise", "main.xts_drawn"),
}
_P2P = (
    "replace.", "refine.", "alpha_time.", "equalizer", "in.", "big_", "out.replace.", "stored.replace.",
    "out.refine_reweight.", "stored.refine_reweight.",
)  # fmt: skip
_NOT_OF_MAPPING = ("m.conv_block.0.1.running", "m.conv_block.0.1.num", "running_", "value_context_", "clip.proj")
_E4T = (
    "a_weight_offsets.safetensors", "c_encoder.safetensors", "c2_encoder_paper.safetensors",
    "init_encoder.safetensors", "meta.json",
)  # fmt: skip
_DTI = ("direction_start", "prior", "scale", "grad", "direction_after", "v_after", "learned")
_DCO = ("model_pred", "refer_pred", "noise", "timesteps", "loss")
_DVAR = (".losses", ".short.ratio", ".custom.ratio")
_CROSS = ("init", "input_ids", "states_0", "distance", "grad", "rows_after")
_LORA = {
    "h_lora.safetensors": ("layer.", "text."),
    "h_text_model_prefix.safetensors": ("text_encoder.",),
    "h_kohya.safetensors": ("lora_te_",),
    "i_dreambooth.safetensors": ("given.",),
    "j_custom_diffusion.safetensors": ("noise_pred.trained", "target", "mask"),
}
_HIPER = (
    "source_ids", "target_ids", "uncond_ids", "source_embeddings", "target_embeddings", "uncond_embeddings",
    "hiper_init", "grad", "hiper_after_1", "hiper_after_5", "hiper_after_101", "adam_exp_avg_5", "adam_exp_avg_sq_5",
    "preview_cond", "edit_cond", "edit_timesteps", "alphas_cumprod", "final_alpha_cumprod",
)  # fmt: skip
_IMAGIC = ("target_embeddings", "embedding_grad", "embedding_after", "optimized_embeddings", "edit0_cond", "edit1_cond")
_SDXL = (
    "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k", "input_blocks_4_1_transformer_blocks_0_attn1_to_k",
    "mid_block_attentions_0_transformer_blocks_1_attn2_to_v", "middle_block_1_transformer_blocks_1_attn2_to_v",
    "up_blocks_0_attentions_2_transformer_blocks_0_attn2_to_q", "output_blocks_2_1_transformer_blocks_0_attn2_to_q",
    "encoder_layers_0_self_attn_q_proj",
)  # fmt: skip
_GROUPS = ("a", "b", "c", "g", "ids", "mapper", "mapper_encoder")

if __name__ == "__main__":
    main()
