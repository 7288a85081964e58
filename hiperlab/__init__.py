"""hiperlab: the laboratory for personalising Stable Diffusion.

Importing the package is cheap: no torch, no diffusers. Rooms import what they need.
"""

import os

# Two OpenMP threads on two busy cores are ten times slower than one unless idle threads sleep instead of spin.
# It only works when set before torch is first imported, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
