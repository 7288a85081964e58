"""Custom Diffusion's own promises; its numbers are in tests/parity/test_lora.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hiperlab.base.method import Step, Subject
from hiperlab.data.crop_augmentation import FAR, NEAR, Placement, drawn, latent_mask, placed, still
from hiperlab.errors import UserError
from hiperlab.formats.custom_diffusion import compressed
from hiperlab.method.custom_diffusion import CustomDiffusion, masked_loss
from hiperlab.model.conditioning import Conditioning, concatenate
from tests.composed import SUBJECTS, batch, build, train
from tests.pipeline import pipeline

CAT = SUBJECTS[0]
ZERO = torch.zeros(1, dtype=torch.long)


def fitted(stack, subject=CAT, **changes) -> CustomDiffusion:
    method = build("custom_diffusion", stack, [subject], **changes)
    assert isinstance(method, CustomDiffusion)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in [*method.kv.values(), method.word]:
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return method.eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([400])


@torch.no_grad()
def ours(method, inputs):
    return method.model.predict(*inputs, method.condition(Step(["a photo of a <my-cat>"], ZERO, ZERO)))


# ---- augmentation ----------------------------------------------------------------------------------------------------


def test_placements_are_the_published_ones() -> None:
    size, many = 512, [drawn(0, k, 512) for k in range(3000)]
    small = [at for at in many if at.scale <= size]
    assert abs(len(small) / len(many) - 0.66) < 0.03
    assert min(at.scale for at in small) in range(170, 180) and max(at.scale for at in small) in range(505, 513)
    large = [at.scale for at in many if at.scale > size]
    assert min(large) in range(614, 618) and max(large) in range(710, 716)
    for at in many:
        room = abs(size - at.scale)
        assert 0 <= at.top <= room and 0 <= at.left <= room
        expected = FAR if at.scale < 0.6 * size else NEAR if at.scale > size else ("",)
        assert at.words in expected
    words = Counter(at.words for at in many)
    assert len(words) == 5 and all(count > 100 for count in words.values())
    assert drawn(0, 5, size) == many[5] != drawn(1, 5, size)


def test_pictures_are_put_there() -> None:
    picture = torch.full((3, 32, 32), 0.5)
    small = placed(picture, Placement(16, 4, 8, ""))
    assert float(small.sum()) == 0.5 * 3 * 16 * 16 and float(small[:, 4:20, 8:24].min()) == 0.5
    assert torch.equal(placed(picture, still(32)), picture)
    ramp = torch.linspace(-1, 1, 32).expand(3, 32, 32)
    crop = placed(ramp, Placement(40, 0, 8, ""))
    assert crop.shape == ramp.shape and float(crop[..., -1].mean()) > 0.99 and float(crop[..., 0].mean()) > -0.7


def test_mask_by_hand() -> None:
    """Top // f + 1 : (top + scale) // f - 1 with f = 8: 20 // 8 + 1 = 3 to 84 // 8 - 1 = 9; 1 to 7 across."""
    mask = latent_mask(Placement(64, 20, 0, ""), 128, 16)
    wanted = torch.zeros(1, 16, 16)
    wanted[:, 3:9, 1:7] = 1
    assert torch.equal(mask, wanted)
    assert latent_mask(Placement(160, 3, 3, ""), 128, 16).all()
    assert float(latent_mask(still(128), 128, 16).sum()) == 14 * 14
    assert float(latent_mask(Placement(21, 3, 3, ""), 64, 8).sum()) == 1, "a loss over no cell would be NaN"


def test_masked_loss_is_four_times_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 4, 6, 6, generator=generator)
    losses = masked_loss(a, b, torch.ones(2, 1, 6, 6))
    torch.testing.assert_close(losses, 4 * (a - b).square().mean((1, 2, 3)))
    half = torch.ones(2, 1, 6, 6)
    half[..., 3:] = 0
    torch.testing.assert_close(masked_loss(a, b, half), 4 * (a - b)[..., :3].square().mean((1, 2, 3)))


@pytest.mark.parametrize("weights", ["kv", "cross"])
def test_concepts_drawn_side_by_side_are_what_each_is_alone(stack, weights, tmp_path) -> None:
    """Each with its own word and its own weights, biases too (`cross`); and its files."""
    together = build("custom_diffusion", stack, SUBJECTS[:3], weights=weights).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*together.kv.values(), together.word]:
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    order = [1, 2, 0, 1]
    texts = [f"a <{SUBJECTS[number].name}> on a sofa" for number in order]
    pictures = together.sample(texts, [0, 1, 2, 3], concepts=order, steps=2, guidance=6.0)
    for row, number in enumerate(order):
        alone = build("custom_diffusion", stack, [SUBJECTS[number]], weights=weights).eval()
        alone.load_artifact(0, together.artifact(number))
        torch.testing.assert_close(
            alone.sample([texts[row]], [row], steps=2, guidance=6.0)[0], pictures[row], atol=2e-4, rtol=0
        )
        kept = [tmp_path / f"{row}-{kind}" for kind in ("alone", "together")]
        for method, index, folder in ((alone, 0, kept[0]), (together, number, kept[1])):
            folder.mkdir()
            method.export(index, folder, steps=1)
        one, other = (torch.load(folder / "delta.bin", weights_only=True)["unet"] for folder in kept)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert float((pictures[0] - pictures[3]).abs().max()) > 1e-2


