"""The order in which trials report, whichever of them is ready first. No Ray.

A scheduler such as ASHA and a searcher such as TPE decide by what they have been told so far, so a sweep comes out
again only if they are told in the same order. Here that order is the one of a machine on which every pass over the
images takes equally long: of all trials in flight, the one whose report is due first in epochs is told first (of
equal ones, the one that was drawn first), and those that are ready earlier wait. Nothing here decides anything.
A population is told in step (tune/population.py), and its members wait for nobody here (`at_once` = 0).
"""

from __future__ import annotations


class Turns:
    """Who may report next.

    Args:
        at_once: trials in flight as long as there are so many left.
        trials: how many there will be.
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
        """The trial drawn as `number` sets out for its report after `until` epochs in all.

        Again for the same report, if its process was lost on the way, even if its turn had come: nobody has been told
        anything since.
        """
        self.number[trial] = number
        self.arrived.discard(trial)
        self.due[trial] = self.start.setdefault(trial, self.now) + until

    def arrive(self, trial: str) -> None:
        """A trial is ready to report."""
        self.arrived.add(trial)

    def end(self, trial: str) -> None:
        """A trial will report no more."""
        self.ended.add(trial)
        self.arrived.discard(trial)
        self.due.pop(trial, None)

    def next(self) -> str | None:
        """The trial that reports now, if every trial that could come before it is known; it is then on its way."""
        if not self.due or len(self.due) < min(self.at_once, self.trials - len(self.ended)):
            return None
        coming = self.due if self.at_once else self.arrived
        first = min(coming, key=lambda trial: (self.due[trial], self.number[trial]), default=None)
        if first is None or first not in self.arrived:
            return None
        self.now = self.due.pop(first)
        self.arrived.discard(first)
        return first
