"""NeTI, a neural space-time representation (Alaluf et al. 2023): the word's embedding depends on timestep and layer.

File names below are the authors' (NeuralTextualInversion/NeTI). Symbols: v_base (embedding of the word, read by the
text encoder), v_pass (textual bypass, added behind it; Alaluf et al. 2023, figs. 5 and 6), sg (target norm).
Axes: K concepts, L layers, R rows, P occurrences of placeholders in the batch, N tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import neti as files
from hiperlab.layer.mapper import HIDDEN, Mapper
from hiperlab.layer.nested_dropout import draw_keep
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import numbered_slots

BYPASS_SCALE = 0.2  # models/neti_clip_text_encoder.py: a constant of the authors' code


def rescale(output: Tensor, norm: Tensor, mode: str) -> Tensor:
    """Give the mapper's output the norm of the super category's embedding (models/neti_mapper.py, get_output).

    Args:
        output: o (..., O).
        norm: sg, broadcastable to (...,).
        mode: "joint" scales the whole vector, both halves together, as the authors' code does; "base" scales v_base
            alone, as the paper's text describes it; "none" leaves it as it is.

    Returns:
        (..., O).
    """
    if mode == "none":
        return output
    if mode == "joint":
        return norm[..., None] * F.normalize(output, dim=-1)
    base, bypass = output.chunk(2, dim=-1)
    return torch.cat([norm[..., None] * F.normalize(base, dim=-1), bypass], dim=-1)


def add_bypass(hidden: Tensor, v_pass: Tensor) -> Tensor:
    """H*[p] = H[p] + 0.2 ||H[p]|| v_pass / ||v_pass||, on states before the final norm (..., D), same shape.

    As NeTICLIPTextTransformer.forward in models/neti_clip_text_encoder.py.
    """
    scale = BYPASS_SCALE * hidden.norm(dim=-1, keepdim=True)
    return hidden + scale * v_pass / v_pass.norm(dim=-1, keepdim=True)


class NeTI(Method, Composable, Exportable):
    """A small mapper M(t, l) per concept feeds the text encoder and, past it, the attention values.

    Args:
        model: the frozen stack.
        concepts: what is personalised; `word` lends its norm.
        optimizer: parameters -> optimizer.
        seed: of initialisation and draws.
        positional_encoding: Fourier features of (t, l); False for the authors' ablation.
        sigma_t: deviation of the time frequencies (0.03).
        sigma_l: deviation of the layer frequencies (2.0).
        num_time_anchors: time anchors of the first layer (10).
        bypass: whether the mapper also emits the textual bypass.
        rescale_mode: "joint" (authors' code), "base" (paper's text) or "none".
        nested_dropout: probability that a call of the mapper is cut (0.5); 0 turns it off.
        coin_rows: rows that share the coin of nested dropout (2: the authors' micro batch).
        truncation: units kept when sampling, 0 .. 128 or None for all; a list samples one picture for each.
    """

    why_not_sdxl = "its authors define norm, bypass and layers for one text encoder and sixteen layers"
    time_dependent = True
    sampling_settings = ("truncation",)
    variant_settings = ("truncation",)
    target_norm: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        positional_encoding: bool,
        sigma_t: float,
        sigma_l: float,
        num_time_anchors: int,
        bypass: bool,
        rescale_mode: str,
        nested_dropout: float,
        coin_rows: int,
        truncation: int | Sequence[int | None] | None,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        if rescale_mode not in ("joint", "base", "none"):
            raise UserError(f"method.rescale_mode={rescale_mode!r} is unknown. Choose joint, base or none.")
        if not 0 <= nested_dropout <= 1:
            raise UserError(f"method.nested_dropout={nested_dropout} is no probability: choose 0 to 1 (0.5).")
        self.bypass, self.nested_dropout, self.coin_rows = bypass, nested_dropout, coin_rows
        self.rescale_mode = rescale_mode if bypass or rescale_mode != "base" else "joint"  # one half: the same thing
        self.variants = _variants(truncation)
        self.mapper = Mapper(
            len(concepts),
            2 * model.width if bypass else model.width,
            num_layers=model.layers,
            num_timesteps=model.num_timesteps,
            seed=seed,
            positional_encoding=positional_encoding,
            sigma_t=sigma_t,
            sigma_l=sigma_l,
            num_time_anchors=num_time_anchors,
        )
        norms = torch.stack([model.word_embedding(concept.word).norm() for concept in concepts])
        self.register_buffer("target_norm", norms)  # (K,) sg; kept with the concept
        self.slots = numbered_slots([concept.placeholder for concept in concepts])
        self._sigmas = {"sigma_t": float(sigma_t), "sigma_l": float(sigma_l)}
        self._num_time_anchors = num_time_anchors

    # ---- conditioning ----------------------------------------------------------------------------------------------

    def condition(self, step: Step) -> Conditioning:
        """Keys from v_base, values with the bypass on top: (L, R, N, D) each."""
        keep = None
        if step.samples is not None and self.nested_dropout > 0:
            keep = draw_keep(
                self.seed, step.samples, self.model.layers, HIDDEN, self.nested_dropout, self.coin_rows
            ).to(self.device)
        elif step.samples is None:
            keep = self._cut(step)
        return self.encode(step.prompts, step.timestep, keep)

    def _cut(self, step: Step) -> Tensor | None:
        """Hidden units (L, R) kept when sampling, or None for all."""
        cut = _truncation(step.variant)
        return None if cut is None else torch.full((self.model.layers, len(step.prompts)), cut, device=self.device)

    def composition_part(self, step: Step) -> Part:
        """v_base (L, R, 1, D) for the word; values with the bypass on top."""
        found = self.vectors(step.timestep, torch.zeros_like(step.timestep), self._cut(step))  # (L, R, D or 2D)
        base, bypass = found.split(self.model.width, dim=-1) if self.bypass else (found, None)

        def in_values(hidden: Tensor, rows: Tensor) -> Tensor:
            assert bypass is not None
            return add_bypass(hidden, bypass[:, rows].to(hidden.dtype))

        return Part(step.prompts, base[:, :, None], in_values if self.bypass else None)

    def encode(self, prompts: Sequence[str], timestep: Tensor, keep: Tensor | None) -> Conditioning:
        """From prompts to the keys and values (L, R, N, D) of all layers, in one pass of the text encoder.

        The authors make one pass per layer (training/coach.py when training, prompt_manager.py when sampling).

        Args:
            prompts: R texts.
            timestep: (R,) int64 in [0, 1000).
            keep: (L, R) hidden units to keep, or None.
        """
        tokens = self.model.tokenize(prompts, self.slots)
        rows, positions, concept = tokens.occurrences()
        vectors = self.vectors(timestep[rows], concept, None if keep is None else keep[:, rows])
        width = self.model.width
        hidden = self.model.hidden_states(tokens, vectors[..., :width])
        keys = self.model.normalise_text(hidden)
        if not self.bypass:
            return Conditioning(keys)
        # Only the placeholders' rows differ between keys and values, so only they are normalised again.
        changed = add_bypass(hidden[:, rows, positions], vectors[..., width:].to(hidden.dtype))
        layer = torch.arange(len(hidden), device=hidden.device)[:, None]
        values = keys.index_put((layer, rows[None], positions[None]), self.model.normalise_text(changed))
        return Conditioning(keys, values)

    def vectors(self, t: Tensor, concept: Tensor, keep: Tensor | None) -> Tensor:
        """[v_base; v_pass] for P occurrences in all layers, (L, P, 2D), or (L, P, D) without a bypass.

        In float32 without autocast: the phases of models/positional_encoding.py reach about 100 rad, which half
        precision rounds.

        Args:
            t: (P,) timesteps in [0, 1000).
            concept: (P,) int64, whose mapper.
            keep: (L, P) or None.
        """
        num_layers, count = self.model.layers, len(t)
        layers = torch.arange(num_layers, device=t.device)[:, None].expand(-1, count)
        times = t.expand(num_layers, -1)
        out = self.target_norm.new_zeros(num_layers, count, self.mapper.outputs)
        with torch.autocast(t.device.type, enabled=False):
            for index in concept.unique().tolist():
                rows = torch.nonzero(concept == index)[:, 0]
                cut = None if keep is None else keep[:, rows].flatten()
                raw = self.mapper(times[:, rows].flatten(), layers[:, rows].flatten(), index, cut)
                out = out.index_copy(1, rows, raw.unflatten(0, (num_layers, -1)))
            return rescale(out, self.target_norm[concept], self.rescale_mode)

    # ---- the authors' files ------------------------------------------------------------------------------------------

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """The authors' `mapper-final.pt` and `learned_embeds-final.bin`, loadable by their unmodified code.

        Their format cannot say `rescale_mode=base`, so nothing is written then.
        """
        if self.rescale_mode == "base":
            return []
        subject, artifact = self.concepts[index], self.artifact(index)
        state = {name.removeprefix("mapper."): value for name, value in artifact.items() if name != "target_norm"}
        w = state.pop("w", None)
        checkpoint = files.Checkpoint(state, w, self._authors_cfg(index))
        row = self.model.word_embedding(subject.word)
        return files.write(folder, "final", checkpoint, subject.placeholder, row)

    def _authors_cfg(self, index: int) -> dict[str, Any]:
        subject = self.concepts[index]
        norm = float(self.target_norm[index]) if self.rescale_mode == "joint" else None
        return {
            "log": {"exp_name": subject.name},
            "data": {
                "train_data_dir": "data",
                "placeholder_token": subject.placeholder,
                "super_category_token": subject.word,
            },
            "model": {
                "pretrained_model_name_or_path": self.model.name,
                "use_nested_dropout": self.nested_dropout > 0,
                "nested_dropout_prob": float(self.nested_dropout),
                "normalize_mapper_output": norm is not None,
                "target_norm": norm,
                "use_positional_encoding": self.mapper.positional_encoding,
                "pe_sigmas": dict(self._sigmas),
                "num_pe_time_anchors": self._num_time_anchors,
                "output_bypass": self.bypass,
            },
            "eval": {},
            "optim": {},
        }

    def load_foreign(self, index: int, path: Path) -> None:
        """A `mapper-*.pt` of the authors; its settings must be this run's."""
        checkpoint = files.read(path)
        theirs = checkpoint.cfg.get("model", {})
        norm = theirs.get("target_norm")
        wanted = {
            "positional_encoding": bool(theirs.get("use_positional_encoding", True)),
            "bypass": bool(theirs.get("output_bypass", True)),
            "rescale_mode": "none" if norm is None else "joint",
        }
        mine = {
            "positional_encoding": self.mapper.positional_encoding,
            "bypass": self.bypass,
            "rescale_mode": self.rescale_mode,
        }
        if (anchors := theirs.get("num_pe_time_anchors")) and wanted["positional_encoding"]:
            wanted["num_time_anchors"], mine["num_time_anchors"] = anchors, self._num_time_anchors
        if mine != wanted:
            changes = " ".join(f"method.{key}={value}" for key, value in wanted.items() if mine[key] != value)
            raise UserError(f"{path.name} was trained with other settings. Add: {changes}")
        tensors = {f"mapper.{name}": value for name, value in checkpoint.state.items()}
        if checkpoint.w is not None:
            tensors["mapper.w"] = checkpoint.w
        tensors["target_norm"] = self.target_norm[index].cpu() if norm is None else torch.tensor(float(norm))
        try:
            self.load_artifact(index, tensors)
        except UserError as error:
            raise UserError(f"{path.name} is another mapper: {error}") from error


def _variants(truncation: int | Sequence[int | None] | None) -> tuple[str, ...]:
    values = [truncation] if truncation is None or isinstance(truncation, int) else list(truncation)
    if not values:
        raise UserError("method.truncation=[] draws nothing. Give one value or several, e.g. [null,32], or null.")
    for value in values:
        if value is not None and not 0 <= value <= HIDDEN:
            raise UserError(f"method.truncation={value} is out of range. Choose 0 to {HIDDEN}, or null for no cut.")
    return tuple("" if value is None else f"truncation={value}" for value in values)


def _truncation(variant: str) -> int | None:
    return int(variant.removeprefix("truncation=")) if variant else None
