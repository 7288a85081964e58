"""AttnDreamBooth: the regulariser by hand, what each stage trains, fresh optimizer states, resuming, files."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from hiperlab.base.method import Subject
from hiperlab.errors import UserError
from hiperlab.loss.attention_regulariser import attention_regulariser, map_statistics
from hiperlab.method.attn_dreambooth import AttnDreamBooth, stage_ends
from hiperlab.model.offsets import parameter_names
from hiperlab.model.tiny import tiny
from tests.composed import SUBJECTS, batch, build, kept, train

CAT = SUBJECTS[0]


def three(stack, steps: int = 3, **changes) -> AttnDreamBooth:
    """As many steps in each stage, samples as `train` numbers them; no class pictures."""
    settings = {"steps": steps, "stages": [1, 1, 1], "batch_size": 2, "prior": {"weight": 0.0}}
    method = build("attn_dreambooth", stack, [CAT], **{**settings, **changes})
    assert isinstance(method, AttnDreamBooth)
    return method


def test_regulariser_by_hand() -> None:
    """One head, two positions: means .2 and .4, variances .02 and 0; then a layer without a difference."""
    maps = torch.tensor([[[[0.1, 0.4], [0.3, 0.4]]]], dtype=torch.float64)
    means, variances = map_statistics(maps, torch.tensor([[0, 1]]))
    torch.testing.assert_close(means, torch.tensor([[0.2, 0.4]], dtype=torch.float64))
    torch.testing.assert_close(variances, torch.tensor([[0.02, 0.0]], dtype=torch.float64))
    word, noun = torch.tensor([[0]]), torch.tensor([1])
    found = attention_regulariser([maps, torch.ones_like(maps)], word, noun, 3.0, 5.0)
    assert float(found) == pytest.approx((3 * 0.2**2 + 5 * 0.02**2) / 2)


def test_regulariser_is_the_authors_loop() -> None:
    """Row by row as in train_attndreambooth.py: variances over heads and positions, means over a word's rows."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, pixels, 7, generator=generator).softmax(-1) for pixels in (16, 4)]
    word, noun = torch.tensor([[2, 3], [4, 5]]), torch.tensor([4, 6])
    for row in range(2):
        total = 0.0
        for each in maps:
            by_token = each[row].flatten(0, 1)  # heads and positions together
            apart = [by_token[:, t].mean() - by_token[:, noun[row]].mean() for t in word[row]]
            spread = [by_token[:, t].var() - by_token[:, noun[row]].var() for t in word[row]]
            total += 2 * sum(d**2 for d in apart) / 2 + 5 * sum(d**2 for d in spread) / 2
        assert float(attention_regulariser(maps, word, noun, 2, 5)[row]) == pytest.approx(float(total / 2), rel=1e-4)


def test_stages_keep_their_proportions() -> None:
    assert stage_ends([60, 100, 500], 660) == [60, 160, 660]
    assert stage_ends([60, 100, 500], 66) == [6, 16, 66]
    assert stage_ends([60, 100, 500], 2) == [1, 1, 2]
    assert stage_ends([0, 0, 5], 10) == [0, 0, 10]


def test_each_stage_trains_its_own(stack) -> None:
    method = three(stack)
    cross = {name.replace(".", "/") for name in parameter_names(stack.unet, "cross")}
    assert all("attn2" in name and "norm2" not in name for name in cross)
    state = {name: value.clone() for name, value in method.trainable_state().items()}
    expected = [{"vectors"}, {f"unet_offsets.{name}" for name in cross}, state.keys() - {"vectors"}]
    optimizer = method.configure_optimizers()
    method.train()
    for stage in range(3):
        method.training_step(batch([CAT], [2 * stage, 2 * stage + 1]), stage).backward()
        optimizer.step()
        optimizer.zero_grad()
        now = method.trainable_state()
        assert {name for name in state if not torch.equal(state[name], now[name])} == expected[stage]
        state = {name: value.clone() for name, value in now.items()}


def test_stages_have_fresh_states_and_their_rates(stack) -> None:
    """Adam's first step is its rate, whatever came before; without decay, so that nothing else moves a weight."""
    rates = {"cross_lr": 3e-5, "unet_lr": 7e-6}
    method = three(stack, **rates, optimizer={"lr": 1e-3, "weight_decay": 0.0})
    optimizer = method.configure_optimizers()
    method.train()
    largest = []
    for stage in range(3):
        before = {name: value.clone() for name, value in method.trainable_state().items()}
        method.training_step(batch([CAT], [2 * stage, 2 * stage + 1]), stage).backward()
        optimizer.step()
        optimizer.zero_grad()
        apart = {name: (value - before[name]).abs().max() for name, value in method.trainable_state().items()}
        largest.append(float(max(value for name, value in apart.items() if name == "vectors" or "attn2" in name)))
    assert largest == pytest.approx([1e-3, 3e-5, 7e-6], rel=1e-2)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_training_is_exact(stop, stack) -> None:
    """From a checkpoint anywhere, also on a stage's border: fresh optimizer states are as fresh as they were."""

    def steps(method, optimizer, numbers) -> None:
        method.train()
        for step in numbers:
            method.training_step(batch([CAT], [2 * step, 2 * step + 1]), step).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first, resumed = (three(stack, 6) for _ in range(3))
    steps(whole, whole.configure_optimizers(), range(6))
    optimizer = first.configure_optimizers()
    steps(first, optimizer, range(stop))
    resumed.load_state_dict(first.state_dict())
    again = resumed.configure_optimizers()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(resumed, again, range(stop, 6))
    for name, value in whole.trainable_state().items():
        assert torch.equal(value, resumed.trainable_state()[name]), name


