"""The files that an interrupted `hashray verify` has checked: the next one goes on with the others.

CACHE/verify/<hash>.jsonl    a line a file; removed at the end, and not used a day after it was last written
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from pathlib import Path

DAY_S = 86_400.0


class Journal:
    """The checked files of one artifact: what is known of each, by name and sha256."""

    def __init__(self, cache: Path, url: str, manifest_id: str) -> None:
        """Read what an interrupted run has left in `cache`."""
        self._path = cache / "verify" / f"{hashlib.sha256(f'{url} {manifest_id}'.encode()).hexdigest()[:32]}.jsonl"
        self._lock = threading.Lock()
        self.known: dict[str, bool] = {}
        try:
            if time.time() - self._path.stat().st_mtime < DAY_S:
                for line in self._path.read_text().splitlines():
                    facts = json.loads(line)
                    self.known[facts["file"]] = facts["has_ids"]
        except (OSError, ValueError, KeyError, TypeError):  # none there, or its last line is cut off
            pass

    def add(self, file: str, has_ids: bool) -> None:
        """Note a file that is whole."""
        try:
            with self._lock:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as journal:
                    journal.write(json.dumps({"file": file, "has_ids": has_ids}) + "\n")
        except OSError:  # the cache cannot be written: an interrupted run begins again
            pass

    def end(self) -> None:
        """Forget all: the run has come to its end."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
