"""What every method promises, asked of every conf/method/*.yaml without being told of it."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from hydra.utils import get_class

from hiperlab.base import artifact
from hiperlab.base.capability import Composable, EditsPicture, Exportable
from hiperlab.base.composition import Composition
from hiperlab.base.early_stop import EarlyStop, fixed_inputs
from hiperlab.base.editing_method import EditingMethod
from hiperlab.base.method import Method, Step
from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.shared_calls import alone, together
from hiperlab.model.stack import Base
from hiperlab.model.tiny import tiny
from tests.composed import (
    METHODS,
    ROOT,
    SUBJECTS,
    UNetCalls,
    batch,
    build,
    config,
    kept,
    quick,
    train,
    train_together,
    trains,
)

CATS = SUBJECTS[:1]


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=[name for name in METHODS if trains(name)])
def trainee(request) -> str:
    """A method that has something to train."""
    return request.param


def method_class(name: str) -> type[Method]:
    return get_class(config(name).method._target_)  # type: ignore[return-value]


def gradients(method: Method) -> dict[str, torch.Tensor]:
    """By name; a method of several phases has some of them at a time."""
    found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad and p.grad is not None}
    assert found
    return found


def fingerprint(stack) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in stack.state_dict().items()}


def test_yaml_describes_targets_and_schedules(name) -> None:
    cfg = config(name)
    assert cfg.method._target_.startswith("hiperlab.method."), "only yaml names a method"
    for key in ("steps", "batch_size", "checkpoint_every", "sample_every"):
        assert cfg.fit[key] is not None
    cls = get_class(cfg.method._target_)
    assert issubclass(cls, Method) and not inspect.isabstract(cls)


def test_numbers_live_in_yaml_only(name) -> None:
    """A forgotten number fails instead of silently taking another value, and every number can be swept."""
    cls = get_class(config(name).method._target_)
    defaults = [p.name for p in inspect.signature(cls).parameters.values() if p.default is not p.empty]
    assert defaults == []


def test_settings_that_it_names_exist(name) -> None:
    cls, settings = method_class(name), config(name).method
    assert {*cls.sampling_settings, *cls.fixed_settings} <= set(settings)
    assert not set(cls.sampling_settings) & set(cls.fixed_settings)


def test_only_own_parameters_train_and_the_stack_stays(trainee, stack) -> None:
    before = fingerprint(stack)
    method = build(trainee, stack, CATS)
    trained = {key for key, p in method.named_parameters() if p.requires_grad}
    assert trained and not any(key.startswith("model.") for key in trained)
    start = {key: value.clone() for key, value in method.trainable_state().items()}
    train(method, 2)
    now = method.trainable_state()
    changed = [key for key in trained if not torch.equal(now[key], start[key])]
    assert sorted(changed) == sorted(trained), "every trained tensor moves"
    after = fingerprint(stack)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in stack.parameters())


def test_losses_fall_on_one_picture(trainee, stack) -> None:
    """Repeating one draw, the optimiser must find its way down: the gradient points where it should."""
    method = build(trainee, stack, CATS)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    same = batch(CATS, [6, 7])
    losses = []
    for _ in range(3):
        loss = method.training_step(same, 0)
        losses.append(float(loss.detach()))
        loss.backward()
        norm = torch.cat([grad.flatten() for grad in gradients(method).values()]).norm()
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 / float(norm)  # a step of fixed length along the gradient
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_artifact_round_trip(name, stack, tmp_path) -> None:
    subjects = SUBJECTS[:2] if method_class(name).stacks_concepts else SUBJECTS[1:2]
    place = len(subjects) - 1
    method = build(name, stack, subjects)
    if trains(name):
        train(method, 2)
    path = tmp_path / "concept.safetensors"
    artifact.write(path, method, place, {"_target_": config(name).method._target_}, steps=2)
    alone = build(name, stack, SUBJECTS[1:2])
    artifact.load_into(alone, 0, path)
    loaded, kept = alone.artifact(0), method.artifact(place)
    assert loaded.keys() == kept.keys()
    for key, value in kept.items():
        assert torch.equal(loaded[key], value), key
    assert artifact.read(path).subject == SUBJECTS[1]
    with torch.no_grad():
        latents = torch.ones(1, *stack.latent_shape)
        step = Step([f"a {SUBJECTS[1].placeholder}"], torch.tensor([place]), torch.tensor([300]), latents)
        ours = method.eval().condition(step)
        theirs = alone.eval().condition(Step(step.prompts, torch.tensor([0]), step.timestep, latents))
    torch.testing.assert_close(ours.keys, theirs.keys)


def test_artifact_of_another_base_is_refused(name, stack, tmp_path) -> None:
    method = build(name, stack, CATS)
    path = tmp_path / "concept.safetensors"
    artifact.write(path, method, 0, {}, steps=0)
    other = build(name, tiny(seed=1, size=128, name="other"), CATS)
    with pytest.raises(UserError, match="was made for base 'tiny'"):
        artifact.load_into(other, 0, path)
    with pytest.raises(UserError, match="prediction_type"):
        stack.base.check(Base("sd21", 32, 16, "v_prediction"), "a file")


def test_artifact_is_strict(trainee, stack, tmp_path) -> None:
    method = build(trainee, stack, CATS)
    tensors = method.artifact(0)
    missing = dict(list(tensors.items())[1:])
    with pytest.raises(UserError, match="does not fit"):
        method.load_artifact(0, missing)
    with pytest.raises(UserError, match="does not fit"):
        method.load_artifact(0, {**tensors, "more": torch.zeros(1)})


def test_checkpoint_leaves_the_stack_out(name, stack) -> None:
    method = build(name, stack, CATS)
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] and not any(key.startswith("model.") for key in checkpoint["state_dict"])
    method.on_load_checkpoint(checkpoint)
    method.load_state_dict(checkpoint["state_dict"], strict=True)
    with pytest.raises(UserError, match=f"not of this {type(method).__name__}"):
        method.on_load_checkpoint({"state_dict": {}})


def test_concept_alone_and_among_four(name, stack) -> None:
    """Loss, randomness, clipping and optimisation of a concept do not depend on its neighbours.

    In float64: Adam divides by tiny gradients, so float32's rounding alone moves single weights by a learning rate.
    """
    stack = copy.deepcopy(stack).double()
    if not method_class(name).stacks_concepts:
        with pytest.raises(UserError, match="one concept at a time"):
            build(name, stack, SUBJECTS)
        return
    four = build(name, stack, SUBJECTS).double()
    train(four, 3, clip=1e-3)
    for index in (0, 2):
        alone = build(name, stack, SUBJECTS[index : index + 1]).double()
        train(alone, 3, clip=1e-3)
        for key, value in alone.artifact(0).items():
            torch.testing.assert_close(four.artifact(index)[key], value, atol=1e-5, rtol=0, msg=f"{index} {key}")


def test_side_by_side_with_another_it_is_itself(name, stack, monkeypatch) -> None:
    """Beside another concept of another seed, which goes on longer: losses, what is learnt and pictures.

    Where both ask the U-Net with the weights it has, their calls are one; a method for which they never are says why.
    """
    stack = copy.deepcopy(stack).double()
    asked = UNetCalls(stack, monkeypatch)

    def pair() -> list[Method]:
        return [build(name, stack, SUBJECTS[seed : seed + 1], seed=seed).double() for seed in (0, 1)]

    def texts(method: Method) -> tuple[list[str], list[int]]:
        return [f"a photo of a {method.concepts[0].placeholder}"], [1]

    alone, beside, how = pair(), pair(), {"steps": 2, "guidance": 7.5}
    if trains(name):
        expected = [train(method, steps) for method, steps in zip(alone, (1, 2), strict=True)]
        asked.taken()
        found = train_together(beside, (1, 2))
        assert sum(call.gradient for call in asked.taken()) == (3 if method_class(name).why_alone else 2)
        for mine, one in zip(found, expected, strict=True):
            assert mine == pytest.approx(one, rel=0, abs=1e-12)
        for mine, one in zip(beside, alone, strict=True):
            learnt = mine.trainable_state()
            for key, value in one.trainable_state().items():
                # 1e-9: Adam divides by gradients that are 0 but for rounding.
                torch.testing.assert_close(learnt[key], value, atol=1e-9, rtol=0, msg=key)
    asked.taken()
    drawn = [method.sample(*texts(method), **how) for method in alone]
    single = asked.taken()
    shared = together(stack, [method.sample_calls(*texts(method), **how) for method in beside])
    for mine, one in zip(shared, drawn, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-6, rtol=0)  # the VAE's answer is float32
    joint = asked.taken()
    assert sum(call.rows for call in joint) == sum(call.rows for call in single)
    apart = method_class(name).why_apart or any(call.changed for call in single[-1:])  # one may ask nothing at all
    assert len(joint) == len(single) // (1 if apart else 2)
    assert all(method.training for method in beside), "left as they were"


def test_micro_batches_do_not_matter(trainee, stack) -> None:
    """Four rows at once or two and two: the same gradient. Nested dropout's coin included."""

    def gradient(parts) -> torch.Tensor:
        method = build(trainee, stack, CATS).train()
        for part in parts:
            (method.training_step(batch(CATS, part), 0) * len(part) / 4).backward()
        return torch.cat([grad.flatten() for grad in gradients(method).values()])

    whole, halves = gradient([[8, 9, 10, 11]]), gradient([[8, 9], [10, 11]])
    torch.testing.assert_close(whole, halves, atol=1e-4 * float(whole.abs().max()), rtol=0)