def test_regulariser_is_a_sum_over_the_batch(stack) -> None:
    """Twice the rows: the same denoising loss, twice the regulariser. Equal rows do not make it 0: places differ."""
    found = []
    for count in (1, 2):
        method = three(stack, 1, stages=[1, 0, 0], batch_size=count)
        rows = batch([CAT], [0] * count)
        method.training_step(rows, 0)
        found.append(dict(zip(method._loss_names, method._losses[-1].tolist(), strict=True)))
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    assert found[1]["loss/attention"] == pytest.approx(2 * found[0]["loss/attention"], rel=1e-3) and (
        found[0]["loss/attention"] > 0
    )


def test_without_weights_attention_is_not_recorded(stack) -> None:
    method = three(stack, reg_mean=[0, 0, 0], reg_var=[0, 0, 0])
    method.training_step(batch([CAT], [0, 1]), 0)
    assert method._loss_names == ["loss"] and method._seen is None


def test_class_rows_are_not_regularised(stack) -> None:
    """The second half of the batch shows the class: it has no word to compare."""
    found = []
    for weight in (0.0, 1.0):
        method = three(stack, prior={"weight": weight})
        method.training_step(batch([CAT], [0, 1]), 0)
        found.append(dict(zip(method._loss_names, method._losses[-1].tolist(), strict=True)))
    assert "loss/prior" in found[1]
    assert found[1]["loss/attention"] == pytest.approx(found[0]["loss/attention"], rel=1e-4)


def test_several_rows_start_as_the_class_tokens(stack) -> None:
    """A noun of two tokens: the first counts in the regulariser, as the authors' scalar index has it."""
    noun = "teddy bear"
    method = build("attn_dreambooth", stack, [Subject("bear", "<bear>", noun)], num_vectors=2)
    table = stack.text.get_input_embeddings().weight
    first, second = stack.tokenizer(noun, add_special_tokens=False)["input_ids"]
    assert torch.equal(method.vectors[0].detach(), table[[first, second]])
    tokens = stack.tokenize(method.texts(_step("a photo of a <bear>")), method.slots)
    places, noun_at = method._places(tokens, _step("a photo of a <bear>", torch.tensor([0])))
    assert places.tolist() == [[5, 6]] and noun_at.tolist() == [7] and int(tokens.ids[0, 7]) == first


def _step(prompt: str, samples: torch.Tensor | None = None):
    from hiperlab.base.method import Step

    return Step([prompt], torch.tensor([0]), torch.tensor([500]), samples=samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_vectors": 2}, "Choose 1 to 1"),
        ({"num_vectors": 0}, "Choose 1 to"),
        ({"stages": [60, 100]}, "one per stage"),
        ({"stages": [0, 0, 0]}, "one per stage"),
        ({"reg_mean": [0.1, -2, 2]}, "0 or more"),
        ({"reg_var": [1.0]}, "three numbers"),
        ({"cross_lr": 0.0}, "above 0"),
        ({"unet_lr": 0.0}, "above 0"),
    ],
)
def test_settings_are_refused(changes, message, stack) -> None:
    with pytest.raises(UserError, match=message):
        build("attn_dreambooth", stack, [CAT], **changes)


def test_a_prompt_names_the_concept_once(stack) -> None:
    method = three(stack, template=None)
    rows = batch([CAT], [0, 1])._replace(prompts=["<my-cat> beside <my-cat>", "a <my-cat>"])
    with pytest.raises(UserError, match="exactly once"):
        method.training_step(rows, 0)
    with pytest.raises(UserError, match="exactly once"):
        method.training_step(rows._replace(prompts=["a cat", "a <my-cat>"]), 0)


def test_several_processes_are_refused(stack) -> None:
    class Trainer:
        world_size = 2

    method = three(stack)
    method._trainer = Trainer()
    with pytest.raises(UserError, match="one process"):
        method.on_fit_start()


def test_files(tmp_path, caplog) -> None:
    stack = tiny(seed=0, size=64)
    method = kept("attn_dreambooth", stack, CAT, export_weights=True)
    row, unet = method.export(0, tmp_path, 1)
    for given in (row, unet):  # either of the two
        other = kept("attn_dreambooth", stack, CAT, seed=2)
        other.load_foreign(0, given)
        for name, value in method.trainable_state().items():
            torch.testing.assert_close(other.trainable_state()[name], value, atol=1e-6, rtol=0)
    # the places of the authors' script
    root = tmp_path / "models"
    theirs = root / "learned_models" / "unet_models" / "checkpoint-500" / "unet" / unet.name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(unet.read_bytes())
    with pytest.raises(UserError, match="half of a concept"):
        other.load_foreign(0, theirs)
    (root / "learned_embeds").mkdir()
    vector = next(iter(load_file(row).values()))[0] + 1
    torch.save({"new_concept_v0": vector}, root / "learned_embeds" / "learned_embeds_steps_60.bin")
    other.load_foreign(0, theirs)
    assert torch.equal(other.vectors[0, 0].detach(), vector)
    assert "word only" not in caplog.text
    unet.unlink()
    other.load_foreign(0, row)
    assert "word only" in caplog.text and not any(value.any() for value in other.unet_offsets.values())


def test_two_runs_share_the_words_stage(stack) -> None:
    """Maps are of a call's own rows when calls are joined."""
    from tests.composed import train_together

    alone = [train(three(stack, 1, stages=[1, 0, 0]), 1) for _ in range(1)]
    both = train_together([three(stack, 1, stages=[1, 0, 0]) for _ in range(2)], (1, 1))
    assert both[0] == pytest.approx(alone[0], rel=1e-5) and both[1] == pytest.approx(alone[0], rel=1e-5)
