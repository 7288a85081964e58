"""Makes `hydra/launcher=process` known to Hydra, which takes plugins only from the top-level package hydra_plugins."""

from hiperlab.sweep.launcher import FreshProcesses


class ProcessLauncher(FreshProcesses):
    """See hiperlab.sweep.launcher."""
