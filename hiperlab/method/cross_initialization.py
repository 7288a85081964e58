"""Cross Initialization (Pang et al. 2024): a new word's rows start from what the text encoder makes of the first word.

The encoder's output has the scale and direction that learnt words end with, so that hundreds of steps are enough and
the rows are held near that start. Made for faces, whose first word is the mean of many names. Follows the authors'
train_cross_init.py, utils.py and models/clip_model.py (lyuPang/CrossInitialization).
Symbols: E (vocabulary), T (text encoder with its final norm), e (learnt rows), e0 (their start), lambda (weight).
Axes: K concepts, V rows per concept, R rows of a batch, N tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.concept import SLOT, fill
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.layer.initial_words import MOST, token_ids
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import Tokens, numbered_slots

PUBLISHED_ROWS = 2  # of the README's command, which starts from names


class CrossInitialization(Method, Composable, Exportable):
    """V rows per concept, read by all layers at all timesteps, that begin as outputs of the text encoder.

    Args:
        model: the frozen stack.
        concepts: what is personalised.
        optimizer: parameters -> optimizer.
        seed: of the draws.
        num_vectors: V, 1 to 60; None is 2 with `names`, else the words' number of tokens, which V must be.
        names: a text file with one name per line, of which e0 is the encoded mean; None starts from words.
        initializer: the words; None takes each class noun.
        wording: what stands for the placeholder in training prompts, "{}" for the placeholder itself. The authors, for
            people: "face of {} person".
        reg_weight: lambda of the distance |e - e0|, 0 or more.

    Raises:
        UserError: a setting is out of range, names and words are both given, the file of names is none or too short.
    """

    start: Tensor
    training_settings = ("optimizer", "wording", "reg_weight")

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        num_vectors: int | None,
        names: str | None,
        initializer: str | None,
        wording: str,
        reg_weight: float,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        if num_vectors is not None and not 1 <= num_vectors <= MOST:
            raise UserError(f"method.num_vectors={num_vectors} is out of range. Choose 1 to {MOST}; the paper uses 2.")
        if names is not None and initializer is not None:
            raise UserError(f"method.names={names} and method.initializer={initializer}: give one of them.")
        if wording.count(SLOT) != 1:
            raise UserError(f"method.wording={wording!r} needs one {SLOT}, where the new word stands.")
        if not 0 <= reg_weight < math.inf:
            raise UserError(f"method.reg_weight={reg_weight} is out of range. Choose 0 or more; the authors use 1e-5.")
        self.wording, self.reg_weight = wording, reg_weight
        vocabulary = model.vocabulary()
        if names is not None:
            mean = mean_of_names(Path(names).expanduser(), model, vocabulary, num_vectors or PUBLISHED_ROWS)
            words = mean.expand(len(concepts), -1, -1)
        else:
            texts = [initializer or concept.word for concept in concepts]
            ids = token_ids(model.tokenizer, texts)
            if num_vectors not in (None, ids.shape[1]):
                raise UserError(
                    f"method.num_vectors={num_vectors}, but {texts[0]!r} is {ids.shape[1]} tokens, each of which gives "
                    "a row. Give method.initializer that many, or leave num_vectors null."
                )
            words = vocabulary[ids.to(vocabulary.device)]
        self.register_buffer("start", crossed(model, words))  # (K, V, D) e0; kept, as resuming needs it
        self.rows = nn.Parameter(self.start.clone())  # (K, V, D) e
        self.slots = numbered_slots([concept.placeholder for concept in concepts], words.shape[1])

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch with training prompts that say, e.g., "face of <x> person" for "<x>"."""
        words = [self.concepts[number].placeholder for number in batch.concept.tolist()]
        pairs = zip(batch.prompts, words, strict=True)
        return batch._replace(prompts=[prompt.replace(word, fill(self.wording, word)) for prompt, word in pairs])

    def condition(self, step: Step) -> Conditioning:
        """The V rows stand for the word in every layer: (1, R, N, D)."""
        tokens = self.model.tokenize(step.prompts, self.slots)
        _, _, slots = tokens.occurrences()
        return self.model.condition_tokens(tokens, self.rows.flatten(0, 1)[slots][None])

    def extra_losses(self, step: Step, z0: Tensor) -> dict[str, Tensor]:
        """The mean distance of a concept's rows from e0, times lambda, for each of the batch's rows (R,)."""
        return {"embed": self.reg_weight * self.distance().mean(1)[step.concept]}

    def distance(self) -> Tensor:
        """|e_i - e0_i + 1e-6| (K, V), not squared: its gradient has the same length however far a row has gone.

        The constant, that of torch's pairwise_distance (train_cross_init.py), is added to every component; without it
        the gradient at the start would be 0 / 0.
        """
        return (self.rows - self.start + 1e-6).norm(dim=-1)

    def composition_part(self, step: Step) -> Part:
        """The rows (1, 1, V, D) for the word."""
        return Part(step.prompts, self.rows[None, :1])

    # ---- files -------------------------------------------------------------------------------------------------------

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """The authors' `learned_embeds.bin`, diffusers' `learned_embeds.safetensors`, A1111's `<name>.pt`.

        Diffusers reads files with one key only, hence no authors' file of several rows.
        """
        subject = self.concepts[index]
        rows = self.rows[index].detach().float().cpu()
        written = embedding.write(folder, subject.name, subject.placeholder, rows, self.model.name, self.model.widths)
        binary = next((path for path in written if path.suffix == ".bin"), None)
        if binary is None:  # SDXL, which their code does not know
            return written
        torch.save({f"{subject.placeholder}_v{number}": row.clone() for number, row in enumerate(rows)}, binary)
        return written

    def load_foreign(self, index: int, path: Path) -> None:
        """The authors' file or any other embedding file; e0 stays what the settings say."""
        own, setting = self.rows[index], "method.initializer to words of {} tokens"
        rows = embedding.read_like(path, own, setting, self.model.widths)
        with torch.no_grad():
            self.rows[index].copy_(rows)


