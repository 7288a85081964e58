"""Makes `hydra/sweeper=optuna` known to Hydra, which takes plugins only from the top-level package hydra_plugins."""

from hiperlab.sweep.optuna import Study


class OptunaSweeper(Study):
    """See hiperlab.sweep.optuna."""
