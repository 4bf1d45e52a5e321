"""[Ray] Population-based training: Ray's own, in step, with draws that come out again.

After every `grace_epochs` epochs the worst quarter of the population go on from the weights of members of the best
quarter, at points a little off theirs (Jaderberg et al. 2017). Ray decides; what is added here is that its random
numbers depend on the seed, the member and the pass alone, and that a member's point says where it came from: so a
sweep that is run again goes through the same exchanges, and a member is a training config with changes.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from hashray.errors import ConfigError
from hashray.tune.space import NUMBER, ORIGIN, Dimension, SweepConfig, grace_epochs, values_of

WORST = -1.0  # score of a member that has failed: it goes on from another's weights


class Population(PopulationBasedTraining):
    """Ray's scheduler for a sweep whose trials all train for `epochs`."""

    def __init__(self, config: SweepConfig, epochs: int, time_attr: str) -> None:
        self.config, self.epochs = config, epochs
        self.dimensions = config.active(config.method.kind)
        super().__init__(
            time_attr=time_attr, perturbation_interval=grace_epochs(config.search, epochs), synch=True,
            hyperparam_mutations={name: _mutation(dimension) for name, dimension in self.dimensions.items()},
            log_config=False,
        )  # fmt: skip

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[self._time_attr] >= self.epochs:  # nothing is to be trained after an exchange at the very end
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: Any, lower_quantile: Any
    ) -> None:
        # The weights lie where the point says, so Tune has no checkpoint to save, to wait for or to miss.
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
        except ConfigError:  # each value is in its range, but they do not go together
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
    """Tune's parameter space: a member for each of the first points."""
    points = config.first_points()

    def value(name: str) -> Any:
        return tune.sample_from(lambda spec: points[spec["config"][NUMBER]][name])

    names = config.active(config.method.kind)
    return {NUMBER: tune.grid_search(list(range(len(points)))), **{name: value(name) for name in names}}