@torch.no_grad()
def crossed(model: FrozenStack, words: Tensor) -> Tensor:
    """T's outputs (K, V, D), float32, at the rows `words` (K, V, D) behind a begin token: e0 (train_cross_init.py).

    What follows them in the authors' sequences, an end token and padding, cannot matter: the encoder is causal. Of
    SDXL's encoders, which the authors do not train, it is what the U-Net reads of each.
    """
    concepts, count = words.shape[:2]
    slots = torch.arange(concepts * count, device=words.device).view(concepts, count)
    begin = slots.new_full((concepts, 1), -1)
    ids = torch.full_like(slots, int(model.tokenizer.bos_token_id))
    tokens = Tokens(torch.cat([ids[:, :1], ids], dim=1), torch.cat([begin, slots], dim=1))
    tokens = tokens._replace(further=(tokens,) * (len(model.towers) - 1))
    states = model.normalise_text(model.hidden_states(tokens, words.flatten(0, 1)[None]))
    return states[0, :, 1:].float().contiguous()


def mean_of_names(path: Path, model: FrozenStack, vocabulary: Tensor, count: int) -> Tensor:
    """The mean input rows (V, D) of a list of names: row i over the names that have at least i + 1 tokens (utils.py).

    Later tokens are dropped; a name that stands twice counts twice.

    Args:
        path: one name per line, UTF-8; empty lines are left out.
        model: whose tokenizer reads them.
        vocabulary: input rows (tokens, D).
        count: V.

    Raises:
        UserError: it cannot be read, or no name has so many tokens.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"method.names={path} cannot be read as UTF-8 text, one name per line ({error}).") from error
    ids = [model.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines if line.strip()]
    longest = max(map(len, ids), default=0)
    if longest < count:
        raise UserError(
            f"method.names={path} holds {len(ids)} names of at most {longest} tokens. Give names of {count} tokens, or "
            "a smaller method.num_vectors."
        )
    columns = [torch.tensor([name[place] for name in ids if len(name) > place]) for place in range(count)]
    return torch.stack([vocabulary[column.to(vocabulary.device)].mean(0) for column in columns])
