"""The world's judges as encoders of a protocol: identity and attributes from a folder, truth from the world itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.weights import MissingWeightsError
from hiperlab.metric.world.extractor import IdentityEncoder, ReaderEncoder, TruthEncoder
from hiperlab.metric.world.network import Judge, load


@dataclass(frozen=True)
class _FolderJudge(EncoderConfig):
    """A judge of the world in a folder (config.json, model.safetensors).

    Attributes:
        path: the folder, e.g. <miniature>/judges/identity.
    """

    path: str | None

    def fetch(self, key: str) -> None:
        """Check that it is there."""
        self._folder(key)

    def _folder(self, key: str) -> Path:
        if not self.path:
            raise MissingWeightsError(f"{key}.path is not set: name a folder of the miniature's judges/.")
        folder = files.expand(self.path)
        if not (folder / "model.safetensors").is_file():
            raise MissingWeightsError(f"{key}.path={folder} holds no judge: name a folder of the miniature's judges/.")
        return folder

    def _load(self, key: str, labelled: bool) -> Judge:
        folder = self._folder(key)
        judge = load(folder)
        if bool(judge.shape.labels) != labelled:
            wanted = "attributes" if labelled else "identity"
            raise UserError(f"{key}.path={folder} is the other judge: name judges/{wanted}.")
        return judge


@dataclass(frozen=True)
class FolderIdentity(_FolderJudge):
    """The identity encoder: pictures only; use it with `IdentityScore`."""

    def load(self, key: str) -> Encoder:
        """Build it in float32."""
        return IdentityEncoder(self._load(key, labelled=False))


@dataclass(frozen=True)
class FolderReader(_FolderJudge):
    """The attribute reader; use it with the scores of scores.py."""

    def load(self, key: str) -> Encoder:
        """Build it in float32."""
        return ReaderEncoder(self._load(key, labelled=True))


@dataclass(frozen=True)
class WorldTruth(EncoderConfig):
    """The world as a judge: it draws what the prompt asks for. No weights; use it with the scores of scores.py.

    Attributes:
        size: side at which pictures are compared.
        shifts: camera positions tried, in picture widths.
        zooms: camera zooms tried. Both mirrorings are always tried.
    """

    size: int
    shifts: tuple[float, ...]
    zooms: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("shifts", "zooms"):  # yaml gives lists
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not 32 <= self.size <= 256 or not self.shifts or not self.zooms:
            raise UserError(f"{self}: needs a size from 32 to 256 and at least one shift and one zoom.")

    def load(self, key: str) -> Encoder:
        """Nothing to load but the drawing library."""
        return TruthEncoder(self.size, self.shifts, self.zooms)
