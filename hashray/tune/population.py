"""[Ray] Population-based training with Ray's scheduler, made reproducible.

After every `grace_epochs` epochs, members of the worst quarter continue from the weights of members of the best
quarter, at slightly changed points (Jaderberg et al. 2017). Ray decides. This file adds two things. Random numbers
depend only on the seed, the member and the epoch, so a rerun makes the same exchanges. The point of a member records
its origin, so a member is a training config with changes.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from hashray.errors import ConfigError
from hashray.tune.space import NUMBER, ORIGIN, Dimension, SweepConfig, grace_epochs, values_of

WORST = -1.0  # score of a failed member, so that it continues from the weights of another


class Population(PopulationBasedTraining):
    """Ray's scheduler for a sweep in which every trial trains for `epochs` epochs."""

    def __init__(self, config: SweepConfig, epochs: int, time_attr: str) -> None:
        self.config, self.epochs = config, epochs
        self.dimensions = config.active(config.method.kind)
        super().__init__(
            time_attr=time_attr, perturbation_interval=grace_epochs(config.search, epochs), synch=True,
            hyperparam_mutations={name: _mutation(dimension) for name, dimension in self.dimensions.items()},
            log_config=False,
        )  # fmt: skip

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[self._time_attr] >= self.epochs:  # an exchange after the last epoch would train nothing
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: Any, lower_quantile: Any
    ) -> None:
        # The point says where the weights are, so Tune has no checkpoint to save or to wait for.
        donors = [other for other in upper_quantile if (self._trial_state[other].last_score or 0) > WORST]
        if donors and trial in lower_quantile:
            before = random.getstate(), np.random.get_state()
            time = self._trial_state[trial].last_train_time
            random.seed(f"{self.config.search.seed} {trial.config[NUMBER]} {time}")
            np.random.seed(random.getrandbits(32))
            self._exploit(tune_controller, trial, random.choice(donors))
            trial.run_metadata.checkpoint_manager._latest_checkpoint_result = None
            random.setstate(before[0])
            np.random.set_state(before[1])

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        donor = trial_to_clone.config
        moved, operations = super()._get_new_config(trial, trial_to_clone)
        values = {name: dimension.within(moved[name]) for name, dimension in self.dimensions.items()}
        origin = {NUMBER: trial.config[NUMBER], ORIGIN: [self._trial_state[trial_to_clone].last_train_time, donor]}
        point = {**values, **origin}
        try:
            self.config.at(point)
        except ConfigError:  # each value is in its range, but the combination is invalid
            point = {**values_of(donor), **origin}
        return point, operations


def _mutation(dimension: Dimension) -> Any:
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = dimension.ends
    if dimension.integer is not None:
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if dimension.log is not None else tune.uniform(low, high)


def first_members(config: SweepConfig) -> dict[str, Any]:
    """Tune's parameter space, with one member for each of the first points."""
    points = config.first_points()

    def value(name: str) -> Any:
        return tune.sample_from(lambda spec: points[spec["config"][NUMBER]][name])

    names = config.active(config.method.kind)
    return {NUMBER: tune.grid_search(list(range(len(points)))), **{name: value(name) for name in names}}