def test_batch_is_composed(stack) -> None:
    """Pictures and words placed, class rows untouched; the mask leaves gradients out where the canvas is empty."""
    method = build("custom_diffusion", stack, [CAT])
    item = batch([CAT], list(range(8)))
    rows = method.prepare_batch(item)
    places = [drawn(0, k, 128) for k in range(8)]
    assert rows.prompts == [f"{at.words}photo of a <my-cat>" for at in places] + ["photo of a cat"] * 8
    assert len({at.words for at in places}) > 2
    assert torch.equal(rows.pixels[:8], torch.stack([placed(p, at) for p, at in zip(item.pixels, places, strict=True)]))
    step = Step(rows.prompts, rows.concept, rows.sample, samples=rows.sample)
    prediction = torch.randn(16, 4, 16, 16, requires_grad=True)
    losses = method.losses(step, prediction, torch.zeros(16, 4, 16, 16))
    assert losses[""].shape == losses["prior"].shape == (8,)
    losses[""].sum().backward()
    assert prediction.grad is not None
    masks = torch.stack([latent_mask(at, 128, 16) for at in places])
    assert torch.equal(prediction.grad[:8] != 0, masks.expand(-1, 4, -1, -1) > 0) and not prediction.grad[8:].any()
    plain = build("custom_diffusion", stack, [CAT], augment=False, prior={"weight": 0.0}, template=None)
    assert plain.prepare_batch(item) is item


def test_moments_of_placed_pictures(stack) -> None:
    """Each its own, while class pictures go through the VAE once."""
    method = build("custom_diffusion", stack, [CAT])
    rows = method.prepare_batch(batch([CAT], [0, 3]))  # the same view, placed differently
    moments = method.moments(rows)
    for row in range(len(moments)):
        assert torch.equal(moments[row], stack.encode_moments(rows.pixels[row : row + 1])[0])
    assert all(view < 0 for _, view, *_ in method._moments)


# ---- the word and the weights ----------------------------------------------------------------------------------------


def test_word_starts_as_the_released_code_does(stack) -> None:
    table = stack.text.get_input_embeddings().weight
    assert torch.equal(build("custom_diffusion", stack, [CAT]).word[0].detach(), table[42170])
    assert torch.equal(build("custom_diffusion", stack, [CAT], init_word="sks").word[0].detach(), table[48136])
    last = stack.tokenizer("unpronounceable", add_special_tokens=False)["input_ids"][-1]
    split = build("custom_diffusion", stack, [CAT], init_word="unpronounceable")
    assert torch.equal(split.word[0].detach(), table[last])


