"""A fixed order for the reports of trials, independent of their speed. No Ray.

A scheduler such as ASHA and a searcher such as TPE decide from the reports so far, so a sweep is reproducible only if
the reports arrive in the same order. The order here is that of a machine on which every epoch takes the same time: of
the trials in flight, the one with the earliest due report, counted in epochs, reports first. Ties go to the trial with
the lower number, and a trial that is ready early waits. This file decides nothing else.
The members of a population exchange weights in step (tune/population.py). They do not wait here (`at_once` = 0).
"""

from __future__ import annotations


class Turns:
    """Decides which trial reports next.

    Args:
        at_once: number of trials in flight, while that many are left; 0 for a population.
        trials: number of trials in all.
    """

    def __init__(self, at_once: int, trials: int) -> None:
        self.at_once, self.trials = at_once, trials
        self.now = 0
        self.number: dict[str, int] = {}
        self.start: dict[str, int] = {}
        self.due: dict[str, int] = {}
        self.arrived: set[str] = set()
        self.ended: set[str] = set()

    def enter(self, trial: str, number: int, until: int) -> None:
        """Register that trial `number` trains towards its report after `until` epochs in all.

        A trial that lost its process enters again for the same report, even if its turn had come. This is safe because
        no other trial has reported since.
        """
        self.number[trial] = number
        self.arrived.discard(trial)
        self.due[trial] = self.start.setdefault(trial, self.now) + until

    def arrive(self, trial: str) -> None:
        """Register that a trial is ready to report."""
        self.arrived.add(trial)

    def end(self, trial: str) -> None:
        """Register that a trial has ended."""
        self.ended.add(trial)
        self.arrived.discard(trial)
        self.due.pop(trial, None)

    def next(self) -> str | None:
        """Take the trial that reports now; None while an earlier report could still come."""
        if not self.due or len(self.due) < min(self.at_once, self.trials - len(self.ended)):
            return None
        coming = self.due if self.at_once else self.arrived
        first = min(coming, key=lambda trial: (self.due[trial], self.number[trial]), default=None)
        if first is None or first not in self.arrived:
            return None
        self.now = self.due.pop(first)
        self.arrived.discard(first)
        return first
