"""Names: exactly who a subject is, as one vector in a word's place, as Stable Diffusion's captions name characters.

Captions name kinds, colours and patterns only; a text tower that has read nothing else cannot say "this cat". So in a
share of its captions the subject has a name: all that makes its identity, made a token embedding by a small network
that learns with the U-Net and no method ever sees. A personalisation method looks for such a vector, of a
subject that no name was ever learnt from.
"""

from __future__ import annotations

from math import cos, sin

from torch import Tensor, nn

from hiperlab.world.identity import Identity
from hiperlab.world.vocabulary import KINDS, PATTERNS

COLLARS, MARKS = ("none", "band", "tag"), ("none", "blaze", "patch", "star")
PROPORTIONS = ("head", "ear", "tail", "leg", "body")


def _one_hot(value: str, values: tuple[str, ...]) -> list[float]:
    return [float(value == each) for each in values]


def features(who: Identity) -> list[float]:
    """An identity as numbers of about -2 to 2: kind, colours, coat, proportions, collar and marks."""
    coat = _one_hot(who.pattern, PATTERNS)
    texture = (who.frequency - 4.6, cos(who.phase), sin(who.phase), 2 * who.slant, 2 * who.amount - 1)
    colours = [2 * c - 1 for rgb in (who.coat, who.second, who.belly, who.eye, who.band) for c in rgb]
    return [
        *_one_hot(who.kind, KINDS),
        *colours,
        *coat,
        *([0.0] * len(texture) if who.pattern == "plain" else texture),
        *(6 * (getattr(who, name) - 1) for name in PROPORTIONS),
        *_one_hot(who.collar, COLLARS),
        *_one_hot(who.mark, MARKS),
        float(who.socks),
        float(who.cheeks),
    ]


FEATURES = len(KINDS) + 15 + len(PATTERNS) + 5 + len(PROPORTIONS) + len(COLLARS) + len(MARKS) + 2


class Namer(nn.Module):
    """Makes names: token embeddings as long as the word for the subject's kind.

    Args:
        width: of token embeddings.
        hidden: of the network.
    """

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, identities: Tensor, nouns: Tensor) -> Tensor:
        """`features` (B, F) and the kinds' token embeddings (B, D) -> (B, D); at the start the kinds' own."""
        moved = nouns + self.network(identities)
        return moved * (nouns.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))


def put(ids: Tensor, kinds: Tensor) -> Tensor:
    """Where the name stands (B,): the first token that is the kind's; (B, 77) ids and (B,) ids of the kinds' words.

    0, the start of the text, where the word is not there: in an empty caption.
    """
    return (ids == kinds[:, None]).int().argmax(dim=1)