def test_word_stands_before_the_noun(stack) -> None:
    """At the start: the states of a prompt in which the rare word itself stands there."""
    method = build("custom_diffusion", stack, [CAT], init_word="sks")
    with torch.no_grad():
        for prompt in ("a <my-cat> on a sofa", "a <my-cat> cat on a sofa"):
            states = method.condition(Step([prompt], ZERO, ZERO)).keys[0]
            torch.testing.assert_close(states, stack.encode_text(["a sks cat on a sofa"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("weights", "count"), [("kv", 32), ("cross", 80)])
def test_choices_of_weights(stack, weights, count) -> None:
    method = build("custom_diffusion", stack, [CAT], weights=weights, prior={"weight": 0.0})
    assert len(method.kv) == count
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    start = method.word.detach().clone()
    train(method, 1)
    assert all(bool(value.any()) for value in method.kv.values()) and not torch.equal(method.word, start)
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


def test_detaching_changes_gradients_only(stack, inputs) -> None:
    found = []
    for detach in (False, True):
        keys = stack.encode_text(["a cat"]).detach().requires_grad_()
        conditioning = Conditioning(keys[None], detach_first=detach)
        assert conditioning.rows([0, 0]).detach_first is conditioning.to(torch.float64).detach_first is detach
        assert concatenate([Conditioning(keys[None]), conditioning]).detach_first is detach
        out = stack.predict(*inputs, conditioning)
        out.square().sum().backward()
        found.append((out.detach(), keys.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1][:, 0].any() and not found[1][1][:, 0].any() and found[1][1][:, 1].any()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["kv", "cross"])
def test_diffusers_reads_it_back(stack, inputs, tmp_path, weights) -> None:
    """Their weights through `load_attn_procs` (which needs the private `_pipeline`), their word by its file."""
    method = fitted(stack, weights=weights)
    written = method.export(0, tmp_path, steps=1)
    pipe = pipeline(stack)
    pipe.unet.load_attn_procs(tmp_path, weight_name=written[1].name, _pipeline=pipe)
    pipe.load_textual_inversion(str(written[2]))
    ids = pipe.tokenizer(["a photo of a <my-cat> cat"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        states = pipe.text_encoder(ids.input_ids)[0]
        theirs = pipe.unet(*inputs, encoder_hidden_states=states, return_dict=False)[0]
        bare = stack.predict(*inputs, Conditioning(states[None]))
    torch.testing.assert_close(ours(method, inputs), theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(theirs, bare, atol=1e-2)


def test_compressed_by_hand() -> None:
    delta = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    for share, rank in ((0.6, 1), (0.61, 2), (0.9, 2), (1.0, 3)):
        u, v = compressed(delta, share)
        assert u.shape == (3, rank) and v.shape == (rank, 3)
        kept = torch.diag(torch.tensor([6.0, 3.0, 1.0][:rank] + [0.0] * (3 - rank)))
        torch.testing.assert_close(u @ v, kept, atol=1e-5, rtol=0)


def test_compressed_file(stack, inputs, tmp_path) -> None:
    """Low-rank differences lose nothing and are smaller; half of the singular values of others lose something."""
    method = fitted(stack, compress=0.999999)
    with torch.no_grad():
        for value in method.kv.values():
            value.copy_(value[..., :2] @ value[:, :2, :])
    small, whole, _ = method.export(0, tmp_path, steps=1)
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    fresh = build("custom_diffusion", stack, [CAT])
    fresh.load_foreign(0, small)
    torch.testing.assert_close(ours(fresh.eval(), inputs), ours(method, inputs), atol=1e-4, rtol=1e-4)


def test_words_of_a_joint_file(stack, tmp_path) -> None:
    """The placeholder's own word of several; one of another name is taken as it is."""
    delta = fitted(stack).export(0, tmp_path, steps=1)[0]
    content = torch.load(delta, weights_only=True)
    vector = content["modifier_token"]["<my-cat>"]
    content["modifier_token"] = {"<new1>": vector + 1, "<my-cat>": vector}
    torch.save(content, delta)
    fresh = build("custom_diffusion", stack, [CAT])
    fresh.load_foreign(0, delta)
    assert torch.equal(fresh.word[0].detach(), vector)
    other = build("custom_diffusion", stack, [Subject("x", "<x>", "cat")])
    with pytest.raises(UserError, match=r"<new1>, <my-cat>: set data\.placeholder"):
        other.load_foreign(0, delta)
    content["modifier_token"] = {"<new1>": vector + 1}
    torch.save(content, delta)
    other.load_foreign(0, delta)
    assert torch.equal(other.word[0].detach(), vector + 1)


def test_a_word_without_brackets_is_found_among_other_files(stack, tmp_path) -> None:
    """Diffusers names the file by the token, whatever it looks like."""
    delta, weights, word = fitted(stack).export(0, tmp_path, steps=1)
    delta.unlink()
    (vector,) = torch.load(word, weights_only=True).values()
    word.unlink()
    torch.save({"newcat": vector}, tmp_path / "newcat.bin")
    torch.save({"exp_avg": torch.zeros(3)}, tmp_path / "optimizer.bin")
    (tmp_path / "torn.bin").write_bytes(b"PK torn")
    method = build("custom_diffusion", stack, [CAT])
    method.load_foreign(0, weights)
    assert torch.equal(method.word[0].detach(), vector)


def test_other_files_are_named(stack, tmp_path) -> None:
    method = build("custom_diffusion", stack, [CAT])
    delta, weights, word = fitted(stack, weights="cross").export(0, tmp_path, steps=1)
    with pytest.raises(UserError, match=r"set method\.weights=cross"):
        method.load_foreign(0, delta)
    word.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="needs the word"):
        method.load_foreign(0, weights)
    (tmp_path / "elsewhere").rename(word)
    weights.unlink()
    with pytest.raises(UserError, match="holds a word only"):
        method.load_foreign(0, word)
    good = torch.load(fitted(stack).export(0, tmp_path, steps=1)[0], weights_only=True)
    for change, message in (
        ({"text_encoder": {}}, "changes the text encoder"),
        ({"unet": None, "state_dict": {}}, "CompVis"),
        ({"modifier_token": {}}, "a word's embedding"),
        ({"modifier_token": {"<x>": torch.zeros(7)}}, "its word has width 7"),
        ({"modifier_token": {"<x>": torch.full((32,), float("inf"))}}, "NaN or infinite"),
        ({"unet": {**good["unet"], "mid.attn2.to_k.weight": torch.zeros(2, 2)}}, r"mid\.attn2\.to_k"),
    ):
        torch.save({**good, **change}, delta)
        with pytest.raises(UserError, match=message):
            method.load_foreign(0, delta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "all"}, "Choose kv, cross"),
        ({"compress": 0.0}, "is no share"),
        ({"init_word": " "}, "is no word"),
    ],
)
def test_mistakes_are_named(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build("custom_diffusion", stack, [CAT], **changes)
