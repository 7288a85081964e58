"""Targets that read the source text's attention maps, each those that the source text has in the target's own latents.

As `use_p2p` of EDICT's edict_functions.py (salesforce/EDICT), after bloc97/CrossAttentionControl: there is no source
row that all targets follow, but one beside each of them.
Axes: n targets, R rows of a call, h heads, S image positions, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from hiperlab.edit.attention_maps import CrossEdit
from hiperlab.edit.edits import Edits, Rows
from hiperlab.model.attention_control import Layer, Record


def block_alignment(source: Sequence[int], target: Sequence[int]) -> CrossEdit:
    """Target tokens take the map of the source token that difflib matches them with; the others keep their own.

    Matched are equal tokens, and blocks that replace others of the same length (init_attention_edit).

    Args:
        source: N token ids, padding included.
        target: the same of the target.
    """
    mapper, aligned = torch.zeros(len(target), dtype=torch.long), torch.zeros(len(target))
    for kind, from_start, from_end, to_start, to_end in SequenceMatcher(None, source, target).get_opcodes():
        if kind == "equal" or (kind == "replace" and from_end - from_start == to_end - to_start):
            mapper[to_start:to_end] = torch.arange(from_start, from_end)
            aligned[to_start:to_end] = 1
    return CrossEdit(torch.ones(1, len(target)), mapper, aligned)


class OwnSources(Record):
    """One call of n targets: its last n rows take over maps of the n rows before, which read the source text.

    In every layer: self-attention maps whole, cross-attention maps by token. It changes maps in place, so it is for
    drawing only.

    Args:
        edits: how each target's tokens follow its source's (n).
        wanted: (layer, pixels) -> whether to keep the map that came out.
    """

    def __init__(self, edits: Sequence[CrossEdit], wanted: Callable[[Layer, int], bool]) -> None:
        super().__init__(wanted)
        self.edits = edits

    def wants(self, layer: Layer, pixels: int) -> bool:
        """Every layer."""
        return True

    def __call__(self, layer: Layer, probabilities: Tensor) -> Tensor:
        """The map `probabilities` (R, h, S, N) with the last n rows changed."""
        n = len(self.edits)
        sources, targets = probabilities[-2 * n : -n], probabilities[-n:]
        if layer.cross:
            for number, edit in enumerate(self.edits):
                targets[number] = edit.to(probabilities)(0, sources[number], targets[number])
        else:
            targets[:] = sources
        return super().__call__(layer, probabilities) if self.wanted(layer, probabilities.shape[2]) else probabilities


class OwnSourceEdits(Edits):
    """The controls of a drawing whose source and targets are asked in calls of their own.

    Args:
        rows: the source and its targets, of which only their number counts.
        pixels: image positions of the cross-attention maps that are added up.
        stores: whether they are.
        taken: how each target's tokens follow its source's (n); empty where no maps are taken over.
    """

    def __init__(self, rows: Rows, pixels: int, stores: bool, taken: Sequence[CrossEdit]) -> None:
        super().__init__(rows, pixels, stores)
        self.taken = taken

    def control(self) -> Record | None:
        """Of one call of the targets, which the rows of their sources precede where maps are taken over."""
        if self.taken:
            return OwnSources(self.taken, self.is_stored)
        return Record(self.is_stored) if self.stores else None
