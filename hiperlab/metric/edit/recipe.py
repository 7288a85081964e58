"""Recipes of the encoders that compare an edit with its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from hiperlab.errors import UserError, near
from hiperlab.hub import first_line, hub_problem
from hiperlab.metric.edit.extractor import KeyEncoder, LpipsEncoder, PixelEncoder, lpips_network
from hiperlab.metric.encoder import EncoderConfig, HubVision
from hiperlab.metric.extractor import Encoder, VisionEncoder
from hiperlab.metric.weights import MissingWeightsError, local_file, read_tensors

# torchvision's ImageNet weights, over which LPIPS's own weights were learnt
BACKBONES = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
ADDRESS = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Pixels(EncoderConfig):
    """Pictures as they are: what was kept, and the distance to the truth, need no weights.

    Attributes:
        size: side at which pictures are compared.
    """

    size: int

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 2048:
            raise UserError(f"{self}: needs a size from 16 to 2048.")

    def load(self, key: str) -> Encoder:
        """Nothing to load."""
        return PixelEncoder(self.size)


@dataclass(frozen=True)
class HubKeys(HubVision):
    """A vision transformer's keys, for the structure distance; PIE-Bench's is "vit_base_patch8_224.dino".

    Attributes:
        raw: true as in PIE-Bench's evaluator, which normalises values of 0 to 255 as if they were 0 to 1.
    """

    raw: bool

    def load(self, key: str) -> Encoder:
        """Build it in float32."""
        loaded = super().load(key)
        assert isinstance(loaded, VisionEncoder)
        if not hasattr(loaded.network, "blocks"):
            raise UserError(f"{key}.model={self.model} is no vision transformer: choose one, e.g. vit_base_patch8_224.")
        return KeyEncoder(loaded.network, loaded.transform, self.raw)


@dataclass(frozen=True)
class TensorKeys(HubKeys):
    """The same on pictures resized as tensors, as PIE-Bench's evaluator does.

    Attributes:
        antialias: false as torchvision's default was in the evaluator's environment (0.13.1); later ones smooth.
    """

    antialias: bool

    def load(self, key: str) -> Encoder:
        """Build it in float32."""
        loaded, how = super().load(key), self.preprocess
        assert isinstance(loaded, KeyEncoder)
        resize = Resize(how.resize, InterpolationMode(how.interpolation), antialias=self.antialias)
        steps = [ToTensor(), resize, CenterCrop(how.crop), Normalize(how.mean, how.std)]
        return KeyEncoder(loaded.network, Compose(steps), self.raw)


@dataclass(frozen=True)
class Lpips(EncoderConfig):
    """LPIPS v0.1; its learnt weights come with torchmetrics, the backbone's from torchvision.

    Attributes:
        net: "squeeze" (PIE-Bench), "alex" (LPIPS's default) or "vgg".
        path: the backbone's file, or null: torch's cache, else a download.
    """

    net: str
    path: str | None

    def __post_init__(self) -> None:
        if self.net not in BACKBONES:
            raise UserError(f"LPIPS over net={self.net} is unknown.{near(self.net, BACKBONES)}")

    def load(self, key: str) -> Encoder:
        """Build it in float32."""
        file = self._file(key)
        tensors = read_tensors(file, self._what)
        network = lpips_network(self.net)
        # Its slices keep torchvision's numbers: slices.1.3.squeeze.weight is features.3.squeeze.weight.
        names = {own: own.removeprefix("slices.").split(".", 1)[1] for own in network.net.state_dict()}
        try:
            network.net.load_state_dict({own: tensors[f"features.{theirs}"] for own, theirs in names.items()})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{file} does not hold {self._what} ({first_line(error)}): name the right file.") from error
        return LpipsEncoder(network)

    def fetch(self, key: str) -> None:
        """Find or download the file."""
        self._file(key)

    @property
    def _what(self) -> str:
        return f"LPIPS's backbone {self.net}"

    def _file(self, key: str) -> Path:
        if self.path:
            return local_file(self.path, self._what, f"{key}.path")
        name = BACKBONES[self.net]
        file = Path(torch.hub.get_dir()) / "checkpoints" / name
        if file.is_file():
            return file
        reason = hub_problem()  # no connection to the hub, or none wanted: then none here either
        if reason is None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                sha = name.removesuffix(".pth").rsplit("-", 1)[1]
                torch.hub.download_url_to_file(ADDRESS + name, str(file), hash_prefix=sha, progress=False)
                return file
            except (OSError, RuntimeError) as error:
                reason = first_line(error)
        raise MissingWeightsError(
            f"weights of {self._what} are not here ({reason}). Fetch {ADDRESS}{name} where there is a connection "
            f"and set {key}.path=<file>."
        )
