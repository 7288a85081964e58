"""DDIM inversion with Prompt-to-Prompt: one picture's path to its noise, and other texts drawn from there.

Specification: methods/stylediffusion.md, sections 3 and 7. Nothing is fitted; with every window 0 and no blending a
target is drawn from the inverted noise as it is.
"""

from __future__ import annotations

from hiperlab.base.editing_method import EditingMethod


class DDIMInversion(EditingMethod):
    """What every method of this kind stands on, and the baseline they are measured against."""
