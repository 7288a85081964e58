"""Training prompts of diffusers' textual_inversion.py, which NeTI shares (its constants.py)."""

from __future__ import annotations

from hiperlab.errors import UserError, near

_OBJECT = (
    "a photo of a",
    "a rendering of a",
    "a cropped photo of the",
    "the photo of a",
    "a photo of a clean",
    "a photo of a dirty",
    "a photo of a nice",
    "a photo of a cool",
    "a photo of a small",
    "a photo of the",
    "a photo of the cool",
    "a photo of the clean",
    "a photo of the nice",
    "a photo of the small",
    "a photo of the weird",
    "a photo of the large",
    "a photo of my",
    "a photo of one",
    "a dark photo of the",
    "a bright photo of the",
    "a close-up photo of a",
    "a close-up photo of the",
    "a cropped photo of a",
    "a good photo of the",
    "a good photo of a",
    "a rendition of the",
    "a rendition of a",
)
# "cropped" and "close-up" stand twice in the authors' list, so they are drawn twice as often; kept.
_STYLE = (
    "a painting",
    "a rendering",
    "a cropped painting",
    "a cropped painting",
    "the painting",
    "a clean painting",
    "a dirty painting",
    "a dark painting",
    "a cool painting",
    "a bright painting",
    "a good painting",
    "a nice painting",
    "a small painting",
    "a weird painting",
    "a large painting",
    "a close-up painting",
    "a close-up painting",
    "a picture",
    "a rendition",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": tuple(f"{start} {{}}" for start in _OBJECT),
    "style": tuple(f"{start} in the style of {{}}" for start in _STYLE),
}


def templates(property: str) -> tuple[str, ...]:
    """The training prompts for learning an "object" (27) or a "style" (19), each with "{}".

    Raises:
        UserError: another property.
    """
    if property not in TEMPLATES:
        raise UserError(f"property {property!r} has no templates.{near(str(property), TEMPLATES)}")
    return TEMPLATES[property]
