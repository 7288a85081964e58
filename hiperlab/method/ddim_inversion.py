"""DDIM inversion with Prompt-to-Prompt: one picture's path to its noise, and other texts drawn from there.

The inversion is Song et al. 2021, eq. 12 backwards, in the order of null_text_w_ptp.ipynb (google/prompt-to-prompt,
NullInversion.ddim_loop). Nothing is fitted; with every window 0 and no blending a target is drawn from the inverted
noise as it is.
"""

from __future__ import annotations

from hiperlab.base.editing_method import EditingMethod


class DDIMInversion(EditingMethod):
    """The baseline of the methods that fit something along the inverted path."""
