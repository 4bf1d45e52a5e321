"""One index that is served: its newest version is opened beside the last one and swapped in whole. No Ray.

A query takes the open version once, and is answered by it to its end, whatever is swapped meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from hashray.artifact.versions import newest_version, version_key
from hashray.errors import HashrayError, InputError
from hashray.search.metrics import Metrics, log
from hashray.search.nearest import Searchable
from hashray.storage import Store

PINNED = 2  # old versions that stay open for queries that name one


class Served:
    """Follows an index: `at()` is its newest version that could be opened.

    Args:
        name: "main" or "compare".
        opens: opens a version by its number; raises a HashrayError where it cannot.
        version: the one that is served, whatever comes after it; unset: always the newest.
    """

    def __init__(
        self, name: str, store: Store, opens: Callable[[int], Searchable], metrics: Metrics, version: int | None = None
    ) -> None:
        self.name, self.store, self._opens, self._metrics = name, store, opens, metrics
        self._follow = version is None
        self._pinned: OrderedDict[int, Searchable] = OrderedDict()
        self._lock = threading.Lock()
        self.newest = newest_version(store)[0]
        self._current = opens(version or self.newest)
        self._show()

    def at(self, version: int | None = None) -> Searchable:
        """The open version, or an older one, which is opened if need be.

        Raises:
            InputError: there is no such version, or garbage collection has removed its files.
        """
        current = self._current
        if version is None or version == current.facts.version:
            return current
        if not 1 <= version <= self.newest:
            raise InputError(f"version {version} is not there: there are 1 to {self.newest}")
        with self._lock:
            if (kept := self._pinned.get(version)) is None:
                try:
                    kept = self._pinned[version] = self._opens(version)
                except HashrayError as error:
                    log("version not opened", "warning", index=self.name, version=version, error=str(error))
                    raise InputError(f"version {version} cannot be opened: its files may have been removed") from error
            self._pinned.move_to_end(version)
            while len(self._pinned) > PINNED:
                self._pinned.popitem(last=False)
        return kept

    def refresh(self) -> bool:
        """Look for a newer version; open it beside the current one, then serve it. Say whether it changed.

        Where it cannot be opened the current one goes on, and the next call tries again.
        """
        if not self._follow:
            return False
        before = self._current
        try:
            if not self.store.exists(version_key(self.newest + 1)) and self.newest == before.facts.version:
                return False
            self.newest = newest_version(self.store)[0]
            current = self._opens(self.newest)
        except HashrayError as error:
            self._metrics.reloads.labels(self.name, "failed").inc()
            log("reload failed", "error", index=self.name, version=self.newest, error=str(error))
            return False
        self._current = current
        self._metrics.reloads.labels(self.name, "ok").inc()
        self._show()
        log("reloaded", index=self.name, version=current.facts.version, rows=current.facts.rows)
        return True

    def _show(self) -> None:
        self._metrics.version.labels(self.name).set(self._current.facts.version)
        self._metrics.rows.labels(self.name).set(self._current.facts.rows)
