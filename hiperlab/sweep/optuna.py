"""`hydra/sweeper=optuna`: a study whose trials are jobs of the sweep, so that it resumes like any other sweep.

Own, because the published plugin pins an Optuna whose sqlite storage no longer opens. The search space is the command
line: `'method.optimizer.lr=tag(log,interval(1e-4,1e-2))' 'seed=range(0,5)' method=ti,neti`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hiperlab import files
from hiperlab.cli.overrides import choices, parse
from hiperlab.errors import UserError, near

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "random", "grid")


def space(lines: Sequence[str], loader: Any) -> tuple[dict[str, optuna.distributions.BaseDistribution], list[str]]:
    """The search space of the swept overrides, by key as written before `=`, and the fixed overrides.

    Raises:
        UserError: nothing is swept.
    """
    swept, fixed = {}, []
    for override in parse(lines, loader):
        if override.is_sweep_override():
            swept[override.get_key_element()] = distribution(override)
        else:
            fixed.append(override.input_line or "")
    if not swept:
        raise UserError("hydra/sweeper=optuna has nothing to search: sweep a key, for example 'seed=range(0,5)'.")
    return swept, fixed


def distribution(override: Override) -> optuna.distributions.BaseDistribution:
    """Optuna's distribution of one sweep. `tag(log, …)` searches on a log scale; a range excludes its stop."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    log = "log" in getattr(sweep, "tags", ())
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        whole = isinstance(low, int) and isinstance(high, int)
        return IntDistribution(low, high, log=log) if whole else FloatDistribution(float(low), float(high), log=log)  # type: ignore[arg-type]
    if isinstance(sweep, RangeSweep):
        numbers: list[Any] = list(sweep.range())
        if len(numbers) > 1 and not log:
            low, high, step = min(numbers), max(numbers), abs(sweep.step)
            whole = all(isinstance(number, int) for number in numbers)
            return IntDistribution(low, high, step=int(step)) if whole else FloatDistribution(low, high, step=step)
    return CategoricalDistribution(choices(override))


def grid(swept: dict[str, optuna.distributions.BaseDistribution]) -> list[dict[str, Any]]:
    """All points of a discrete space.

    Raises:
        UserError: an interval has no finite number of points.
    """
    from optuna.distributions import CategoricalDistribution

    axes: list[list[Any]] = []
    for key, axis in swept.items():
        step = getattr(axis, "step", None)
        if isinstance(axis, CategoricalDistribution):
            axes.append(list(axis.choices))
        elif step is None or axis.log:  # type: ignore[attr-defined]
            raise UserError(f"sampler=grid needs a finite choice for {key}: use a,b,c or range(start,stop,step).")
        else:
            count = round((axis.high - axis.low) / step) + 1  # type: ignore[attr-defined]
            axes.append([axis.low + index * step for index in range(count)])  # type: ignore[attr-defined]
    return [dict(zip(swept, point)) for point in itertools.product(*axes)]


