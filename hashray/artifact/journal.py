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
        self.known = self._read()

    def _read(self) -> dict[str, bool]:
        known: dict[str, bool] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none there, or its last line is cut off
            if time.time() - self._path.stat().st_mtime < DAY_S:
                for line in self._path.read_text().splitlines():
                    facts = json.loads(line)
                    known[facts["file"]] = facts["has_ids"]
        return known

    def add(self, file: str, has_ids: bool) -> None:
        """Note a file that is whole; where the cache cannot be written, an interrupted run begins again."""
        with self._lock, contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as journal:
                journal.write(json.dumps({"file": file, "has_ids": has_ids}) + "\n")

    def end(self) -> None:
        """Forget all: the run has come to its end."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
