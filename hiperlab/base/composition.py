"""Several kept concepts in one picture: each method gives its part, here they are put together.

Axes: L cross-attention layers, R rows (texts), N tokens, K places of learnt vectors, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import torch
from torch import Tensor

from hiperlab.base.capability import Composable, EditsPicture
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.offsets import Offsets
from hiperlab.model.sampler import Sampler, ddim, generate
from hiperlab.model.weight_changes import materialise, sum_changes


class Composition:
    """Draws texts that name several concepts, each kept by a method of its own on one frozen stack.

    Learnt vectors stand at their own placeholders; rare words are written into the text; changes of one weight add up.
    Each method is drawn in its first variant.

    Args:
        methods: one concept each, loaded and on the stack's device.

    Raises:
        UserError: two cannot be told apart, or one cannot be drawn with others.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        assert methods and all(method.model is methods[0].model for method in methods), "one stack"
        assert all(len(method.concepts) == 1 for method in methods), "one concept each"
        self.methods, self.model = tuple(methods), methods[0].model
        self.subjects = tuple(method.concepts[0] for method in methods)
        self.contributors: list[Composable] = []
        for method in self.methods:
            method.eval()
            if not isinstance(method, Composable):
                raise UserError(
                    f"{type(method).__name__} ({method.concepts[0].name}) cannot be drawn with others: what it learns "
                    "is one whole text or picture. Draw it by itself with artifact=."
                )
            self.contributors.append(method)
        _check_apart(self.subjects)
        ends = [method for method in methods if isinstance(method, EditsPicture)]
        if len(ends) > 1:
            names = " and ".join(method.concepts[0].name for method in ends)
            raise UserError(f"{names} both replace the last rows of the text: draw one edit at a time.")
        self.time_dependent = any(method.time_dependent for method in methods)
        self.reads_latents = any(method.reads_latents for method in methods)
        self._unet: Offsets | None = None
        self._text: dict[str, Tensor] = {}

    def shown(self, text: str) -> list[Subject]:
        """The concepts that a text asks for: those it names, and an edit's picture."""
        pairs = zip(self.methods, self.subjects, strict=True)
        return [subject for method, subject in pairs if isinstance(method, EditsPicture) or subject.placeholder in text]

    def materialise_weights(self) -> None:
        """Add up what the methods change in the weights; `sample` does so once for all its pictures."""
        changed = [each.changed_weights(each.variants[0]) for each in self.contributors]
        unet, text = (sum_changes(each) for each in zip(*changed, strict=True))
        self._unet = None if unet is None else materialise(unet, self.model.unet)
        self._text = {} if text is None else text.weights(self.model.text_module)

    def condition(self, step: Step) -> Conditioning:
        """All parts in one text (L, R, N, D) and all changes of the U-Net, as `materialise_weights` left them."""
        parts, slots, first = [], {}, [0]
        for method, subject in zip(self.contributors, self.subjects, strict=True):
            first_concept = torch.zeros_like(step.timestep)
            part = method.composition_part(replace(step, concept=first_concept, variant=method.variants[0]))
            step = replace(step, prompts=part.prompts)
            count = 0 if part.vectors is None else part.vectors.shape[2]
            if count:
                slots[subject.placeholder] = list(range(first[-1], first[-1] + count))
            first.append(first[-1] + count)
            parts.append(part)
        found = self.model.with_text_weights(self._text, lambda: self._states(step.prompts, parts, slots, first))
        for part in parts:
            if part.tail is not None:
                values = None if found.values is None else _with_tail(found.values, part.tail)
                found = replace(found, keys=_with_tail(found.keys, part.tail), values=values)
        return replace(found, offsets=self._unet)

    def _states(
        self, prompts: Sequence[str], parts: Sequence[Part], slots: dict[str, list[int]], first: Sequence[int]
    ) -> Conditioning:
        """What the U-Net reads of the texts (L, R, N, D); part i owns the slots from first[i] on."""
        model = self.model
        tokens = model.tokenize(prompts, slots)
        rows, positions, slot = tokens.occurrences()
        if not len(rows):
            return model.condition_tokens(tokens)
        owned = [torch.nonzero((slot >= low) & (slot < high))[:, 0] for low, high in pairwise(first)]

        def placed(given: Sequence[Tensor | None]) -> Tensor:
            """(L, K, D): each part's vectors (L or 1, R, V, D) at its occurrences."""
            layers = max(each.shape[0] for each in given if each is not None)
            vectors = model.alpha_bar.new_zeros(layers, len(rows), model.width)
            for each, mine, low in zip(given, owned, first, strict=False):
                if each is not None:
                    every = each.expand(layers, len(prompts), -1, -1)
                    vectors = vectors.index_copy(1, mine, every[:, rows[mine], slot[mine] - low].to(vectors))
            return vectors

        vectors, pooled = placed([part.vectors for part in parts]), None
        if any(part.pooled_vectors is not None for part in parts):
            pooled = placed([part.vectors if part.pooled_vectors is None else part.pooled_vectors for part in parts])
        if all(part.in_values is None for part in parts):
            return model.condition_tokens(tokens, vectors, pooled)
        assert not model.pools, "no method that runs on SDXL has values of its own"
        hidden = model.hidden_states(tokens, vectors)
        keys = values = model.normalise_text(hidden)
        layer = torch.arange(len(values), device=rows.device)[:, None]
        for part, mine in zip(parts, owned, strict=True):
            if part.in_values is not None:
                changed = part.in_values(hidden[:, rows[mine], positions[mine]], rows[mine])
                index = (layer, rows[mine][None], positions[mine][None])
                values = values.index_put(index, model.normalise_text(changed))
        return Conditioning(keys, values)

    def negative_condition(self, text: str | None) -> Conditioning:
        """What guidance's unconditional branch reads (1, 1, N, D), through the changed text encoder."""
        return self.model.with_text_weights(self._text, lambda: self.model.condition_negative(text))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        sampler: Sampler | None = None,
        negative: str | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Draw one picture (3, H, W) in [0, 1] per (prompt, seed), on the CPU; see `Method.sample`."""
        self.materialise_weights()

        def condition(rows: list[int], t: Tensor, latents: Tensor | None = None) -> Conditioning:
            when = t.expand(len(rows))
            return self.condition(Step([prompts[row] for row in rows], torch.zeros_like(when), when, latents))

        try:
            return generate(
                self.model,
                condition,
                keys=list(prompts),
                seeds=seeds,
                steps=steps,
                guidance=guidance,
                sampler=sampler or ddim(steps, guidance),
                negative=self.negative_condition(negative),
                batch_size=batch_size,
                time_dependent=self.time_dependent,
                reads_latents=self.reads_latents,
            )
        finally:
            self._unet, self._text = None, {}


def _with_tail(states: Tensor, tail: Tensor) -> Tensor:
    """States (L, R, N, D) whose last rows are `tail` (R, n, D)."""
    kept = states[:, :, : states.shape[2] - tail.shape[1]]
    return torch.cat([kept, tail.to(states).expand(len(states), -1, -1, -1)], dim=2)


def _check_apart(subjects: Sequence[Subject]) -> None:
    """Refuse concepts that a text or a table could not tell apart.

    Raises:
        UserError: equal names, or a placeholder that is another one or part of it.
    """
    for one, two in combinations(subjects, 2):
        if one.name == two.name:
            raise UserError(
                f"two artifacts are of a concept {one.name!r}: give one of them another name when training."
            )
        if one.placeholder in two.placeholder or two.placeholder in one.placeholder:
            raise UserError(
                f"{one.name} and {two.name} have the placeholders {one.placeholder} and {two.placeholder}, which a "
                "text cannot tell apart: train one of them with another data.placeholder."
            )
