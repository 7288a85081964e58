"""IP-Adapter: the second softmax by hand, scales, order of layers, joined calls, what is refused, artifacts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hiperlab.base import artifact
from hiperlab.base.method import Step
from hiperlab.errors import UserError
from hiperlab.formats import ip_adapter as formats
from hiperlab.layer.image_prompt import LinearPrompt, Resampler
from hiperlab.method.ip_adapter import IPAdapter
from hiperlab.model.attention import CrossAttention
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.decoupled_attention import DecoupledAttention, projected
from hiperlab.model.shared_calls import Call, together
from hiperlab.model.tiny import tiny
from hiperlab.model.vision_loader import tiny_tower
from tests.composed import SUBJECTS, build, config

CAT = SUBJECTS[0]
TEXT, ZERO = "a photo of a <my-cat>", torch.zeros(1, dtype=torch.long)


def state(stack, features: int = 16, tokens: int = 4) -> dict[str, torch.Tensor]:
    """A base adapter's tensors, as the published `.safetensors` names them."""
    made = formats.random_adapter(3, stack.unet, stack.cross_attention, features, stack.width)
    numbers = list(stack.unet.attn_processors)
    found = {
        f"image_proj.{name}": value for name, value in LinearPrompt(features, stack.width, tokens).state_dict().items()
    }
    for layer, (key, value) in zip(stack.cross_attention, made.weights, strict=True):
        place = numbers.index(f"{layer}.processor")
        found |= {f"ip_adapter.{place}.to_k_ip.weight": key, f"ip_adapter.{place}.to_v_ip.weight": value}
    return found


def saved(path, tensors) -> str:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return str(path)


@pytest.fixture
def encoder(tmp_path) -> str:
    tower = tiny_tower(1, projection=True)
    tower.network.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def further(rows: int, stack, scale: float, seed: int = 0, tokens: int = 4) -> DecoupledAttention:
    generator = torch.Generator().manual_seed(seed)
    made = formats.random_adapter(0, stack.unet, stack.cross_attention, 16, stack.width)
    states = torch.randn(rows, tokens, stack.width, generator=generator)
    return projected(states, made.weights, torch.full((rows,), scale))


