"""What the chaos tests share: a cluster whose worker nodes come and go, and the table of what that costs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Nodes, as_text, processor

RESULT = "HASHRAY_CHAOS_RESULT"  # where the table goes as JSON, if this is set
OBJECT_STORE_BYTES = 100 << 20


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """A cluster without worker nodes. In /tmp: a socket's path may not be long."""
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        running = Nodes(Path(folder))
        running.cluster.up(0, 1, 0, False, OBJECT_STORE_BYTES)
        try:
            yield running
        finally:
            running.cluster.down()


@pytest.fixture(scope="session")
def table() -> Iterator[list[dict[str, Any]]]:
    """A list for one entry a stage and event; printed at the end, and written where HASHRAY_CHAOS_RESULT says."""
    entries: list[dict[str, Any]] = []
    yield entries
    print("\n" + as_text(entries), file=sys.stderr)
    if entries and (target := os.environ.get(RESULT)):
        kept = {"cores": os.cpu_count(), "processor": processor(), "runs": entries}
        Path(target).write_text(json.dumps(kept, indent=1) + "\n")
