"""[Ray] The segments of a trial. A segment leads from one report to the next and depends on config and start only.

The end state of a segment is stored in <out>/trials/<plan>/<number>-<run>/<epochs>/. <plan> is the hash of the sweep,
and <run> is the hash of everything that the weights of the trial depend on. A stored segment is read and not trained
again. A rerun therefore repeats the same reports in the same order from these files, up to the point where the sweep
stopped, and continues from there. Searcher and scheduler need no files for their state. Ray's restore is not used
because it brings back searcher and trials but not the scheduler (TuneController.__getstate__ omits it, also in 2.60.0;
ray#30838).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from hashray.artifact import canonical
from hashray.storage import join, open_store, requests
from hashray.storage.requests import Requests
from hashray.train.checkpoint import FILE, Position
from hashray.train.job import TrainJob
from hashray.train.local import fit_here
from hashray.train.run import fit_until

SECONDS = "seconds.json"  # in the folder of a trial: the time that its segments took


@dataclass(frozen=True)
class Segment:
    """One segment of a trial: from the checkpoint at `start`, or from fresh weights, to `until` epochs in all.

    Its files are in the folder `trial`. So is `start`, unless the weights come from another member of a population.
    """

    trial: str
    start: str | None
    until: int

    @property
    def end(self) -> str:
        """Folder of the checkpoint at the end of the segment."""
        return join(self.trial, str(self.until))


def score_of(position: Position) -> float:
    """The score that ranks trials: the best selectable validation so far, or the last one if none is selectable yet."""
    return last_validation(position) if position.best_score is None else position.best_score


def last_validation(position: Position) -> float:
    """The validation score of the weights at a position."""
    return float(position.notes["history"][-1]["validation_map"])


@contextmanager
def _seconds_counted(segment: Segment) -> Iterator[None]:
    """Add the duration to the seconds of the trial, also after a failure. A killed process adds nothing."""
    begin, store = time.monotonic(), open_store(segment.trial)
    try:
        yield
    finally:
        earlier = json.loads(store.read(SECONDS)) if store.exists(SECONDS) else 0.0
        store.write(SECONDS, canonical(earlier + time.monotonic() - begin))


def train_here(job: TrainJob, segment: Segment, tell: Callable[[dict[str, Any]], None]) -> Requests:
    """Train a segment in this process, from its start or from the point of its interruption; `tell` each step.

    Returns:
        the requests that it sent to S3.

    Raises:
        Diverged: the loss is not finite.
    """

    def hear(line: dict[str, Any]) -> None:
        if line["event"] == "progress":
            tell({"epoch": line["epoch"], "step": line["step"], "steps": job.plan.steps})

    requests.take()  # by other work of this process
    with _seconds_counted(segment):
        part = replace(job, start=segment.start, until=segment.until)
        fit_here(part, f"{segment.end}-partial", hear, segment.end)
    return requests.take()


def train_by_ray_train(job: TrainJob, segment: Segment) -> None:
    """Train a segment as a separate Ray Train run, for several workers or for streamed images."""
    # The sweep counts the attempts; each one resumes from the same checkpoints.
    config = job.config.model_copy(update={"max_failures": 0, "ray": "always"})
    with _seconds_counted(segment):
        fit_until(replace(job, config=config, start=segment.start, until=segment.until), segment.end)


def forget_before(segment: Segment, start_too: bool) -> None:
    """Delete checkpoints that nothing resumes from. The last segment holds the lines of all earlier ones."""
    store = open_store(segment.trial)
    for name in ("partial", "fit"):
        store.clear(f"{segment.until}-{name}/")
    if segment.start and start_too:
        open_store(segment.start).delete(FILE)


train_segment = ray.remote(train_here)