@torch.no_grad()
def test_second_softmax_by_hand(stack) -> None:
    """One layer, every head by itself: two softmaxes, one query, the output layer after their sum."""
    name = stack.cross_attention[3]
    layer = stack.unet.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    text, pixels = torch.randn(2, 5, stack.width, generator=generator), torch.randn(2, 9, 32, generator=generator)
    tokens = torch.randn(2, 3, stack.width, generator=generator)
    key, value = (torch.randn(len(layer.to_k.weight), stack.width, generator=generator) for _ in range(2))
    beside = projected(tokens, [(key, value)] * 16, torch.tensor([0.5, 2.0]))
    ours = CrossAttention(name, 3)(layer, pixels, Conditioning(text[None], decoupled=beside))
    heads, query = layer.heads, layer.to_q(pixels)
    for row, scale in enumerate((0.5, 2.0)):
        parts = []
        for q, *others in zip(
            query[row].chunk(heads, -1),
            *(each.chunk(heads, -1) for each in (layer.to_k(text[row]), layer.to_v(text[row]))),
            *(each.chunk(heads, -1) for each in (tokens[row] @ key.T, tokens[row] @ value.T)),
            strict=True,
        ):
            looks = [(q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for k, v in (others[:2], others[2:])]
            parts.append(looks[0] + scale * looks[1])
        torch.testing.assert_close(ours[row], layer.to_out[0](torch.cat(parts, -1)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scale_is_linear_in_a_layer_and_0_is_the_text_alone(stack) -> None:
    name = stack.cross_attention[0]
    layer, text = stack.unet.get_submodule(name), torch.ones(1, 5, stack.width)
    pixels = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))

    def out(scale: float) -> torch.Tensor:
        beside = further(1, stack, scale)
        return CrossAttention(name, 0)(layer, pixels, Conditioning(text[None], decoupled=beside))

    bare = CrossAttention(name, 0)(layer, pixels, text)
    assert torch.equal(out(0.0), bare)
    torch.testing.assert_close(out(2.0) - bare, 2 * (out(1.0) - bare), atol=1e-5, rtol=0)
    assert float((out(1.0) - bare).abs().max()) > 1e-2


@torch.no_grad()
def test_two_equal_pictures_are_one(stack) -> None:
    """A softmax over doubled tokens."""
    one = further(1, stack, 1.0)
    twice = DecoupledAttention(
        *(tuple(torch.cat([each, each], 1) for each in states) for states in (one.keys, one.values)), one.scale
    )
    latents, t = torch.ones(1, *stack.latent_shape), ZERO + 500
    states = stack.encode_text(["a cat"])[None]
    found = [stack.predict(latents, t, Conditioning(states, decoupled=each)) for each in (one, twice)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_and_joins(stack) -> None:
    """Rows keep their own tokens; a part without any stays the text alone, whatever stands beside it."""
    latents = torch.randn(3, *stack.latent_shape, generator=torch.Generator().manual_seed(0))
    states, t = stack.encode_text(["a cat", "a dog", "a toy"])[None], ZERO.expand(3) + 300
    beside = Conditioning(states[:, :2], decoupled=further(2, stack, 1.0))
    joined = concatenate([beside, Conditioning(states[:, 2:])])
    found = stack.predict(latents, t, joined)
    torch.testing.assert_close(found[:2], stack.predict(latents[:2], t[:2], beside), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found[2:], stack.predict(latents[2:], t[2:], Conditioning(states[:, 2:])), atol=1e-5, rtol=0
    )
    swapped = stack.predict(latents[:2].flip(0), t[:2], beside.rows([1, 0]))
    torch.testing.assert_close(swapped.flip(0), found[:2], atol=1e-5, rtol=0)


@torch.no_grad()
def test_calls_with_as_many_tokens_are_shared(stack, monkeypatch) -> None:
    counts = []
    ask = stack.predict
    monkeypatch.setattr(stack, "predict", lambda z, t, states: counts.append(len(z)) or ask(z, t, states))
    states, latents = stack.encode_text(["a cat"])[None], torch.ones(1, *stack.latent_shape)

    def work(beside: DecoupledAttention | None):
        return (yield Call(latents, ZERO + 300, Conditioning(states, decoupled=beside)))

    kinds = [further(1, stack, 1.0, 1), further(1, stack, 0.5, 2), further(1, stack, 1.0, 3, tokens=16), None, None]
    found = together(stack, [work(each) for each in kinds])
    assert sorted(counts) == [1, 2, 2]
    for beside, ours in zip(kinds, found, strict=True):
        torch.testing.assert_close(
            ours, ask(latents, ZERO + 300, Conditioning(states, decoupled=beside)), atol=1e-5, rtol=0
        )


def test_gradient_checkpointing_replays_the_tokens() -> None:
    found = []
    for switch in (False, True):
        stack = tiny(seed=0, size=128).optimise(channels_last=False, compile=False, gradient_checkpointing=switch)
        latents = torch.ones(1, *stack.latent_shape, requires_grad=True)
        states = Conditioning(stack.encode_text(["a cat"])[None], decoupled=further(1, stack, 1.0))
        stack.predict(latents, ZERO + 300, states).square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)


def test_resampler_written_naively() -> None:
    """Four looks of every query at picture and queries, head by head."""
    torch.manual_seed(0)
    made = Resampler(features=6, inner=8, width=5, tokens=3, heads=2, depth=2).double()
    picture = torch.randn(1, 4, 6, dtype=torch.float64)
    queries, x = made.latents[0], F.linear(picture[0], made.proj_in.weight, made.proj_in.bias)
    for look, forward in made.layers:
        seen = torch.cat([look.norm1(x), look.norm2(queries)])
        q, (k, v) = look.norm2(queries) @ look.to_q.weight.T, (seen @ look.to_kv.weight.T).chunk(2, -1)
        heads = [
            (a @ b.T / 8.0).softmax(-1) @ c for a, b, c in zip(*(each.chunk(2, -1) for each in (q, k, v)), strict=True)
        ]
        queries = queries + torch.cat(heads, -1) @ look.to_out.weight.T
        queries = queries + F.gelu(forward[0](queries) @ forward[1].weight.T) @ forward[3].weight.T
    naive = made.norm_out(F.linear(queries, made.proj_out.weight, made.proj_out.bias))
    torch.testing.assert_close(made(picture)[0], naive, atol=1e-6, rtol=0)


@torch.no_grad()
def test_layers_are_numbered_as_diffusers_lists_them(stack, tmp_path, encoder) -> None:
    """Down, up, the middle last; exchanging two layers of one width loads and changes the picture."""
    names = list(stack.unet.attn_processors)
    assert [number for number, name in enumerate(names) if ".attn2." in name] == list(range(1, 32, 2))
    assert names[31].startswith("mid_block") and stack.cross_attention[6].startswith("mid_block")
    tensors = state(stack)
    exchanged = dict(tensors)
    for end in ("to_k_ip.weight", "to_v_ip.weight"):
        exchanged[f"ip_adapter.9.{end}"], exchanged[f"ip_adapter.31.{end}"] = (
            tensors[f"ip_adapter.31.{end}"], tensors[f"ip_adapter.9.{end}"],
        )  # fmt: skip
    found = []
    for number, each in enumerate((tensors, exchanged)):
        method = build(
            "ip_adapter", stack, [CAT], weights=saved(tmp_path / f"{number}.safetensors", each), image_encoder=encoder
        )
        step = Step([TEXT], ZERO, ZERO + 500)
        found.append(stack.predict(torch.ones(1, *stack.latent_shape), ZERO + 500, method.condition(step)))
    assert float((found[0] - found[1]).abs().max()) > 1e-4


def test_scales_are_variants_and_no_picture_is_not_zeros(stack) -> None:
    method = build("ip_adapter", stack, [CAT], scale=[0.5, 0.0, 1.0]).eval()
    assert method.variants == ("scale=0.5", "scale=0.0", "scale=1.0")
    how = {"steps": 2, "guidance": 7.5, "negative": "blurry"}
    drawn = {variant: method.sample([TEXT], [1], variant=variant, **how) for variant in method.variants}
    bare = build("ti", stack, [CAT]).eval().sample(["a photo of a cat"], [1], **how)
    torch.testing.assert_close(drawn["scale=0.0"], bare, atol=1e-6, rtol=0)
    assert float((drawn["scale=1.0"] - bare).abs().max()) > 1e-3
    torch.testing.assert_close(method.sample([TEXT], [1], **how), drawn["scale=0.5"])
    assert float(method.tokens()[1].abs().max()) > 0.1
    negative = method.negative_condition("blurry", "scale=1.0", [0])
    assert negative.decoupled is not None and torch.equal(negative.decoupled.scale, torch.ones(1))


def test_another_picture_is_another_prompt(stack) -> None:
    method = build("ip_adapter", stack, [CAT])
    before = method.tokens()
    method.set_reference(0, torch.linspace(-1, 1, 128).expand(3, 128, 128))
    assert not torch.allclose(method.tokens()[0], before[0]) and torch.equal(method.tokens()[1], before[1])


def test_artifacts_need_no_encoder(stack, tmp_path, encoder) -> None:
    weights = saved(tmp_path / "base.safetensors", state(stack))
    method = build("ip_adapter", stack, [CAT], weights=weights, image_encoder=encoder)
    path = tmp_path / "cat.safetensors"
    artifact.write(path, method, 0, {"_target_": config("ip_adapter").method._target_}, steps=0)
    other = build("ip_adapter", stack, [CAT], weights=weights, image_encoder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"method\.image_encoder=.*does not exist"):
        other.tokens()
    artifact.load_into(other, 0, path)
    assert torch.equal(other.tokens(), method.tokens())
    wide = build(
        "ip_adapter",
        stack,
        [CAT],
        weights=saved(tmp_path / "wide.safetensors", state(stack, 24)),
        image_encoder=encoder,
    )
    with pytest.raises(UserError, match="16 features, the adapter reads 24"):
        artifact.load_into(wide, 0, path)
    with pytest.raises(UserError, match="name the encoder it was trained with"):
        wide.tokens()


def test_a_trained_model_needs_weights(monkeypatch) -> None:
    stack = tiny(seed=0, size=64)
    stack.trained = True
    with pytest.raises(UserError, match=r"method\.weights is null") as refused:
        build("ip_adapter", stack, [CAT])
    assert "\n" not in str(refused.value)


def test_a_random_model_says_that_its_adapter_is_random(stack, caplog) -> None:
    build("ip_adapter", stack, [CAT])
    assert "the adapter is random" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("ip_adapter.31.to_k_ip.weight"), "another base model: .*31.to_k_ip.weight is missing"),
        (lambda own: own.update({"ip_adapter.1.to_v_ip.weight": torch.zeros(7, 32)}), r"is \[7, 32\], the layer's"),
        (lambda own: own.update({"ip_adapter.33.to_k_ip.weight": torch.zeros(1)}), "33.to_k_ip.weight besides"),
        (lambda own: own.pop("image_proj.proj.bias"), "is no base IP-Adapter"),
        (lambda own: own.pop("image_proj.proj.weight"), "of a kind that is not read here"),
        (lambda own: own.update({"more": torch.zeros(1)}), "it holds more"),
        (lambda own: [own.pop(name) for name in list(own) if name.startswith("image_proj")], "image_proj is missing"),
    ],
)
def test_files_are_refused(change, message, stack, tmp_path, encoder) -> None:
    tensors = state(stack)
    change(tensors)
    with pytest.raises(UserError, match=message):
        build("ip_adapter", stack, [CAT], weights=saved(tmp_path / "x.safetensors", tensors), image_encoder=encoder)


