"""Progress of a running sweep: a live table of the best trials on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import heapq
import json
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table

from hashray.progress import WAITING_INTERVAL_S, console, say
from hashray.tune.space import NUMBER, values_of

SHOWN = 8


class Watch:
    """The latest report of every trial, and the time that is left."""

    def __init__(self, trials: int, epochs: int, all_finish: bool = False) -> None:
        self.trials, self.epochs, self.all_finish = trials, epochs, all_finish
        self.start_s, self.before, self.began = time.monotonic(), 0, False
        self.points: dict[int, dict[str, Any]] = {}
        self.at: dict[int, tuple[int, int, float]] = {}
        self.over: dict[int, str] = {}
        self.inside: dict[int, str] = {}
        self.last_s = 0.0
        self.lock = threading.RLock()
        self.live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks at the start of a search. Locks stay here, and so does the live table.
        return self.__dict__ | {"live": None, "lock": None}

    def __enter__(self) -> Watch:
        if console.is_terminal:
            self.live = Live(self._table(), console=console, refresh_per_second=2)
            self.live.start()
        self._print({"waiting_for": "trials to start"})
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def hear(self, line: Mapping[str, Any]) -> None:
        """Show a line of a trial's training: a step inside an epoch, or a lost worker."""
        if "lost" in line:
            say(f"note: trial {line['trial']} goes on from its last checkpoint, after a loss: {line['lost']}")
            return
        with self.lock:
            self.inside[line["trial"]] = f"epoch {line['epoch']}, step {line['step']}/{line['steps']}"

    def tick(self) -> None:
        """Called now and then: shows where the running trials are."""
        with self.lock:
            if self.live is not None:
                self.live.update(self._table())
            elif time.monotonic() - self.last_s >= WAITING_INTERVAL_S:
                self._print({"trials": self.inside} if self.inside else {"waiting_for": "trials to start"})

    def reported(self, point: dict[str, Any], epochs: int, total: int, score: float, trained: bool) -> None:
        """Record a report. `trained` is False if an earlier run of the sweep trained these epochs."""
        with self.lock:
            trial = point[NUMBER]
            self.began = self.began or trained
            self.points[trial] = values_of(point)
            self.at[trial] = epochs, total, score
            self.inside.pop(trial, None)
            self._show(trial)

    def ended(self, point: dict[str, Any], failed: bool) -> None:
        """Record the end of a trial."""
        with self.lock:
            trial = point[NUMBER]
            epochs, total, _ = self.at.get(trial, (0, self.epochs, 0.0))
            self.over[trial] = "failed" if failed else "finished" if epochs >= total else "stopped"
            self.inside.pop(trial, None)
            self._show(trial)

    def eta_s(self) -> float | None:
        """Estimate the remaining seconds from the pace of this run; None before anything is done.

        The pace counts ended trials, or epochs if no trial can stop early.
        """
        done = self._done()
        now = done - self.before
        total = self.trials * (self.epochs if self.all_finish else 1)
        return (time.monotonic() - self.start_s) / now * (total - done) if now else None

    def _done(self) -> int:
        return sum(epochs for epochs, _, _ in self.at.values()) if self.all_finish else len(self.over)

    def _show(self, trial: int) -> None:
        if not self.began:  # epochs of an earlier run are read in an instant and say nothing about the pace
            self.start_s, self.before = time.monotonic(), self._done()
        if self.live is not None:
            self.live.update(self._table())
            return
        epochs, _, score = self.at.get(trial, (0, 0, None))
        best = max((score for _, _, score in self.at.values()), default=None)
        state = self.over.get(trial, "running")
        self._print({"trial": trial, "state": state, "epochs": epochs, "score": score, "best": best})

    def _print(self, fields: dict[str, Any]) -> None:
        self.last_s = time.monotonic()
        if self.live is None:
            eta = self.eta_s()
            line = {"stage": "tune", "done": len(self.over), "total": self.trials, "unit": "trials"}
            print(json.dumps(line | {"eta_s": eta and round(eta, 1)} | fields), file=sys.stderr, flush=True)

    def _table(self) -> Table:
        eta = self.eta_s()
        left = "" if eta is None else f", about {eta / 60:.0f} min left"
        table = Table(title=f"{len(self.over)} of {self.trials} trials{left}", title_justify="left")
        for name in ("trial", "score", "epochs", "state", "point"):
            table.add_column(name, justify="left" if name in ("state", "point") else "right")
        for trial in heapq.nlargest(SHOWN, self.at, key=lambda name: self.at[name][2]):
            epochs, total, score = self.at[trial]
            point = "  ".join(f"{name.rpartition('.')[2]} {short(v)}" for name, v in self.points[trial].items())
            state = self.over.get(trial) or self.inside.get(trial, "running")
            table.add_row(str(trial), f"{score:.4f}", f"{epochs}/{total}", state, point)
        return table


def short(value: Any) -> str:
    """Format a value of a point for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
