"""Progress of long work: a bar with rate and ETA on a terminal, JSON lines elsewhere; never from a worker."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

JSON_INTERVAL_S = 2.0
WAITING_INTERVAL_S = 10.0
console = Console(stderr=True)
_verbose = False


class Bar:
    """`with Bar("encode", total, "rows") as bar: bar.add(1024)`. Without a terminal it prints JSON lines.

    Several threads may report. The rate counts from the first report after the start, so that the time in which
    workers start does not slow it down.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.start_s, self.start_done, self.last_s = time.monotonic(), done, 0.0
        self.wait: str | None = None
        self.printed = -1
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        if console.is_terminal:
            columns = [TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(),
                       TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]  # fmt: skip
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total, completed=self.done, rate="")
        return self

    def add(self, count: int, **notes: Any) -> None:
        """Count `count` more units; `notes` are shown beside the rate."""
        with self._lock:
            self.at(self.done + count, **notes)

    def at(self, done: int, **notes: Any) -> None:
        """Set how many units are done; `notes` are shown beside the rate."""
        with self._lock:
            self.wait, self.done = None, done
            elapsed = max(time.monotonic() - self.start_s, 1e-6)
            rate = (self.done - self.start_done) / elapsed
            if self._progress is not None and self._task is not None:
                text = f"{rate:,.0f} {self.unit}/s" + "".join(f"  {key} {value}" for key, value in notes.items())
                self._progress.update(self._task, completed=self.done, rate=text)
            elif elapsed - self.last_s >= JSON_INTERVAL_S or self.total <= self.done != self.printed:
                self.last_s, self.printed = elapsed, self.done
                left = (self.total - self.done) / rate if rate > 0 else None
                self._print({"unit": self.unit, "per_s": round(rate, 1), "eta_s": left and round(left, 1), **notes})

    def waiting(self, what: str) -> None:
        """Say what the work waits for, until it starts; called again and again, say it now and then."""
        with self._lock:
            new, self.wait = self.wait is None, what
            waited_s = time.monotonic() - self.start_s
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, rate=f"waiting for {what}")
            elif new or waited_s - self.last_s >= JSON_INTERVAL_S:
                self.last_s = waited_s
                self._print({"waiting_for": what, "waited_s": round(waited_s, 1)})

    def started(self) -> None:
        """The work starts now: what was waited for is no part of the rate."""
        with self._lock:
            if self.wait is not None:
                self.wait, self.start_s, self.start_done, self.last_s = None, time.monotonic(), self.done, 0.0
                if self._progress is not None and self._task is not None:
                    self._progress.reset(self._task, completed=self.done, rate="")

    def tick(self) -> None:
        """Called now and then: says again what the work still waits for."""
        with self._lock:
            if self.wait is not None and time.monotonic() - self.start_s - self.last_s >= WAITING_INTERVAL_S:
                self.waiting(self.wait)

    def resume_at(self, done: int) -> None:
        """Go on from `done` units: what was done before is no part of the rate."""
        self.done = self.start_done = done

    def _print(self, fields: dict[str, Any]) -> None:
        line = {"stage": self.title, "done": self.done, "total": self.total, **fields}
        print(json.dumps(line, default=str), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()


def be_verbose() -> None:
    """From here on, say the requests of each stage also on a terminal, and also where there were none."""
    global _verbose
    _verbose = True


def show_requests(stage: str, counts: Mapping[str, int]) -> None:
    """Show what a stage asked of S3: a JSON line without a terminal; on one, a line of text if the user wants it."""
    if not console.is_terminal:
        if _verbose or any(counts.values()):
            print(json.dumps({"event": "requests", "stage": stage, **counts}), file=sys.stderr, flush=True)
    elif _verbose:
        text = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
        say(f"{stage}: requests to S3: {text}")


def say(text: str) -> None:
    """One line for the person who started this, on standard error."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A closing table on standard output. Cells are shown as they are: no markup, and no control characters."""
    table = Table(title=_plain(title))
    for i, column in enumerate(columns):
        table.add_column(_plain(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    Console().print(table)


def _plain(text: str) -> Text:
    """Text that commands no terminal: a control character of an id becomes its escape."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
