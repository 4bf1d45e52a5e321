"""[Ray] What workers tell the driver while they work: lines in a queue, heard by a thread of the driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

POLL_S = 0.5


@ray.remote(num_cpus=0)
class Reports:
    """A queue of lines from any number of workers."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.failed = False

    def put(self, line: dict[str, Any]) -> None:
        """Add a line. Workers do not wait for the answer."""
        self.lines.append(line)
        self.failed = self.failed or "failed" in line

    def has_failed(self) -> bool:
        """Whether a worker has reported an error that no retry mends."""
        return self.failed

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all lines."""
        taken, self.lines = self.lines, []
        return taken


@contextmanager
def listening(reports: Any, hear: Callable[[dict[str, Any]], None], tick: Callable[[], None]) -> Iterator[None]:
    """While the block runs, hand every line to `hear`, and call `tick` at each look, from a thread."""
    stop = threading.Event()

    def listen() -> None:
        over = False
        while not over:
            over = stop.wait(POLL_S)
            try:
                lines = ray.get(reports.take.remote())
            except RayError:  # Ray is going away: the block raises the reason
                return
            for line in lines:
                hear(line)
            tick()

    thread = threading.Thread(target=listen, name="hashray-reports", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()  # an interrupt or an error does not wait for the last lines
        raise
    stop.set()
    thread.join()
