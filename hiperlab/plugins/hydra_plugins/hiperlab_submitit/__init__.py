"""Makes `hydra/launcher=submitit_local` and `submitit_slurm` known to Hydra (extra: hiperlab[slurm]).

Hydra takes plugins only from the top-level package hydra_plugins. Without the extra there is nothing here.
"""

import importlib.util

if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher

    from hiperlab.sweep.submitted import Submitted

    class FoldedLocal(Submitted, LocalLauncher):
        """See hiperlab.sweep.submitted."""

    class FoldedSlurm(Submitted, SlurmLauncher):
        """See hiperlab.sweep.submitted."""