class Study(Sweeper):
    """Hydra sweeper; `hydra_plugins.hiperlab_optuna` makes it known to Hydra.

    Args:
        n_trials: successful trials wanted, those of earlier commands included; null only for sampler=grid: all points.
        n_jobs: trials asked for at a time; they run side by side as far as the launcher's slots allow.
        direction: maximize | minimize.
        sampler: tpe | random | grid.
        seed: of the sampler.
        storage: Optuna storage URL; null = study.db in the sweep's folder.
        params: swept overrides given in yaml, key -> value; the command line wins.
    """

    def __init__(
        self,
        n_trials: int | None,
        n_jobs: int,
        direction: str,
        sampler: str,
        seed: int,
        storage: str | None,
        params: dict[str, str] | None,
    ) -> None:
        if sampler not in SAMPLERS:
            raise UserError(f"hydra.sweeper.sampler={sampler}: no such sampler.{near(sampler, SAMPLERS)}")
        if direction not in ("maximize", "minimize"):
            raise UserError(f"hydra.sweeper.direction={direction}: expected maximize or minimize.")
        if n_trials is None and sampler != "grid":
            raise UserError(f"hydra.sweeper.n_trials is missing: sampler={sampler} needs to know when to end.")
        self.n_trials, self.n_jobs, self.direction = n_trials, n_jobs, direction
        self.sampler, self.seed, self.storage, self.params = sampler, seed, storage, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the missing trials and write best.json."""
        sweep_dir = Path(str(self.config.hydra.sweep.dir))  # type: ignore[union-attr]
        sweep_dir.mkdir(parents=True, exist_ok=True)
        lines = [f"{key}={value}" for key, value in (self.params or {}).items()] + arguments
        lines = [o.input_line or "" for o in {o.key_or_group: o for o in parse(lines)}.values()]
        swept, fixed = space(lines, self.hydra_context.config_loader)  # type: ignore[union-attr]
        study = self._study(sweep_dir)
        wanted = self._plan(study, swept)
        returns = []
        budget = wanted - len(_complete(study))  # a failed trial uses it up too: a study of failures ends
        while budget > 0:
            asked = [study.ask(swept) for _ in range(min(budget, self.n_jobs))]
            budget -= len(asked)
            returns.append(self._batch(study, asked, fixed))
        self._report(study, sweep_dir)
        return returns

    def _batch(self, study: optuna.Study, asked: list[optuna.Trial], fixed: list[str]) -> Any:
        """Run some trials and tell the study what came of them."""
        points = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in asked]
        done = self.launcher.launch(points, initial_job_idx=asked[0].number)  # type: ignore[union-attr]
        for trial, job in zip(asked, done):
            value = job.return_value
            if isinstance(value, int | float) and math.isfinite(value):
                study.tell(trial, float(value))
            else:
                study.tell(trial, state=_state("FAIL"))
        return done

    def _study(self, sweep_dir: Path) -> optuna.Study:
        """Open or resume the study."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = self.storage or f"sqlite:///{sweep_dir / 'study.db'}"
        study = optuna.create_study(
            storage=url,
            study_name=sweep_dir.name,
            direction=self.direction,  # type: ignore[arg-type]
            load_if_exists=True,
        )
        # A resumed sampler begins its random numbers anew: with the same seed it would ask for the first points again.
        seed = self.seed + len(study.trials)
        tpe = self.sampler == "tpe"
        study.sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
        return study

    def _plan(self, study: optuna.Study, swept: dict[str, Any]) -> int:
        """Queue what failed or was cut off in earlier commands, and a grid's open points; how many are wanted."""
        for trial in study.trials:
            if trial.state.name == "RUNNING":  # its sweep was killed; the job itself resumes from its folder
                study.tell(trial.number, state=_state("FAIL"))
        settled = [trial.params for trial in _complete(study)]
        waiting = [trial for trial in study.trials if trial.state.name == "WAITING"]
        settled += [trial.system_attrs.get("fixed_params", {}) for trial in waiting]
        points = grid(swept) if self.sampler == "grid" else []
        wanted = len(points) if self.n_trials is None else self.n_trials
        failed = [trial.params for trial in study.trials if trial.state.name == "FAIL"]
        again = [point for point in failed if set(point) == set(swept)]
        for point in again + points:
            if point not in settled:
                study.enqueue_trial(point)
                settled.append(point)
        return min(wanted, len(points)) if points else wanted

    def _report(self, study: optuna.Study, sweep_dir: Path) -> None:
        """Print and keep the best trial."""
        if not _complete(study):
            print("hiperlab: no trial of the study succeeded")
            return
        best = study.best_trial
        print(f"hiperlab: best objective {best.value:.6g} with {' '.join(f'{k}={v}' for k, v in best.params.items())}")
        files.write_json(sweep_dir / "best.json", json.loads(json.dumps({"value": best.value, "params": best.params})))


def _complete(study: optuna.Study) -> list[Any]:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
