"""E4T (Gal et al. 2023, Encoder-based Domain Tuning): an encoder and weight offsets of a domain, tuned on one picture.

We follow the public reimplementation mkshing/e4t-diffusion, the only code there is; file names below are its own.
Where the paper differs, its form is an option. Symbols: e_c (embedding of the class word), E (the encoder's output),
w (the word's vector), s (`embed_scale`).
Axes: K concepts (always 1 here), R rows, N tokens, D text width, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab import draws, files
from hiperlab.base import artifact
from hiperlab.base.capability import ChangedWeights, Composable, Exportable, ReadsPicture
from hiperlab.base.method import Method, Step, Subject
from hiperlab.data.batch import Batch
from hiperlab.data.images import ImageProblem, read_image, to_pixels
from hiperlab.errors import UserError, near
from hiperlab.formats import e4t as formats
from hiperlab.layer.image_encoder import LayerHead, PatchHead, pool
from hiperlab.layer.weight_offset import WeightOffset
from hiperlab.model import vision_loader as towers
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.offsets import Added, Change, Offsets, log_cost, parameter_names, zeros
from hiperlab.model.shared_calls import Calls, within
from hiperlab.model.stack import FrozenStack
from hiperlab.model.state import misfits
from hiperlab.model.text_cache import TextCache
from hiperlab.model.unet_encoder import encoder_features, map_channels
from hiperlab.model.vision_tower import Seen, SeenCache, VisionTower
from hiperlab.model.weight_changes import Multiplied, Sequential, materialise
from hiperlab.optim.weight_decay import decay_whole_weights

log = logging.getLogger(__name__)
CHOICES = {
    "phase": ("pretrain", "tune"),
    "encoder": ("patch_tokens", "cls_layers"),
    "encoder_unet": ("offset", "base"),
    "reg_target": ("embedding", "offset"),
    "tune": ("all", "offsets", "encoder_only"),
}
DOMAIN = ("weight_offsets.", "head.", "class_word")  # what a domain hands on to its concepts


class E4T(Method, ReadsPicture, Composable, Exportable):
    """A word that is e_c + s E(picture, U-Net's view of z_t), in a U-Net whose q, k, v weights are W (1 + delta).

    The encoder runs at every step on the picture and the noisy latents, so a word differs by row and by step. Both
    U-Net passes of a step share one set of changed weights. Tuning fits the whole U-Net as offsets besides. No call is
    shared with other trainings (`why_alone`): each has a U-Net of its own.

    Args:
        model: the frozen stack.
        concepts: pre-training: the domain, whose pictures show many subjects. Tuning: one subject.
        optimizer: parameters -> optimizer; AdamW's decay acts on whole weights, as in the reimplementation.
        seed: of initialisation and draws.
        phase: "pretrain" a domain (pretrain_e4t.py) or "tune" on one picture (tuning_e4t.py).
        domain: what to start from: an artifact of a pre-training, a folder of the reimplementation, "none", or None:
            tuning then takes `e4t/<class noun>.safetensors` in the model's own folder, where there is one.
        tower: folder or hub id of the picture tower; None takes the one of `domain`, else the one in the model's own
            folder (`image_encoder`), else OpenCLIP's ViT-H-14.
        model_folder: the model's folder or hub id, where a tower may lie.
        encoder: "patch_tokens" (e4t/encoder.py, E4TEncoder) or "cls_layers" (the paper's; there E4TEncoderLegacy).
        encoder_unet: whether the encoder reads the U-Net with its "offset" weights or as "base" (frozen).
        embed_scale: s.
        reg_lambda: weight of the penalty, a sum over the whole batch.
        reg_target: whether the penalty is on the whole "embedding" w or on the "offset" s E alone.
        offsets_init: "linear" (the reimplementation, delta is not 0) or "zero".
        tune: what tuning fits: "all" (encoder, offsets and the whole U-Net), "offsets" (encoder and offsets) or
            "encoder_only". Pre-training fits encoder and offsets.
        batch_size: samples of an optimizer step (fit.batch_size).
        export_files: also write the reimplementation's files, the picture tower included.
    """

    stacks_concepts = False  # rows of one U-Net call share its weights
    why_not_sdxl = "its authors define word, heads and weight offsets for one text encoder"
    why_alone = "the weights of its U-Net change throughout, so that no other training can use its passes"
    time_dependent = True
    reads_latents = True
    fixed_settings = ("encoder", "encoder_unet", "embed_scale")
    published_crop = "random"  # in pre-training; tuning cuts once for the whole run, here in the middle

    class_word: Tensor
    picture: Tensor
    tower_fingerprint: Tensor

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        phase: str,
        domain: str | None,
        tower: str | None,
        model_folder: str | None,
        encoder: str,
        encoder_unet: str,
        embed_scale: float,
        reg_lambda: float,
        reg_target: str,
        offsets_init: str,
        tune: str,
        batch_size: int,
        export_files: bool,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        given = {
            "phase": phase, "encoder": encoder, "encoder_unet": encoder_unet, "reg_target": reg_target, "tune": tune,
        }  # fmt: skip
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise UserError(f"method.{name}={value!r} is unknown.{near(str(value), CHOICES[name])}")
        self.phase, self.encoder, self.encoder_unet, self.tune = phase, encoder, encoder_unet, tune
        self.embed_scale, self.reg_lambda, self.reg_target = float(embed_scale), float(reg_lambda), reg_target
        self.batch_size, self.export_files = batch_size, export_files
        self.one_picture = phase == "tune"
        self.domain_word = concepts[0].word
        self.plain_text = TextCache(model)
        if domain is None and phase == "tune":
            domain = _domain_beside(model_folder, concepts[0].word)
        folder = files.expand(domain) if domain and domain != "none" else None
        foreign = formats.read(folder) if folder and folder.is_dir() else None
        self.see = SeenCache(_tower(model, tower, model_folder, foreign))
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation, as published, from the run's seed
            torch.manual_seed(int(draws.integers(seed, "e4t", [0], 2**31)))
            self.weight_offsets = nn.ModuleDict()
            for name in _projections(model.unet):
                outputs, inputs = model.unet.get_parameter(f"{name}.weight").shape
                self.weight_offsets[name.replace(".", "/")] = WeightOffset(inputs, outputs, offsets_init)
            self.head = self._new_head()
        whole = phase == "tune" and tune == "all"
        self.unet_offsets = zeros(model.unet, parameter_names(model.unet, "all") if whole else [])
        self.register_buffer("class_word", model.word_embedding(concepts[0].word))  # (D,) e_c
        self.register_buffer("picture", torch.zeros(3, model.size, model.size))  # what sampling's encoder sees
        self.register_buffer("tower_fingerprint", self.see.tower.fingerprint())
        if phase == "tune" and tune == "encoder_only":
            self.weight_offsets.requires_grad_(False)
        if whole:
            count = sum(value.numel() for value in self.unet_offsets.values())
            log_cost(count, "tune=offsets is far smaller.", "method.tune=all")
        self._start(folder, foreign)
        self._words: Tensor | None = None
        self._own_seen: tuple[Tensor, int, Seen] | None = None
        self._sampling = False
        self._kept: Offsets | None = None

    def _new_head(self) -> nn.Module:
        channels, ends = map_channels(self.model.unet)
        tower = self.see.tower
        if self.encoder == "patch_tokens":
            return PatchHead(self.model.width, tower.width, 1 + tower.patches // 2, sum(channels))
        if tower.layers < 2:
            raise UserError(f"method.encoder=cls_layers reads every 2nd layer, the tower has {tower.layers}.")
        return LayerHead(self.model.width, tower.width, sum(channels[end] for end in ends))

    # ---- where it starts ---------------------------------------------------------------------------------------------

    def _start(self, folder: Path | None, foreign: formats.Found | None) -> None:
        """Take over a pre-trained domain."""
        if folder is None:
            if self.phase == "tune" and self.model.trained:
                log.warning("there is no pre-trained domain: encoder and offsets start untrained. Give method.domain=…")
            return
        if foreign is not None:
            self._take(foreign, folder)
            return
        found = artifact.read(folder)
        mine = f"{type(self).__module__}.{type(self).__qualname__}"
        if found.settings.get("_target_", mine) != mine or found.settings.get("phase") != "pretrain":
            raise UserError(f"method.domain={folder} is no pre-trained domain. Give the artifact of phase=pretrain.")
        self.model.base.check(found.base, str(folder))
        for name in ("encoder", "encoder_unet", "embed_scale"):
            if (learnt := found.settings.get(name, getattr(self, name))) != getattr(self, name):
                raise UserError(f"method.domain={folder} was trained with {name}={learnt}: set method.{name} to it.")
        self._check_tower(found.tensors, f"method.domain={folder}")
        state = {name: value for name, value in found.tensors.items() if name.startswith(DOMAIN)}
        self._fill(state, f"method.domain={folder}")
        self._take_word(found.subject.word)

    @torch.no_grad()
    def _take(self, found: formats.Found, folder: Path) -> None:
        """Put a checkpoint of the reimplementation in place; its tower is already there."""
        if found.kind != self.encoder:
            raise UserError(f"{folder} has the {found.kind} encoder: set method.encoder={found.kind}.")
        if (scale := found.config.get("domain_embed_scale", self.embed_scale)) != self.embed_scale:
            raise UserError(f"{folder} was trained with s={scale}: set method.embed_scale={scale}.")
        state = {f"head.{name}": value for name, value in found.head.items()}
        for name, value in found.offsets.items():
            projection, part = re.fullmatch(r"(.+\.to_[qkv])\.(.+)", name).groups()  # type: ignore[union-attr]
            state[f"weight_offsets.{projection.replace('.', '/')}.{part}"] = value
        if word := found.config.get("domain_class_token"):
            state["class_word"] = self.model.word_embedding(word)
            self._take_word(word)
        frozen = dict(self.model.unet.named_parameters())
        if found.unet is not None:
            self._check_unet(frozen, found.unet, folder / formats.UNET)
        self._fill(state, str(folder))
        if found.unet is not None:  # kept as its difference from the frozen one
            for name, offset in self.unet_offsets.items():
                key = name.replace("/", ".")
                offset.copy_((found.unet[key].to(offset) - frozen[key].to(offset))[None])

    def _check_unet(self, frozen: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
        if wrong := misfits(frozen, weights):
            raise UserError(f"{path} is another U-Net than {self.model.name}'s: {wrong[0]} differs.")
        if not self.unet_offsets:
            raise UserError(f"{path} changes the whole U-Net: set method.phase=tune method.tune=all.")

    @torch.no_grad()
    def _fill(self, state: dict[str, Tensor], what: str) -> None:
        own = {name: value for name, value in self.state_dict().items() if name.startswith(DOMAIN)}
        state = {"class_word": own["class_word"], **state}
        if wrong := misfits(own, state):
            raise UserError(f"{what} does not fit {self.model.name} and its picture tower: {wrong[0]} differs.")
        for name, value in own.items():
            value.copy_(state[name])

    def _check_tower(self, tensors: dict[str, Tensor], what: str) -> None:
        theirs = tensors.get("tower_fingerprint")
        mine = self.see.tower.fingerprint()
        if theirs is not None and not torch.allclose(theirs.float(), mine, rtol=1e-3, atol=0):
            raise UserError(f"{what} was trained with another picture tower: name it as method.tower.")

    def _take_word(self, word: str) -> None:
        self.domain_word = word
        if word != self.concepts[0].word:
            log.warning("the domain's class word is %r, the concept's %r: %r is the word that is changed.",
                        word, self.concepts[0].word, word)  # fmt: skip

    # ---- one step ----------------------------------------------------------------------------------------------------

    def set_reference(self, index: int, picture: Tensor) -> None:
        """Keep the picture (3, H, W) in [-1, 1] for the encoder: in tuning always, else where no other is given."""
        self.picture = picture.to(self.picture)

    def condition(self, step: Step) -> Conditioning:
        """The vector w stands for the word in every layer, with the changed weights: (1, R, N, D)."""
        assert step.latents is not None, "E4T reads z_t: its conditioning cannot be worked out from text alone"
        changes = self.changes()
        words, offset = self.words(step.latents, step.timestep, self._seen(step), changes)
        if step.samples is not None:
            self._words = words if self.reg_target == "embedding" else offset
        tokens = self.model.tokenize(step.prompts, {self.concepts[0].placeholder: [0]})
        rows, _, _ = tokens.occurrences()
        states = self.model.hidden_states(tokens, words[rows][None])
        return Conditioning(self.model.normalise_text(states), offsets=changes)

    def composition_part(self, step: Step) -> Part:
        """The word's vectors w (1, R, 1, D); the encoder reads the U-Net with E4T's changes only, as in training."""
        assert step.latents is not None, "E4T reads z_t"
        words, _ = self.words(step.latents, step.timestep, self._seen(step), self.changes())
        return Part(step.prompts, words[None, :, None])

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The weight offsets and, where the whole U-Net is tuned, its own, worked out."""
        return ChangedWeights(self.changes())

    def words(self, latents: Tensor, timestep: Tensor, seen: Seen, changes: Offsets) -> tuple[Tensor, Tensor]:
        """Both w = e_c + s E and s E, (R, D) each (pretrain_e4t.py, main).

        Args:
            latents: z_t (R, C, H, W).
            timestep: (R,) int64 in [0, 1000).
            seen: what the tower makes of the R pictures.
            changes: of the U-Net, already worked out.
        """
        unet, empty = self.model.unet, self.plain_text([""])
        states = empty.expand(len(latents), -1, -1)
        if self.encoder_unet == "base":
            with torch.no_grad():
                maps = encoder_features(unet, latents, timestep, states, {})
        else:
            maps = encoder_features(unet, latents, timestep, states, changes.weights(unet))
        dtype = self.class_word.dtype
        maps = tuple(each.to(dtype) for each in maps)  # before their means: a half-precision U-Net's would be rounded
        if self.encoder == "cls_layers":
            features = pool([maps[end] for end in map_channels(unet)[1]])
            found = self.head(seen.classes.to(dtype), features)
        else:
            found = self.head(seen.pooled.to(dtype), seen.tokens.to(dtype), pool(maps))
        offset = self.embed_scale * found
        return self.class_word + offset, offset

    def changes(self) -> Offsets:
        """Every changed U-Net weight, worked out: both passes of a step, and all steps of a picture, share them."""
        if self._sampling and self._kept is not None:
            return self._kept
        found: dict[str, Change] = {
            name.replace("/", "."): Added(value[0]) for name, value in self.unet_offsets.items()
        }
        for name, offset in self.weight_offsets.items():
            key, factor = f"{name.replace('/', '.')}.weight", Multiplied(*offset())
            found[key] = Sequential((found[key], factor)) if key in found else factor
        made = materialise(Offsets(found), self.model.unet)
        self._kept = made if self._sampling else None
        return made

    def _seen(self, step: Step) -> Seen:
        """What the tower makes of each row's picture: in tuning always of the one, so nothing is read twice."""
        training = step.samples is not None
        if step.images is not None and (self.phase == "pretrain" or not training):
            return self.see(step.images)
        kept = self._own_seen
        if kept is None or kept[0] is not self.picture or kept[1] != self.picture._version:
            if not self.picture.any():
                raise UserError("E4T has no picture: call set_reference(0, picture), load an artifact, or give images.")
            kept = self._own_seen = (self.picture, self.picture._version, self.see(self.picture[None]))
        return Seen(*(each.expand(len(step.prompts), *each.shape[1:]) for each in kept[2]))

    def extra_losses(self, step: Step, z0: Tensor) -> dict[str, Tensor]:
        """Loss "reg" (R,): lambda |w|^2 of each row, times the batch size.

        pretrain_e4t.py adds the sum over its batch to the loss (`loss_reg`); rows are averaged here, hence the factor.

        Args:
            step: not read; the words are those of the last `condition`.
            z0: clean latents (R, C, H, W), not read.
        """
        assert self._words is not None, "condition comes first"
        words, self._words = self._words, None  # not kept: it holds the step's graph
        return {"reg": self.reg_lambda * self.batch_size * words.square().sum(1)}

    def posterior_noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Unit normals (R, *shape): in tuning `batch_size` draws made once (tuning_e4t.py), else fresh ones."""
        samples = batch.sample % self.batch_size if self.phase == "tune" else batch.sample
        return draws.normal(self.seed, "posterior", samples, shape)

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer, its decay on the U-Net's whole weights."""
        frozen = dict(self.model.unet.named_parameters())
        pairs = [(offset, frozen[name.replace("/", ".")]) for name, offset in self.unet_offsets.items()]
        return decay_whole_weights(super().configure_optimizers(), pairs)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm of all gradients together: there is one concept, and its tensors have no concept axis."""
        if gradient_clip_val:
            every = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(every, float(gradient_clip_val))

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def sample_calls(self, *args: Any, **how: Any) -> Calls[Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] as `Method.sample_calls`; the changed weights are worked out once for all."""
        kept: Offsets | None = None

        @contextmanager
        def keeping() -> Iterator[None]:
            nonlocal kept
            self._sampling, self._kept = True, kept
            try:
                yield
            finally:
                kept = self._kept
                self._sampling, self._kept = False, None

        return within(keeping, super().sample_calls(*args, **how))

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Own tensors by name, (1, ...) each: a concept axis of one in front, as views, so loading changes them."""
        return {name: value[None] for name, value in super().trainable_state().items()}

    def load_artifact(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put tensors (...,) as `artifact` gave them in place; the tower must be the one they were trained with."""
        self._check_tower(tensors, "the artifact")
        super().load_artifact(index, tensors)

    @torch.no_grad()
    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """With `export_files`, the reimplementation's files (SD 1.x: 3.7 GB pre-trained, 6.9 GB tuned)."""
        if not self.export_files:
            return []
        subject, tower = self.concepts[index], self.see.tower
        config = {
            "pretrained_model_name_or_path": self.model.name,
            "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k" if tower.width == 1280 else f"width {tower.width}",
            "placeholder_token": subject.placeholder,
            "domain_class_token": self.domain_word,
            "domain_embed_scale": self.embed_scale,
            "reg_lambda": self.reg_lambda,
            "resolution": self.model.size,
            "seed": self.seed,
            "train_batch_size": self.batch_size,
            "max_train_steps": steps,
            "scale_lr": False,  # true would scale the rate a second time
        }
        offsets = {
            f"{name.replace('/', '.')}.{part}": value
            for name, module in self.weight_offsets.items()
            for part, value in module.state_dict().items()
        }
        vision = {name.removeprefix("vision_model."): v for name, v in tower.network.state_dict().items()}
        unet = None
        if self.unet_offsets:
            added = {name.replace("/", "."): Added(value[0]) for name, value in self.unet_offsets.items()}
            unet = {**self.model.unet.state_dict(), **Offsets(added).weights(self.model.unet)}
        return formats.write(folder, config, offsets, self.head.state_dict(), vision, unet, self.picture)

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """Read a folder of the reimplementation, named by any of its files; its picture too, if it has one."""
        found = formats.read(path.parent)
        if found.tower:
            try:
                towers.fill(self.see.tower, found.tower)
            except UserError as error:
                raise UserError(f"{path.parent / formats.ENCODER}: {error}") from error
            self.see.clear()
            self.tower_fingerprint.copy_(self.see.tower.fingerprint())
        self._take(found, path.parent)
        if found.picture is None:
            return
        try:
            image = read_image(found.picture)
        except (ImageProblem, OSError) as error:
            raise UserError(
                f"{found.picture} cannot be read ({error}). Remove it to use the data's picture."
            ) from error
        self.set_reference(index, to_pixels(image, self.model.size, "square", flip=False))


def _domain_beside(folder: str | None, word: str) -> str | None:
    """The artifact of a domain in a model's own folder, if it has one of that noun."""
    path = files.expand(folder) / "e4t" / f"{word}.safetensors" if folder else None
    return str(path) if path and path.is_file() else None


def _tower(model: FrozenStack, tower: str | None, folder: str | None, foreign: formats.Found | None) -> VisionTower:
    """The picture tower that the settings mean."""
    theirs = foreign.tower if foreign else {}
    if tower is None and theirs:
        return towers.from_state(theirs)
    if tower is None and (own := towers.beside(folder)):
        return towers.load(own)
    if tower is None and not model.trained:
        return towers.tiny_tower(seed=0)
    made = towers.load(tower or towers.OPEN_CLIP)
    if theirs:
        towers.fill(made, theirs)
    return made


def _projections(unet: nn.Module) -> list[str]:
    """q, k and v of every self- and cross-attention: 96 in SD (e4t/models/cross_attention.py)."""
    ends = tuple(f".{attention}.to_{which}" for attention in ("attn1", "attn2") for which in "qkv")
    return [name for name, _ in unet.named_modules() if name.endswith(ends)]
