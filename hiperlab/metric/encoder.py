"""Recipes of frozen encoders: plain settings that are cheap to make, compare and hash; `load` does the heavy part.

`path` says where weights lie, not which they are, so it never enters a protocol's hash; what was loaded is named by
`Encoder.weights`.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError, near
from hiperlab.metric.extractor import ClipEncoder, Encoder, VisionEncoder
from hiperlab.metric.preprocess import Preprocess, make_transform
from hiperlab.metric.weights import MissingWeightsError, hub_file, local_file, read_tensors

_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class EncoderConfig(ABC):
    """Settings of one frozen encoder. Subclass it, with `Encoder`, to let another embedder judge."""

    @abstractmethod
    def load(self, key: str) -> Encoder:
        """Build the encoder with its weights.

        Args:
            key: the config key of this encoder, e.g. "metric.encoders.clip", for messages.

        Raises:
            MissingWeightsError: the weights are not here and cannot be had.
        """

    def fetch(self, key: str) -> None:  # noqa: B027 - encoders without files have nothing to fetch
        """Make sure that the weights' files are here, without loading them; raises as `load` does."""

    def settings(self) -> dict[str, Any]:
        """Everything that may move a number, as plain values, for the hash."""
        values = dataclasses.asdict(self)
        values.pop("path", None)
        return {"kind": type(self).__dict__.get("hashed_as") or type(self).__name__, **values}


@dataclass(frozen=True)
class HubClip(EncoderConfig):
    """A published CLIP by its open_clip names.

    Attributes:
        model: open_clip's architecture, e.g. "ViT-B-32-quickgelu" (OpenAI's weights need the quickgelu form).
        weights: open_clip's tag of the weights, e.g. "openai".
        path: their file (safetensors or a state dict), or null: the hub cache, else a download.
        preprocess: how pictures are prepared.
    """

    model: str
    weights: str
    path: str | None
    preprocess: Preprocess

    def load(self, key: str) -> Encoder:
        """Build both towers in float32."""
        import open_clip

        file = self._file(key)
        try:
            network = open_clip.create_model(self.model, pretrained=str(file), precision="fp32")
        except Exception as error:  # unpickling, shapes, names: all mean that the file is not this model's
            raise _unusable(file, f"{self.model}/{self.weights}", error) from error
        return ClipEncoder(network, make_transform(self.preprocess), self._tokenizer(key))

    def _tokenizer(self, key: str) -> Callable[[list[str]], Tensor]:
        """Texts -> token ids: open_clip's own, which comes with it."""
        import open_clip

        return open_clip.get_tokenizer(self.model)

    def fetch(self, key: str) -> None:
        """Find or download the file."""
        self._file(key)

    def _file(self, key: str) -> Path:
        """Where the weights lie on this machine."""
        import open_clip

        config = open_clip.get_model_config(self.model)
        if config is None:
            raise UserError(
                f"{key}.model={self.model} is no open_clip model.{near(self.model, open_clip.list_models())}"
            )
        tag = open_clip.get_pretrained_cfg(self.model, self.weights)
        if not tag:
            known = open_clip.list_pretrained_tags_by_model(self.model)
            raise UserError(f"{key}.weights={self.weights} is no tag of {self.model}.{near(self.weights, known)}")
        if bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):  # open_clip only warns, and scores differ
            other = "with" if tag.get("quick_gelu") else "without"
            raise UserError(
                f"{key}.model={self.model}: the weights {self.weights} were trained {other} QuickGELU; "
                f"choose the model's name {other} '-quickgelu'."
            )
        what = f"{self.model}/{self.weights}"
        if self.path:
            return local_file(self.path, what, f"{key}.path")
        repo, _, name = str(tag.get("hf_hub", "")).rpartition("/")
        if not repo:
            raise MissingWeightsError(f"weights of {what} are not on the hub: download them and set {key}.path=<file>.")
        return hub_file(repo, (name,) if name else _CLIP_FILES, what, f"{key}.path")


@dataclass(frozen=True)
class HubSigLip(HubClip):
    """A published SigLIP (or another model with a tokenizer of its own on the hub) by its open_clip names.

    Attributes:
        tokenizer: folder of its tokenizer's files, or null: the hub cache, else a download.
    """

    tokenizer: str | None

    def fetch(self, key: str) -> None:
        """Find or download weights and tokenizer."""
        super().fetch(key)
        self._tokenizer_folder(key)

    def settings(self) -> dict[str, Any]:
        """As of any encoder: where the tokenizer lies moves no number."""
        return {name: value for name, value in super().settings().items() if name != "tokenizer"}

    def _tokenizer(self, key: str) -> Callable[[list[str]], Tensor]:
        import open_clip

        config = (open_clip.get_model_config(self.model) or {})["text_cfg"]
        folder = self._tokenizer_folder(key)
        try:
            return open_clip.tokenizer.HFTokenizer(
                str(folder), context_length=config["context_length"], **config.get("tokenizer_kwargs", {})
            )
        except Exception as error:  # transformers' readers raise many kinds
            raise _unusable(folder, f"the tokenizer of {self.model}", error) from error

    def _tokenizer_folder(self, key: str) -> Path:
        import open_clip

        if self.tokenizer:
            folder = files.expand(self.tokenizer)
            if not (folder / TOKENIZER_FILES[0]).is_file():
                raise MissingWeightsError(f"{key}.tokenizer={self.tokenizer} holds no {TOKENIZER_FILES[0]}.")
            return folder
        name = ((open_clip.get_model_config(self.model) or {}).get("text_cfg") or {}).get("hf_tokenizer_name")
        if not name:
            raise UserError(f"{key}.model={self.model} has no tokenizer of its own: use HubClip for it.")
        what = f"{self.model}'s tokenizer"
        found = [hub_file(name, (file,), what, f"{key}.tokenizer") for file in TOKENIZER_FILES]
        return found[0].parent


