"""Textual Inversion: its files in a plain diffusers pipeline and back, in all forms that are around."""

from __future__ import annotations

import zipfile

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.model.load import pretrained
from tests.composed import SUBJECTS, build, train

CATS = SUBJECTS[:1]


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    """The twin as anyone would have it on disk: diffusers' layout."""
    path = tmp_path_factory.mktemp("twin")
    _pipeline(stack).save_pretrained(path)
    return path


def _pipeline(stack) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=stack.vae, text_encoder=stack.text, tokenizer=stack.tokenizer, unet=stack.unet,
        scheduler=DDIMScheduler.from_config(stack.scheduler_config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pt"])
def test_plain_pipeline_draws_the_same_picture(folder, tmp_path, num_vectors, ending) -> None:
    """The saved concept, loaded by `pipe.load_textual_inversion`, gives the picture that `sample` gave."""
    stack = pretrained("twin", str(folder), size=64)
    method = build("ti", stack, CATS, num_vectors=num_vectors)
    train(method, 2)
    word = CATS[0].placeholder
    ours = method.sample([f"a photo of {word} on a beach"], [7], steps=3, guidance=7.5)
    path = next(path for path in method.export(0, tmp_path, steps=1) if path.suffix == ending)

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    token = "my-cat" if ending == ".pt" else word  # A1111's form names the token by the file's `name`
    pipe.load_textual_inversion(str(path), token=token if ending == ".pt" else None)
    theirs = pipe(
        f"a photo of {token} on a beach", num_inference_steps=3,
        guidance_scale=7.5, height=64, width=64, output_type="pt", generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_their_files_load(stack, tmp_path) -> None:
    vectors = torch.randn(2, 32)
    save_file({"<anything>": vectors}, tmp_path / "diffusers.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "emb_params.safetensors")
    torch.save({"<x>": vectors[0]}, tmp_path / "old_one_row.bin")
    torch.save(vectors, tmp_path / "bare.pt")
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": vectors}}, tmp_path / "webui.pt")
    compvis = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": vectors})}
    torch.save(compvis, tmp_path / "compvis.pt")
    for name in ("diffusers.safetensors", "emb_params.safetensors", "bare.pt", "webui.pt", "compvis.pt"):
        assert torch.equal(embedding.read(tmp_path / name), vectors), name
    assert torch.equal(embedding.read(tmp_path / "old_one_row.bin"), vectors[:1])
    method = build("ti", stack, CATS, num_vectors=2)
    method.load_foreign(0, tmp_path / "compvis.pt")
    assert torch.equal(method.artifact(0)["vectors"], vectors)
    for keys in (("<cat>_1", "<cat>", "<cat>_2"), ("cat_1", "cat", "cat_2"), ("<cat_1>", "<cat>", "<cat_2>")):
        rows = torch.randn(3, 32)
        save_file(dict(zip(keys, rows[[1, 0, 2]].contiguous().unbind())), tmp_path / "numbered.safetensors")
        assert torch.equal(embedding.read(tmp_path / "numbered.safetensors"), rows), keys
    for keys in (("<cat>", "<dog>_1"), ("<cat>_1", "<cat>_2"), ("<cat>", "<cat>_2")):
        torch.save(dict(zip(keys, rows)), tmp_path / "others.bin")
        with pytest.raises(UserError, match=f"expected one tensor .* found {keys[0]}, {keys[1]}"):
            embedding.read(tmp_path / "others.bin")
    with pytest.raises(UserError, match="num_vectors=1"):
        method.load_foreign(0, tmp_path / "old_one_row.bin")


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/hiperlab-was-here",)


def test_nothing_from_outside_runs(tmp_path) -> None:
    torch.save({"<x>": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="broken or holds more than tensors"):
        embedding.read(tmp_path / "evil.bin")
    (tmp_path / "torn.bin").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="not loaded"):
        embedding.read(tmp_path / "torn.bin")
    torch.save({"<x>": torch.full((1, 4), float("nan"))}, tmp_path / "nan.bin")
    with pytest.raises(UserError, match="NaN"):
        embedding.read(tmp_path / "nan.bin")
    torch.save({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "two.bin")
    with pytest.raises(UserError, match="no embedding file"):
        embedding.read(tmp_path / "two.bin")


def test_more_than_the_file_s_own_size_is_not_unpacked(tmp_path) -> None:
    """A compressed archive, one number shown many times, and a file larger than any embedding."""
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2_000_000)
    assert (tmp_path / "bomb.bin").stat().st_size < 10_000
    with pytest.raises(UserError, match="is a compressed archive"):
        embedding.read(tmp_path / "bomb.bin")
    torch.save({"<x>": torch.zeros(1, 1).expand(10**6, 10**6)}, tmp_path / "view.bin")
    assert (tmp_path / "view.bin").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"\(1000000, 1000000\) out of fewer numbers"):
        embedding.read(tmp_path / "view.bin")
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(65 * 1024**2)
    with pytest.raises(UserError, match=r"has 0\.1 GB, concepts are far smaller"):
        embedding.read(tmp_path / "large.bin")


def test_training_a_row_of_its_own_equals_training_the_embedding_matrix(stack) -> None:
    """What diffusers' example does (a new row of the matrix, the others restored) gives the same row."""
    import copy

    from hiperlab import draws
    from hiperlab.loss.diffusion import denoising_loss
    from hiperlab.model.conditioning import Conditioning
    from tests.composed import batch

    method = build("ti", stack, CATS)
    text, tokenizer = copy.deepcopy(stack.text), copy.deepcopy(stack.tokenizer)
    tokenizer.add_tokens(CATS[0].placeholder)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = text.get_input_embeddings().weight.requires_grad_()
    weight.data[-1] = stack.word_embedding(CATS[0].word)
    others = weight.data[:-1].clone()
    theirs = method._optimizer([weight])
    for step in range(3):
        item = batch(CATS, [2 * step, 2 * step + 1])
        z0 = method.clean_latents(item)
        noise = draws.normal(0, "noise", item.sample, z0.shape[1:])
        t = draws.integers(0, "timestep", item.sample, 1000)
        ids = tokenizer(item.prompts, padding="max_length", return_tensors="pt").input_ids
        states = Conditioning(text(ids).last_hidden_state[None])
        denoising_loss(stack.predict(stack.add_noise(z0, noise, t), t, states), noise).mean().backward()
        theirs.step()
        theirs.zero_grad()
        weight.data[:-1] = others
    train(method, 3)
    torch.testing.assert_close(method.artifact(0)["vectors"][0], weight.detach()[-1], atol=1e-5, rtol=0)
