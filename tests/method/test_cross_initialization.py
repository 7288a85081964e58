"""Cross Initialization: the start written naively, the penalty by hand, training texts, files in diffusers."""

from __future__ import annotations

import copy

import pytest
import torch

from hiperlab.base.method import Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from tests.composed import SUBJECTS, batch, build, train
from tests.pipeline import drawn, pipeline

NAME = "cross_initialization"
CATS = SUBJECTS[:1]
STEP = Step(["a <my-cat>"], torch.tensor([0]), torch.tensor([100]))


def encoded(stack, rows: torch.Tensor) -> torch.Tensor:
    """What transformers' own text model gives for 77 input rows (77, D): its table is made to hold them."""
    text = copy.deepcopy(stack.text)
    text.get_input_embeddings().weight.data[: len(rows)] = rows
    return text(torch.arange(len(rows))[None]).last_hidden_state[0]


def test_words_start_as_outputs_of_the_encoder(stack) -> None:
    """Behind a begin token, before an end token and padding, which change nothing."""
    method = build(NAME, stack, [Subject("man", "<man>", "old man")])
    table, tokenizer = stack.text.get_input_embeddings().weight, stack.tokenizer
    ids = tokenizer("old man", padding="max_length", return_tensors="pt").input_ids[0]
    assert method.rows.shape == (1, 2, 32)
    with torch.no_grad():
        torch.testing.assert_close(method.rows[0], encoded(stack, table[ids])[1:3], atol=1e-5, rtol=0)
    assert float((method.rows[0].detach() - table[ids[1:3]]).abs().max()) > 1, "no rows of the vocabulary"


def test_names_are_averaged_token_by_token_before_encoding(stack, tmp_path) -> None:
    """A short name counts in the first column only, a line that stands twice counts twice, empty lines not at all."""
    names = ["ada lovelace", "cher", "cher", "", "alan turing"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    table, tokenizer = stack.text.get_input_embeddings().weight, stack.tokenizer
    ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names if name]
    assert [len(name) > 1 for name in ids] == [True, False, False, True]
    sequence = table[[tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 76].detach().clone()
    sequence[1] = sum(table[name[0]] for name in ids) / 4
    sequence[2] = sum(table[name[1]] for name in ids if len(name) > 1) / 2
    method = build(NAME, stack, SUBJECTS[:2], names=str(tmp_path / "names.txt"))
    assert method.rows.shape == (2, 2, 32), "the published two rows"
    with torch.no_grad():
        for rows in method.rows:
            torch.testing.assert_close(rows, encoded(stack, sequence)[1:3], atol=1e-5, rtol=0)


def test_penalty_by_hand(stack) -> None:
    """Not squared, the mean over a concept's rows, 1e-6 in every component; the gradient's length is constant."""
    subjects = [Subject("a", "<a>", "old man"), Subject("b", "<b>", "old man")]
    method = build(NAME, stack, subjects, reg_weight=0.5)
    assert method.distance()[0, 0].item() == pytest.approx(1e-6 * 32**0.5, rel=1e-4)
    with torch.no_grad():
        method.rows[0, 0, 3] += 2.0
        method.rows[1] += 0.25
    step = Step(["a <a>", "a <b>"], torch.tensor([0, 1]), torch.tensor([1, 2]))
    found = method.extra_losses(step, torch.zeros(()))["embed"]
    expected = torch.tensor([0.5 * (2 + 1e-6 * 32**0.5) / 2, 0.5 * 0.25 * 32**0.5])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.sum().backward()
    torch.testing.assert_close(method.rows.grad.norm(dim=-1), torch.full((2, 2), 0.25), atol=1e-5, rtol=0)


def test_wording_is_said_in_training_only(stack, monkeypatch) -> None:
    method = build(NAME, stack, SUBJECTS[:2], wording="face of {} person")
    asked: list[str] = []
    tokenize = type(stack).tokenize
    monkeypatch.setattr(
        type(stack), "tokenize", lambda self, texts, slots: asked.extend(texts) or tokenize(self, texts, slots)
    )
    method.training_step(batch(SUBJECTS[:2], [0]), 0)
    assert asked == ["a photo of a face of <my-cat> person", "a photo of a face of <my-dog> person"]
    asked.clear()
    method.condition(STEP)
    assert asked == ["a <my-cat>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_vectors": 0}, r"method\.num_vectors=0 is out of range"),
        ({"num_vectors": 2}, r"num_vectors=2, but 'cat' is 1 tokens"),
        ({"initializer": "old man", "names": "x.txt"}, "give one of them"),
        ({"names": "nowhere.txt"}, r"method\.names=nowhere\.txt cannot be read"),
        ({"wording": "a person"}, r"method\.wording='a person' needs one \{\}"),
        ({"reg_weight": -1.0}, r"method\.reg_weight=-1\.0 is out of range"),
        ({"reg_weight": float("nan")}, r"method\.reg_weight=nan is out of range"),
    ],
)
def test_settings_out_of_range(stack, changes, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(NAME, stack, CATS, **changes)
    assert "\n" not in str(caught.value)


def test_names_too_short_or_unreadable(stack, tmp_path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cher\n")
    with pytest.raises(UserError, match="holds 1 names of at most 1 tokens"):
        build(NAME, stack, CATS, names=str(path))
    assert build(NAME, stack, CATS, names=str(path), num_vectors=1).rows.shape == (1, 1, 32)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        build(NAME, stack, CATS, names=str(path))


def test_files(stack, tmp_path) -> None:
    """The authors' keys in their order, read back by Textual Inversion as well; one key for diffusers."""
    method = build(NAME, stack, [Subject("man", "<man>", "old man")])
    train(method, 2)
    written = {path.name: path for path in method.export(0, tmp_path, steps=2)}
    theirs = torch.load(written["learned_embeds.bin"], weights_only=True)
    assert list(theirs) == ["<man>_v0", "<man>_v1"] and all(row.shape == (32,) for row in theirs.values())
    for path in written.values():
        assert torch.equal(embedding.read(path), method.rows[0].detach()), path.name
    other = build("ti", stack, CATS, num_vectors=2)
    other.load_foreign(0, written["learned_embeds.bin"])
    assert torch.equal(other.vectors[0], method.rows[0])
    with pytest.raises(UserError, match=r"holds 2 rows of width 32, this run \(1, 32\)"):
        build(NAME, stack, CATS).load_foreign(0, written["learned_embeds.bin"])


def test_plain_pipeline_draws_the_same_picture(stack, tmp_path) -> None:
    method = build(NAME, stack, [Subject("man", "<man>", "old man")])
    train(method, 2)
    method.export(0, tmp_path, steps=2)
    prompt = "a photo of <man> on a beach"
    ours = method.sample([prompt], [7], steps=3, guidance=7.5)
    pipe = pipeline(stack)
    pipe.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    theirs = drawn(pipe, prompt, 7, stack.size)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