def test_pickles_are_data_or_refused(stack, tmp_path, encoder) -> None:
    class Code:
        def __reduce__(self):
            return print, ("run",)

    for content, message in (({"image_proj": {}}, "it should hold"), ({"image_proj": Code()}, "more than tensors")):
        torch.save(content, tmp_path / "x.bin")
        with pytest.raises(UserError, match=message):
            build("ip_adapter", stack, [CAT], weights=str(tmp_path / "x.bin"), image_encoder=encoder)


@pytest.mark.parametrize(("changes", "message"), [({"scale": []}, "give one number"), ({"scale": [-1.0]}, "0 or more")])
def test_settings_are_refused(changes, message, stack) -> None:
    with pytest.raises(UserError, match=message):
        build("ip_adapter", stack, [CAT], **changes)


def test_an_encoder_is_named(stack, tmp_path) -> None:
    with pytest.raises(UserError, match=r"method\.image_encoder is null"):
        build("ip_adapter", stack, [CAT], weights=saved(tmp_path / "x.safetensors", state(stack)))


def test_without_a_picture_it_says_so(stack) -> None:
    method = build("ip_adapter", stack, [CAT])
    bare = IPAdapter(stack, [CAT], torch.optim.Adam, 0, None, None, [1.0])
    assert method.tokens().shape == (2, 4, stack.width)
    with pytest.raises(UserError, match="has no picture"):
        bare.tokens()