def test_masks_weigh_the_loss(trainee, stack) -> None:
    """A loss that counts nowhere is nothing and moves nothing; one that counts everywhere is the loss without masks."""
    if method_class(trainee).training_calls is not Method.training_calls:
        pytest.skip("edits one picture, which has no mask for the loss")
    rows = batch(list(CATS), [0, 1])
    losses = {}
    for weight in (None, 1.0, 0.0):
        method = build(trainee, stack, CATS)
        mask = None if weight is None else torch.full((2, 1, 128, 128), weight)
        method.training_step(rows._replace(mask=mask), 0)
        losses[weight] = float(method._losses[-1][method._loss_names.index("loss")])
    assert losses[1.0] == pytest.approx(losses[None], rel=1e-5) and losses[0.0] == 0


def test_its_loss_on_fixed_inputs_can_be_watched(trainee, stack) -> None:
    """It is asked for before each update, moves with the parameters alone, and leaves the training as it is."""
    if why := method_class(trainee).why_no_early_stop:
        pytest.skip(why)
    fixed = fixed_inputs(batch(list(CATS), [0, 1]), 0, 1, stack.latent_shape, stack.num_timesteps)
    plain, watched = (build(trainee, stack, CATS) for _ in range(2))
    watched.early_stop = EarlyStop(fixed, window=2, threshold=1e-9, every=1, most=3, name="cats")
    losses = []
    optimizer = watched.configure_optimizers()
    watched.train()
    for step in range(3):
        loss = watched.training_step(batch(list(CATS), [2 * step, 2 * step + 1]), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watched.step_metrics()
        losses.append(float(loss.detach()))
    assert losses == train(plain, 3)
    again = [float(alone(stack, watched.fixed_loss_calls(watched.early_stop.inputs, watched.early_stop.latents)))
             for _ in range(2)]  # fmt: skip
    seen = watched.early_stop.dvar.losses
    assert len(seen) == 3 and len({*seen, again[0]}) > 2 and again[0] == again[1]
    assert not watched.ended


def test_global_random_state_does_not_matter(trainee, stack) -> None:
    results = []
    for seed in (1, 2):
        method = build(trainee, stack, CATS)
        torch.manual_seed(seed)
        results.append((train(method, 2), method.artifact(0)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_gradient_checkpointing_changes_nothing(trainee) -> None:
    found = []
    for switch in (False, True):
        stack = tiny(seed=0, size=128).optimise(channels_last=False, compile=False, gradient_checkpointing=switch)
        method = build(trainee, stack, CATS).train()
        method.training_step(batch(CATS, [2, 3]), 0).backward()
        found.append(gradients(method))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_image_does_not_depend_on_its_batch(name) -> None:
    method = build(name, copy.deepcopy(tiny(seed=0, size=64)), SUBJECTS[:1])
    method.double()  # float32 differs by up to 4e-3 here, float64 by 1e-12: compare images in float64
    word = SUBJECTS[0].placeholder
    how = {"steps": 2, "guidance": 7.5}
    both = method.sample([f"a {word}", "a dog", f"a {word}"], [1, 2, 3], **how)
    alone = method.sample(["a dog"], [2], **how)
    torch.testing.assert_close(both[1:2], alone, atol=1e-7, rtol=0)  # pictures are float32: 6e-8 is its last digit
    split = method.sample([f"a {word}", "a dog", f"a {word}"], [1, 2, 3], **how, batch_size=1)
    torch.testing.assert_close(both, split, atol=1e-7, rtol=0)


def test_a_model_of_velocities_draws_the_same_pictures(name) -> None:
    """The same denoiser, asked for velocities (Salimans & Ho 2022): v = (eps - sqrt(1 - a) z) / sqrt(a)."""
    if issubclass(method_class(name), EditingMethod):
        pytest.skip("follows an inversion, whose levels differ: tests/model/test_inversion.py")
    noise, velocity = (tiny(seed=0, size=64, prediction_type=kind).double() for kind in ("epsilon", "v_prediction"))
    ask = velocity.predict

    def predict(latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        a = velocity.alpha_bar[timestep][:, None, None, None]
        eps = ask(latents, timestep, conditioning)
        return (eps - (1 - a).sqrt() * latents) / a.sqrt()

    velocity.predict = predict  # type: ignore[method-assign]
    drawn = [
        build(name, each, SUBJECTS[:1]).double().sample(["a photo of a <my-cat>"], [3], steps=3, guidance=2.0)
        for each in (noise, velocity)
    ]
    torch.testing.assert_close(*drawn, atol=1e-6, rtol=0)  # schedulers hold their levels in float32


def test_prompt_without_placeholder_is_the_plain_text(name, stack) -> None:
    """A concept method leaves other texts alone; an edit method reads every text with the noun in the slot."""
    method = build(name, stack, CATS).eval()

    def condition(text):
        with torch.no_grad():
            latents = torch.ones(1, *stack.latent_shape)
            return method.condition(Step([text], torch.tensor([0]), torch.tensor([500]), latents))

    if isinstance(method, EditsPicture):
        slot, noun = condition(f"a {CATS[0].placeholder} on a beach"), condition(f"a {CATS[0].word} on a beach")
        assert torch.equal(slot.keys, noun.keys)
        return
    states = condition("a dog on a beach")
    plain = stack.encode_text(["a dog on a beach"])
    for layer in range(stack.layers):
        for part in states.layer(layer):
            torch.testing.assert_close(part, plain, atol=1e-5, rtol=0)


def variations(name: str) -> list[tuple[str, Any]]:
    """Every setting of a method's yaml that shapes what it learns, with another value; words are in its comment."""
    cls, found = method_class(name), []
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text()
    for key, value in quick(name).items():
        if key in ("_target_", *cls.training_settings, *cls.sampling_settings) or isinstance(value, dict):
            continue
        if isinstance(value, str):
            comment = re.search(rf"^  {key}: .*?# ((?:\w+ \| )+\w+)", text, re.M)
            found += [(key, word) for word in (comment[1].split(" | ") if comment else ()) if word != value]
        elif isinstance(value, list):
            found.append((key, value[:1] if len(value) > 1 else [*value, *value]))
        elif isinstance(value, bool | int | float):
            other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2
            found.append((key, other))
    return found


@torch.no_grad()
def prediction(method: Method) -> torch.Tensor:
    """What the U-Net says with the concept, for some latents."""
    latents, zero = torch.ones(1, *method.model.latent_shape), torch.zeros(1, dtype=torch.long)
    step = Step([f"a {CATS[0].placeholder} on a beach"], zero, zero + 500, latents, variant=method.variants[0])
    return method.model.predict(latents, step.timestep, method.eval().condition(step))


EXPORTING = [name for name in METHODS if trains(name) and issubclass(method_class(name), Exportable)]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, *change) for name in EXPORTING for change in [("", None), *variations(name)]],
)
def test_exports_load_back(name, key, value, stack, tmp_path, caplog) -> None:
    """Every file that it writes, under every setting; a setting that cannot be is refused in one line."""
    changes = {key: value} if key else {}
    try:
        method = build(name, stack, CATS, **changes)
    except UserError:
        pytest.skip("refused")
    train(method, 1)
    expected = prediction(method)
    for path in method.export(0, tmp_path, steps=1):
        if path.name.startswith(("learned_embeds-", "target_")):
            continue  # NeTI's second file carries the placeholder's name only, Imagic's others nothing fitted
        if path.name == "adapter_model.safetensors" and changes.get("text_encoder"):
            continue  # PEFT keeps the parts in files of their own
        fresh = build(name, stack, CATS, **changes)
        artifact.load_into(fresh, 0, path)
        if "only:" in caplog.text:
            continue  # a file that holds a part says so when it is loaded (Imagic's embedding of phase A)
        loaded, kept = fresh.artifact(0), method.artifact(0)
        if loaded.keys() != kept.keys() or any(not torch.allclose(loaded[key], kept[key]) for key in kept):
            # LoRA's alpha is folded into its matrices; E4T's picture is a file of 8 bits.
            near = 1e-2 if "picture" in kept else 1e-5
            torch.testing.assert_close(prediction(fresh), expected, atol=near, rtol=near)


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(method_class(name), Composable)])
def test_drawn_together_with_others_it_is_itself(name) -> None:
    """`composition_part` and `changed_weights` give all that `condition` gives: alone they are the method."""
    method = kept(name, tiny(seed=0, size=64), CATS[0])
    text, settings = f"a {CATS[0].placeholder} on a sofa", {"steps": 2, "guidance": 7.5}
    composed, alone = Composition([method]).sample([text], [1], **settings), method.sample([text], [1], **settings)
    apart = float((composed - alone).abs().max())
    assert apart < 2e-4, f"{apart}: is something missing in {name}'s composition_part or changed_weights?"


def test_placeholder_that_is_a_word_is_refused(name, stack) -> None:
    from hiperlab.base.method import Subject

    with pytest.raises(UserError, match="already a word"):
        build(name, stack, [Subject("cat", "cat", "cat")])
    if not method_class(name).stacks_concepts:
        return
    with pytest.raises(UserError, match="different placeholders"):
        build(name, stack, [Subject("a", "<x>", "cat"), Subject("b", "<x>", "cat")])