@dataclass(frozen=True)
class FolderClip(EncoderConfig):
    """A CLIP of one's own: a folder with open_clip_config.json and one checkpoint.

    The json is open_clip's: {"model_cfg": {embed_dim, vision_cfg, text_cfg}, "preprocess_cfg": {size, mean, std, …}}.
    With tokenizer files of transformers beside it those are used, else open_clip's own BPE. Preprocessing is the
    folder's, so it enters `Encoder.weights`, not the hash.

    Attributes:
        path: the folder.
    """

    path: str | None

    def load(self, key: str) -> Encoder:
        """Build both towers in float32."""
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        folder, file = self._folder(key)
        text = (folder / "open_clip_config.json").read_text(encoding="utf-8")
        try:
            config = json.loads(text)
            model = config.get("model_cfg", config)
            network: Any = open_clip.CLIP(**model)
            open_clip.load_checkpoint(network, str(file), strict=True)
            cleaned = merge_preprocess_dict({"size": network.visual.image_size}, config.get("preprocess_cfg", {}))
            transform = image_transform_v2(PreprocessCfg(**cleaned), is_train=False)
        except Exception as error:  # json, keys, shapes: all mean that the folder does not hold one such model
            raise _unusable(file, f"the CLIP that {folder}/open_clip_config.json describes", error) from error
        length = network.context_length
        own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        tokenizer: Any = (
            open_clip.tokenizer.HFTokenizer(str(folder), context_length=length)
            if own
            else open_clip.SimpleTokenizer(context_length=length)
        )
        return ClipEncoder(network, transform, tokenizer)

    def fetch(self, key: str) -> None:
        """Check that both files are there."""
        self._folder(key)

    def _folder(self, key: str) -> tuple[Path, Path]:
        """The folder and its checkpoint."""
        what = "a CLIP folder (open_clip_config.json + one checkpoint)"
        if not self.path:
            raise MissingWeightsError(f"{key}.path is not set: give {what}, {key}.path=<folder>.")
        folder = files.expand(self.path)
        if not (folder / "open_clip_config.json").is_file():
            raise MissingWeightsError(f"{key}.path={self.path} is not {what}: put the two files there or name another.")
        return folder, local_file(str(folder), what, f"{key}.path")


@dataclass(frozen=True)
class HubVision(EncoderConfig):
    """A picture encoder by its timm name, such as DINO.

    Attributes:
        model: timm's name with tag, e.g. "vit_small_patch16_224.dino".
        path: its weights' file, or null: the hub cache, else a download.
        preprocess: how pictures are prepared (timm's own crop differs from the published evaluators').
    """

    model: str
    path: str | None
    preprocess: Preprocess

    def load(self, key: str) -> Encoder:
        """Build it in float32, its input size set to the crop; the output is the pooled feature before any head."""
        import timm

        file = self._file(key)
        tensors = read_tensors(file, self.model)
        try:
            network = timm.create_model(
                self.model,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": tensors},  # not "file": timm would unpickle anything
                num_classes=0,
                img_size=self.preprocess.crop,
            )
        except Exception as error:  # names and shapes: both mean that the file is not this model's
            raise _unusable(file, self.model, error) from error
        return VisionEncoder(network, make_transform(self.preprocess))

    def fetch(self, key: str) -> None:
        """Find or download the file."""
        self._file(key)

    def _file(self, key: str) -> Path:
        """Where the weights lie on this machine."""
        import timm

        config = timm.models.get_pretrained_cfg(self.model) if timm.models.is_model(self.model) else None
        if config is None:
            raise UserError(f"{key}.model={self.model} is no timm model.{near(self.model, timm.list_pretrained())}")
        if self.path:
            return local_file(self.path, self.model, f"{key}.path")
        if not config.hf_hub_id:
            raise MissingWeightsError(f"{self.model} is not on the hub: download it and set {key}.path=<file>.")
        return hub_file(config.hf_hub_id, _TIMM_FILES, self.model, f"{key}.path")


def _unusable(file: Path, what: str, error: Exception) -> UserError:
    """One line for a file that is there but does not fit."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")[:160]
    return UserError(f"{file} does not hold {what} ({reason}): name the right file, or delete it to fetch it again.")
