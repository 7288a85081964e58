"""AttnDreamBooth (Pang et al. 2024): a word's embedding, then its attention maps, then the identity, in three stages.

Follows the authors' train_attndreambooth.py and bash_script/train_attndreambooth.sh (lyuPang/AttnDreamBooth), whose
settings their README calls the paper's.
Axes: K concepts (always 1 here), n rows of the word, R rows, N tokens, D text width, C latent channels, H, W latent
sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import ChangedWeights
from hiperlab.base.method import Step, Subject
from hiperlab.base.rare_token_method import RareTokenMethod, RareTokenSettings
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.formats import weights as files
from hiperlab.layer.initial_words import token_ids
from hiperlab.loss.attention_regulariser import attention_regulariser
from hiperlab.model.attention_control import Record
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.offsets import Offsets, added, log_cost, parameter_names, zeros
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import Tokens, numbered_slots
from hiperlab.optim.weight_decay import decay_whole_weights

log = logging.getLogger(__name__)
WORD, CROSS, WHOLE = range(3)  # the stages
AUTHORS_ROW = "learned_embeds/learned_embeds_steps_*.bin"  # in the folder that holds their learned_models/


def stage_ends(stages: Sequence[int], steps: int) -> list[int]:
    """The optimizer steps after which each stage ends, the last one at `steps`.

    Args:
        stages: steps of the stages; another total keeps their proportions, rounded up.
        steps: optimizer steps of all stages together.
    """
    total = sum(stages)
    return [-(-steps * done // total) for done in accumulate(stages)]


class AttnDreamBooth(RareTokenMethod):
    """n rows for a new word, offsets of the cross-attention, then of the whole U-Net; prompts say "<cats> cat".

    The stage follows from the sample number, so a resumed run goes on in the right one. Each begins with a fresh
    optimizer state and has its own rate. Trainings can share calls in the first stage; then each has a
    U-Net of its own.

    Args:
        model: the frozen stack.
        concepts: what is personalised; the word starts as the first tokens of its class noun.
        optimizer: parameters -> optimizer; its rate is the first stage's. AdamW's decay acts on whole weights.
        seed: of the draws.
        num_vectors: n, at most as many as the class noun has tokens.
        stages: optimizer steps of the word, the cross-attention and the whole U-Net, see `stage_ends`.
        steps: optimizer steps of all stages together (fit.steps).
        batch_size: samples of an optimizer step (fit.batch_size), over which the regulariser is a sum.
        cross_lr: the second stage's learning rate.
        unet_lr: the third stage's learning rate.
        reg_mean: weight of the attention maps' means in the regulariser, one per stage.
        reg_var: weight of their variances, one per stage.
        export_weights: also write the whole U-Net as diffusers keeps it.
        shared: see `RareTokenSettings`.

    Raises:
        UserError: a setting is out of range, or the class noun has fewer tokens than `num_vectors`.
    """

    fixed_settings = ()  # its rare token is the placeholder, which the artifact keeps
    training_settings = (
        *RareTokenMethod.training_settings,
        *("stages", "steps", "batch_size", "cross_lr", "unet_lr", "reg_mean", "reg_var"),
    )
    why_no_early_stop = "an end in the word's stage would leave out those of the weights"
    published_crop = "random"  # without --center_crop
    published_flip = 0.25

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        num_vectors: int,
        stages: Sequence[int],
        steps: int,
        batch_size: int,
        cross_lr: float,
        unet_lr: float,
        reg_mean: Sequence[float],
        reg_var: Sequence[float],
        export_weights: bool,
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        super().__init__(model, concepts, optimizer, seed, concepts[0].placeholder, **shared)
        for name, values in (("stages", stages), ("reg_mean", reg_mean), ("reg_var", reg_var)):
            if len(values) != 3 or min(values) < 0 or (name == "stages" and not sum(values)):
                raise UserError(f"method.{name}={list(values)}: give three numbers, 0 or more, one per stage.")
        for name, rate in (("cross_lr", cross_lr), ("unet_lr", unet_lr)):
            if not rate > 0:
                raise UserError(f"method.{name}={rate} learns nothing. Choose a number above 0.")
        self.ends, self.batch_size = stage_ends(stages, steps), batch_size
        self.cross_lr, self.unet_lr, self.export_weights = float(cross_lr), float(unet_lr), export_weights
        self.reg_weights = [(float(mean), float(var)) for mean, var in zip(reg_mean, reg_var, strict=True)]
        noun = concepts[0].word
        ids = token_ids(model.tokenizer, [noun])[:, :num_vectors]
        if not 1 <= num_vectors == ids.shape[1]:
            raise UserError(
                f"method.num_vectors={num_vectors}: the rows start as tokens of {noun!r}. Choose 1 to {ids.shape[1]}."
            )
        self.slots = numbered_slots([concepts[0].placeholder], num_vectors)
        vocabulary = model.vocabulary()
        self.vectors = nn.Parameter(vocabulary[ids.to(vocabulary.device)].clone())  # (K, n, D)
        self.unet_offsets = zeros(model.unet, parameter_names(model.unet, "all"))
        count = sum(value.numel() for value in self.unet_offsets.values())
        log_cost(count, "method=custom_diffusion is far smaller.", "method=attn_dreambooth")
        self._seen: tuple[Record, Tensor, Tensor] | None = None
        self._in_use: Optimizer | None = None

    # ---- training ----------------------------------------------------------------------------------------------------

    def stage(self, samples: Tensor) -> int:
        """Which stage global sample numbers (R,) belong to; an optimizer step takes `batch_size` of them.

        Class rows have negative numbers and go with the others.
        """
        step = int(samples[samples >= 0].min()) // self.batch_size
        return WHOLE if step >= self.ends[CROSS] else CROSS if step >= self.ends[WORD] else WORD

    def _offsets_of(self, cross: bool) -> list[nn.Parameter]:
        """The offsets of the cross-attention, or all others."""
        names = {name.replace(".", "/") for name in parameter_names(self.model.unet, "cross")}
        return [value for name, value in self.unet_offsets.items() if (name in names) == cross]

    def param_groups(self) -> list[dict[str, Any]]:
        """The word's rows at the optimizer's rate, the cross-attention as `_enter` says, the other weights."""
        return [
            {"params": [self.vectors]},
            {"params": self._offsets_of(cross=True), "lr": self.cross_lr},
            {"params": self._offsets_of(cross=False), "lr": self.unet_lr},
        ]

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer, its decay on whole weights."""
        frozen = dict(self.model.unet.named_parameters())
        pairs = [(value, frozen[name.replace("/", ".")]) for name, value in self.unet_offsets.items()]
        self._in_use = decay_whole_weights(super().configure_optimizers(), pairs)
        return self._in_use

    def _enter(self, stage: int) -> None:
        """Give the optimizer what a stage has: the cross-attention's rate, in the third stage no earlier state of it.

        The third stage begins where the other weights have no state yet, so that a resumed run does the same.
        """
        if self._in_use is None:
            return
        _, cross, others = self._in_use.param_groups
        cross["lr"] = self.cross_lr if stage == CROSS else self.unet_lr
        if stage == WHOLE and not any(self._in_use.state.get(each) for each in others["params"]):
            for each in cross["params"]:
                self._in_use.state.pop(each, None)

    def condition(self, step: Step) -> Conditioning:
        """The word before the class noun and the weights' offsets (1, R, N, D); in training all but the stage's stays.

        Raises:
            UserError: a training prompt does not name the concept exactly once.
        """
        tokens = self.model.tokenize(self.texts(step), self.slots)
        _, _, slots = tokens.occurrences()
        stage = None if step.samples is None else self.stage(step.samples)
        if stage is not None:
            self._enter(stage)
        vectors = self.vectors[0] if stage in (None, WORD) else self.vectors[0].detach()
        states = self.model.condition_tokens(tokens, vectors[slots][None])
        conditioning = replace(states, offsets=None if stage == WORD else self.offsets(stage))
        if stage is None or not any(self.reg_weights[stage]):
            return conditioning
        record = Record(lambda layer, pixels: layer.cross)
        self._seen = (record, *self._places(tokens, step))
        return conditioning.controlled(record)

    def offsets(self, stage: int | None = None) -> Offsets:
        """The weights' differences by the U-Net's own names; in the second stage the cross-attention's alone."""
        found = added(self.unet_offsets)
        if stage != CROSS:
            return found
        return Offsets({name: found.changes[name] for name in parameter_names(self.model.unet, "cross")})

    def _places(self, tokens: Tokens, step: Step) -> tuple[Tensor, Tensor]:
        """Positions of the word (B, n) and of the class noun's first token (B,) in the B instance rows."""
        assert step.samples is not None, "the regulariser belongs to training"
        instance = tokens.slots[: int((step.samples >= 0).sum())] >= 0
        count = self.vectors.shape[1]
        if wrong := [step.prompts[row] for row, found in enumerate(instance.sum(1).tolist()) if found != count]:
            raise UserError(
                f"prompt {wrong[0]!r} must name {self.concepts[0].placeholder} exactly once: its attention is compared "
                "with the class noun's. Give method.template or other templates."
            )
        places = instance.nonzero()[:, 1].view(-1, count)
        return places, places[:, -1] + 1

    def extra_losses(self, step: Step, z0: Tensor) -> dict[str, Tensor]:
        """Loss "attention" (R,): `attention_regulariser` of each row, times the batch size.

        The authors add up the rows of a batch; rows are averaged here, hence the factor.

        Args:
            step: of the rows that the last `condition` was for.
            z0: clean latents (R', C, H, W), not read.
        """
        if self._seen is None:
            return {}
        assert step.samples is not None, "losses are of training rows"
        (record, word, class_token), self._seen = self._seen, None  # not kept: it holds the step's graph
        maps = [probabilities[: len(word)] for probabilities in record.maps.values()]
        weights = self.reg_weights[self.stage(step.samples)]
        return {"attention": self.batch_size * attention_regulariser(maps, word, class_token, *weights)}

    def on_fit_start(self) -> None:
        """Refuse several processes: in each stage most parameters have no gradient to share."""
        if self.trainer.world_size > 1:
            raise UserError("AttnDreamBooth trains in one process: use trainer.devices=1.")
        super().on_fit_start()

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def frozen_texts(self, step: Step) -> list[str]:
        """The step's R prompts with the class noun alone: the frozen model does not know the word."""
        return self.with_class_nouns(step)

    def composition_part(self, step: Step) -> Part:
        """The texts with the word before the class noun, and its vectors (1, 1, n, D)."""
        return Part(self.texts(step), self.vectors[None])

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The offsets of the U-Net."""
        return ChangedWeights(self.offsets())

    # ---- files: a row as Textual Inversion's, and a U-Net ------------------------------------------------------------

    @torch.no_grad()
    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """`learned_embeds.safetensors` and, with `export_weights`, `unet/`; a pipeline needs both."""
        rows, word = self.vectors[index], self.concepts[index].placeholder
        written = embedding.write_each(folder, word, rows, self.model.widths)
        if self.export_weights:
            unet = self.model.unet
            written.append(files.write_unet(folder, unet, self.offsets().weights(unet)))
        return written

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """A row with the `unet/` beside it, or a `unet/` with the row beside it or where the authors' script puts it.

        Raises:
            UserError: there is no row, or a file is of another base model.
        """
        row, unet = path, path.parent / files.UNET
        if path.parent.name == files.UNET.parent.name:
            row, unet = _row_of(path), path
        vectors = embedding.read_like(row, self.vectors[index], "method.num_vectors={}", self.model.widths)
        found: dict[str, Tensor] = {}  # both files are read before either is taken
        if unet.is_file():
            found = files.differences(files.read(unet), dict(self.model.unet.named_parameters()), unet.name)
        else:
            log.warning("%s holds the word only: pictures are drawn with the unchanged U-Net.", row.name)
        self.vectors[index].copy_(vectors)
        for name, value in self.unet_offsets.items():
            value.copy_(found[name.replace("/", ".")][None] if found else torch.zeros_like(value))


def _row_of(unet: Path) -> Path:
    """The row that belongs to a `unet/diffusion_pytorch_model.safetensors`.

    Raises:
        UserError: there is none, or several of the authors' are.
    """
    beside = [path for name in (embedding.SAFE, "learned_embeds.bin") if (path := unet.parents[1] / name).is_file()]
    # <output_dir>/learned_models/unet_models/checkpoint-500/unet/…
    theirs = sorted(unet.resolve().parents[4].glob(AUTHORS_ROW)) if len(unet.resolve().parents) > 5 else []
    if not beside and len(theirs) != 1:
        raise UserError(
            f"{unet} is half of a concept: put its row beside unet/ as {embedding.SAFE} (found {len(theirs)} rows of "
            "the authors' script)."
        )
    return (beside or theirs)[0]
