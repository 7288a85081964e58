"""HiPer (Han et al. 2023): the last N text rows are fitted to one picture and kept when its text is changed.

Follows the authors' train.py and inference.py (HiPer0/HiPer). Symbols: tau (text encoder), h (fitted rows).
Axes: K concepts, R rows, T text rows (77), N fitted rows, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, EditsPicture, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.base.variants import value_of, variants_of
from hiperlab.data.batch import Batch
from hiperlab.data.edit import described
from hiperlab.errors import UserError
from hiperlab.formats import hiper as files
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.noise import check_latent, posterior_noise
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_cache import TextCache

log = logging.getLogger(__name__)
INITS = ("source_tail", "target_tail")


def replace_tail(text: Tensor, tail: Tensor) -> Tensor:
    """[tau(text) rows 0 .. 76-N, tail] (R, T, D): the cut is made after the text encoder (the authors' train.py).

    Args:
        text: (R, T, D) states of whole texts.
        tail: (R, N, D).
    """
    return torch.cat([text[:, : text.shape[1] - tail.shape[1]], tail.to(text.dtype)], dim=1)


class HiPer(Method, EditsPicture, Composable, Exportable):
    """N free rows per picture behind the words of any text; every network stays as it is.

    Training reads [tau(source), h]; editing reads [tau(target), 0.8 h]; the unconditional text is left alone.

    Args:
        model: the frozen stack.
        concepts: the pictures with their source texts, edited by writing another text.
        optimizer: parameters -> optimizer.
        seed: of the draws.
        n_hiper: N, 1 to T - 1.
        init: where h starts: "source_tail" (the authors), "target_tail", or a saved `hiper_embeddings_step*.pt`.
        latent: how often the picture's latents are drawn, see `hiperlab.model.noise`.
        scale_source: factor of h behind the source text.
        scale_edit: factor behind any other text; several draw one picture for each, the first is the plain one.
        export_every: optimizer steps between the authors' files; 0 writes the last one only.
    """

    sampling_settings = ("scale_edit",)

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        n_hiper: int,
        init: str,
        latent: str,
        scale_source: float,
        scale_edit: Sequence[float],
        export_every: int,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        length = int(model.tokenizer.model_max_length)
        if not 1 <= n_hiper < length:  # 0 would select all rows ([-0:]), T would ignore the target
            raise UserError(f"method.n_hiper={n_hiper} is out of range. Choose 1 to {length - 1}; the paper uses 5.")
        if not scale_edit:
            raise UserError("method.scale_edit=[] draws nothing. Give one factor or several, e.g. [0.8].")
        self.n_hiper, self.latent, self.export_every = n_hiper, check_latent(latent), export_every
        self.scale_source, self.scale_edit = float(scale_source), float(scale_edit[0])
        self.variants = variants_of("scale", scale_edit)
        self.sources = tuple(concept.source or described(concept.word) for concept in concepts)
        self.encode = TextCache(model)
        self._measured: set[str] = set()
        self.hiper = nn.Parameter(torch.stack([self._start(index, init) for index in range(len(concepts))]))

    def _start(self, index: int, init: str) -> Tensor:
        """h_0 (N, D) of concept `index`: rows of the encoder's output, neither zeros nor noise (train.py)."""
        if init not in INITS:
            rows = files.read(Path(init).expanduser())
            return self._fitting(rows, Path(init))
        targets = self.concepts[index].targets
        if init == "target_tail" and not targets:
            raise UserError("method.init=target_tail needs a target text: give data.targets, or init=source_tail.")
        text = targets[0] if init == "target_tail" else self.sources[index]
        return self._states([text]).keys[0, 0, -self.n_hiper :].detach().float().clone()

    def condition(self, step: Step) -> Conditioning:
        """[tau(text) rows 0 .. 76-N, factor h], one context for all layers: (1, R, T, D); a pooled row stays."""
        texts = self._plain(step)
        states = self._states(texts)
        return states.reading(replace_tail(states.keys[0], self._tail(step, texts))[None])

    def composition_part(self, step: Step) -> Part:
        """The class noun for the placeholder, and factor h (R, N, D) in place of the text's last rows."""
        texts = self._plain(step)
        return Part(texts, tail=self._tail(step, texts))

    def _tail(self, step: Step, texts: Sequence[str]) -> Tensor:
        """Factor h (R, N, D)."""
        edit = value_of(step.variant, self.scale_edit)
        factors = [
            # What is trained on is the source by definition, however its text is worded.
            self.scale_source if step.samples is not None or text == self.sources[place] else edit
            for text, place in zip(texts, step.concept.tolist(), strict=True)
        ]
        rows = self.hiper[step.concept]
        return rows * torch.tensor(factors, device=rows.device, dtype=rows.dtype)[:, None, None]

    def _plain(self, step: Step) -> list[str]:
        """The rows' texts as a person would write them."""
        places = step.concept.tolist()
        return [
            self.concepts[place].with_class_noun(prompt) for prompt, place in zip(step.prompts, places, strict=True)
        ]

    def _states(self, texts: Sequence[str]) -> Conditioning:
        """tau(text) (1, R, T, D), with a warning for words that the fitted rows will replace."""
        for text in texts:
            if text not in self._measured:
                self._measured.add(text)
                tokenizer = self.model.tokenizer
                room = int(tokenizer.model_max_length) - self.n_hiper
                used = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
                if used > room:
                    log.warning(
                        "%r is %d tokens long: the %d fitted rows replace words beyond %d. Shorten it, or lower "
                        "method.n_hiper.", text, used, self.n_hiper, room,
                    )  # fmt: skip
        return self.encode.condition(texts)

    def posterior_noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Unit normals (R, *shape), by default one draw per picture for the whole run (the authors' train.py)."""
        return posterior_noise(self.latent, self.seed, batch.view, batch.sample, shape)

    # ---- the authors' files ------------------------------------------------------------------------------------------

    def exports_at(self, steps: int) -> bool:
        """The authors' cadence: after 1, 101, 201, ... updates, which train.py calls step 0, 100, 200, ..."""
        return self.export_every > 0 and (steps - 1) % self.export_every == 0

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """`hiper_embeddings_step{steps - 1}.pt`, as the authors' code writes and reads it."""
        return [files.write(folder / files.name(steps), self.hiper[index])]

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """A `hiper_embeddings_step*.pt` of the authors."""
        self.hiper[index].copy_(self._fitting(files.read(path), path))

    def _fitting(self, rows: Tensor, path: Path) -> Tensor:
        """The rows themselves.

        Raises:
            UserError: their number or width is not this run's.
        """
        if rows.shape != (self.n_hiper, self.model.width):
            count, width = rows.shape
            raise UserError(
                f"{path.name} holds {count} rows of width {width}, this run ({self.n_hiper}, {self.model.width}). "
                f"Set method.n_hiper={count} and a base model of text width {width}."
            )
        return rows
