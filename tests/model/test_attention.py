"""Cross-attention that reads a `Conditioning`: order, equality with the plain U-Net, speed switches."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from hiperlab.model.attention import cross_attention_order, install_attention
from hiperlab.model.conditioning import Conditioning, concatenate
from hiperlab.model.tiny import tiny


@pytest.fixture(scope="module")
def inputs(stack):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10, 700])


def random_states(layers: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(layers, 2, 77, 32, generator=torch.Generator().manual_seed(seed))


def test_order_is_the_order_of_execution(stack, inputs) -> None:
    visited: list[str] = []
    modules = dict(stack.unet.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda *_, name=name: visited.append(name))
        for name in cross_attention_order(stack.unet)
    ]
    stack.predict(*inputs, Conditioning(random_states(1)))
    for handle in handles:
        handle.remove()
    assert visited == stack.cross_attention
    assert visited[6].startswith("mid_block") and len(visited) == 16


def test_shared_text_equals_the_plain_unet(inputs) -> None:
    states = random_states(1)
    ours = tiny(seed=0, size=128)
    plain = tiny(seed=0, size=128).unet
    plain.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad():
        expected = plain(*inputs, encoder_hidden_states=states[0]).sample
        torch.testing.assert_close(ours.predict(*inputs, Conditioning(states)), expected, atol=1e-5, rtol=0)
        spread = Conditioning(states.expand(16, -1, -1, -1), states.expand(16, -1, -1, -1))
        torch.testing.assert_close(ours.predict(*inputs, spread), expected, atol=1e-5, rtol=0)
        bare = ours.unet(*inputs, encoder_hidden_states=states[0]).sample  # a plain tensor goes straight through
        torch.testing.assert_close(bare, expected, atol=1e-5, rtol=0)


def test_each_layer_reads_its_own_keys_and_values(stack, inputs) -> None:
    """Changing layer l's states changes the output, whichever l, and for keys and values apart."""
    keys, values = random_states(16), random_states(16, seed=2)
    with torch.no_grad():
        base = stack.predict(*inputs, Conditioning(keys, values))
        for layer in (0, 6, 15):
            for which in ("keys", "values"):
                parts = {"keys": keys.clone(), "values": values.clone()}
                parts[which][layer] *= 4  # not an added constant: softmax would not see it in the keys
                assert (stack.predict(*inputs, Conditioning(**parts)) - base).abs().max() > 1e-5, (layer, which)


def test_gradients_survive_gradient_checkpointing(inputs) -> None:
    gradients = []
    for switch in (False, True):
        stack = tiny(seed=0, size=128).optimise(channels_last=False, compile=False, gradient_checkpointing=switch)
        keys, values = random_states(16).requires_grad_(), random_states(16, seed=2).requires_grad_()
        stack.predict(*inputs, Conditioning(keys, values)).square().mean().backward()
        gradients.append((keys.grad, values.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])
    assert all(gradients[0][0][layer].abs().max() > 0 for layer in range(16))


def test_channels_last_and_bfloat16(inputs) -> None:
    plain = tiny(seed=0, size=128)
    states = Conditioning(random_states(16), random_states(16, seed=2))
    with torch.no_grad():
        expected = plain.predict(*inputs, states)
        fast = tiny(seed=0, size=128).optimise(channels_last=True, compile=False, gradient_checkpointing=False)
        torch.testing.assert_close(fast.predict(*inputs, states), expected, atol=1e-5, rtol=0)
        fast.unet.to(torch.bfloat16)
        half = fast.predict(*inputs, states)
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiles_as_one_graph_per_shape(inputs) -> None:
    """With the eager backend: what torch.compile must trace, not what it makes of it."""
    torch._dynamo.reset()
    stack = tiny(seed=0, size=128)
    states = Conditioning(random_states(16), random_states(16, seed=2))
    expected = stack.predict(*inputs, states)
    torch._dynamo.config.recompile_limit = 64
    stack._set_predictor(torch.compile(stack.unet, backend="eager", fullgraph=True))
    assert not any("predictor" in name for name in stack.state_dict())
    torch.testing.assert_close(stack.predict(*inputs, states), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_concatenate_spreads_shared_layers() -> None:
    shared, own = Conditioning(random_states(1)), Conditioning(random_states(16), random_states(16, seed=2))
    both = concatenate([shared, own])
    assert both.keys.shape == (16, 4, 77, 32) and both.values is not None
    assert torch.equal(both.values[5, :2], shared.keys[0]) and torch.equal(both.keys[5, 2:], own.keys[5])
    assert torch.equal(both.rows([3]).keys, own.rows([1]).keys)


def test_installing_twice_is_harmless(stack) -> None:
    assert install_attention(stack.unet) == stack.cross_attention
