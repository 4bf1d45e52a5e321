"""[Ray] What workers report to the driver while they work: lines in a queue that a thread of the driver reads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hashray.errors import RunError
from hashray.progress import Bar, say
from hashray.storage import requests
from hashray.storage.requests import Requests

POLL_S = REPORT_S = 0.5
MAX_RETRIES = 3  # of one piece of work after a lost worker: what kills a worker each time is not retried without end


@ray.remote(num_cpus=0)
class Reports:
    """A queue of lines from any number of workers."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.starts = Counter[int]()
        self.failed = False

    def put(self, line: dict[str, Any]) -> None:
        """Add a line. Workers do not wait for the answer."""
        self.lines.append(line)
        self.failed = self.failed or "failed" in line

    def start(self, index: int) -> int:
        """Note that a piece of work starts; return how often it has started, this time included."""
        self.starts[index] += 1
        self.lines.append({"start": index})
        return self.starts[index]

    def has_failed(self) -> bool:
        """Whether a worker has reported an error that no retry mends."""
        return self.failed

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all lines."""
        taken, self.lines = self.lines, []
        return taken


class Advance:
    """Reports the rows that are done in a piece of work: at most one line in `REPORT_S`, for a line costs as much as a
    small image. What is left at the end is counted when the driver hears that the piece is finished."""

    def __init__(self, reports: Any, index: int) -> None:
        self.reports, self.index, self.rows, self.last_s = reports, index, 0, time.monotonic()

    def __call__(self, rows: int) -> None:
        self.rows += rows
        now = time.monotonic()
        if now - self.last_s >= REPORT_S:
            self.reports.put.remote({"index": self.index, "rows": self.rows})
            self.rows, self.last_s = 0, now


def start_reports() -> Any:
    """A queue on the driver's node: no other node takes it away when it is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Reports.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def send_requests(reports: Any) -> None:
    """Send the driver the requests of this process that it does not know yet, and wait until they are there."""
    sent = requests.take()
    if sent != Requests():
        with suppress(RayError):  # the driver has left
            ray.get(reports.put.remote({"sent": sent}))


@contextmanager
def sending_requests(reports: Any) -> Iterator[None]:
    """Send the driver the requests of the block, however it ends."""
    requests.take()  # by other work of this process
    try:
        yield
    finally:
        send_requests(reports)


class Meter:
    """Rows of finished and of running work together, on the driver's bar.

    Each piece of work (a part, a shard) has an index. Its rows count as it advances; `finish` gives the final number.
    """

    def __init__(self, bar: Bar, piece: str) -> None:
        self.bar, self.piece, self.finished = bar, piece, bar.done
        self.running, self.done = dict[int, int](), set[int]()
        self.starts = Counter[int]()
        self.stopped = False
        self.lock = threading.Lock()

    def hear(self, line: Mapping[str, Any]) -> None:
        """Take a worker's report: it started a piece of work, or advanced in one."""
        if "rows" in line:
            self.advance(line["index"], line["rows"])
            return
        index = line["start"]
        self.starts[index] += 1
        self.bar.started()
        if self.starts[index] > 1:
            with self.lock:
                self.running.pop(index, None)
            say(f"note: {self.bar.title}: {self.piece} {index} runs again, its worker was lost")

    def advance(self, index: int, rows: int) -> None:
        """Count rows of a running piece; late reports of a finished one are ignored."""
        if self.stopped:
            raise RunError(f"{self.bar.title}: stopped")  # in a thread whose result nobody waits for
        with self.lock:
            if index not in self.done:
                self.running[index] = self.running.get(index, 0) + rows
                self._show()

    def finish(self, index: int, rows: int) -> None:
        """Count a finished piece, which had `rows` rows."""
        with self.lock:
            self.done.add(index)
            self.running.pop(index, None)
            self.finished += rows
            self._show()

    def lost(self, index: int | None = None) -> RunError:
        """The error of a piece that lost its worker each time; unset: the piece with the most starts."""
        if index is None:
            index = max(self.starts, key=self.starts.__getitem__)
        return RunError(
            f"{self.bar.title}: {self.piece} {index} lost its worker {MAX_RETRIES + 1} times. Its rows may need "
            "more memory than a worker has, or crash a decoder: look at Ray's logs, then run the same command again"
        )

    def _show(self) -> None:
        self.bar.at(min(self.bar.total, self.finished + sum(self.running.values())))


@contextmanager
def listening(reports: Any, hear: Callable[[dict[str, Any]], None], tick: Callable[[], None]) -> Iterator[None]:
    """While the block runs, hand every line to `hear`, and call `tick` at each look, from a thread.

    A line {"sent": Requests} is counted here instead.
    """
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
                if "sent" in line:
                    requests.add(line["sent"])
                else:
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
