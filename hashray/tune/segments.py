"""[Ray] A trial in segments: from one report to the next, each a function of the config and the state before it.

What a segment ends with is kept under <out>/trials/<plan>/<number>-<run>/<epochs>/, where <plan> is the hash of the
sweep and <run> that of all that the trial's weights depend on. A segment that is there is read, not trained: a sweep
that was killed and is run again goes through the same reports in the same order, from these files, up to where it
stopped, and on from there. So the searcher and the scheduler need no state of their own on disk. (Ray's own restore
brings back the searcher and the trials but no scheduler: TuneController.__getstate__ leaves it out, 2.60.0 as well,
ray#30838.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray

from hashray.artifact import canonical
from hashray.storage import join, open_store
from hashray.train.checkpoint import STATE, TENSORS, Position
from hashray.train.job import TrainJob
from hashray.train.local import fit_here
from hashray.train.run import fit_until

SECONDS = "seconds.json"  # of a trial: what its segments took


@dataclass(frozen=True)
class Segment:
    """One segment of a trial: from the checkpoint at `start`, or the beginning, for `until` epochs in all.

    Its files lie under `trial`, where `start` does too, unless these are another's weights (tune/population.py).
    """

    trial: str
    start: str | None
    until: int

    @property
    def end(self) -> str:
        """Where the checkpoint that it ends with lies."""
        return join(self.trial, str(self.until))


def ended_at(end: str) -> Position | None:
    """Where the segment that ends there did, the lines of every pass so far in its notes; None where it has not."""
    store = open_store(end)
    return Position(**json.loads(store.read(STATE))["position"]) if store.exists(STATE) else None


def score_of(position: Position) -> float:
    """What trials are compared by: the best validation so far, the last one where none may be chosen from yet."""
    return last_validation(position) if position.best_score is None else position.best_score


def last_validation(position: Position) -> float:
    """What the weights of a position scored."""
    return float(position.notes["history"][-1]["validation_map"])


@contextmanager
def _seconds_counted(segment: Segment) -> Iterator[None]:
    """Add the seconds that this takes to those of the trial, also where it fails; a killed process adds none."""
    begin, store = time.monotonic(), open_store(segment.trial)
    try:
        yield
    finally:
        earlier = json.loads(store.read(SECONDS)) if store.exists(SECONDS) else 0.0
        store.write(SECONDS, canonical(earlier + time.monotonic() - begin))


def train_here(job: TrainJob, segment: Segment) -> None:
    """Train a segment in this process, from the state before it or from where it was interrupted.

    Raises:
        Diverged: the loss is not finite.
    """
    with _seconds_counted(segment):
        job = replace(job, start=segment.start, until=segment.until)
        fit_here(job, f"{segment.end}-partial", lambda line: None, segment.end)


def train_by_ray_train(job: TrainJob, segment: Segment) -> None:
    """Train a segment as a Ray Train run of its own, for several workers or images that are streamed."""
    # The sweep counts attempts, and resumes from the same checkpoints.
    config = job.config.model_copy(update={"max_failures": 0, "ray": "always"})
    with _seconds_counted(segment):
        fit_until(replace(job, config=config, start=segment.start, until=segment.until), segment.end)


def forget_before(segment: Segment, start_too: bool) -> None:
    """Delete what nothing goes on from any more; the lines of earlier segments are in the last one's."""
    store = open_store(segment.trial)
    for name in ("partial", "fit"):
        store.clear(f"{segment.until}-{name}/")
    if segment.start and start_too:
        open_store(segment.start).delete(TENSORS)


train_segment = ray.remote(train_here)
