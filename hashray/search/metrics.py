"""What the service counts, in Prometheus's format, and its log: JSON lines on standard error. No Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("hashray_requests", "Requests", ["route", "status"], registry=r)
        self.request_s = Histogram(
            "hashray_request_seconds", "Time of a request", ["route"], registry=r, buckets=SECONDS
        )
        self.stage_s = Histogram("hashray_stage_seconds", "Time of a step", ["stage"], registry=r, buckets=SECONDS)
        self.batch = Histogram("hashray_batch_queries", "Queries searched together", registry=r, buckets=QUERIES)
        self.in_flight = Gauge("hashray_in_flight_requests", "Requests at work or waiting", registry=r)
        self.queued = Gauge("hashray_queued_queries", "Queries at work or waiting", registry=r)
        self.rejected = Counter("hashray_rejected", "Requests refused", ["reason"], registry=r)
        self.degraded = Counter("hashray_degraded", "Answers without some shards", registry=r)
        self.cache = Counter("hashray_cache_requests", "Lookups in a cache", ["cache", "result"], registry=r)
        self.version = Gauge("hashray_index_version", "Version that is served", ["index"], registry=r)
        self.rows = Gauge("hashray_index_rows", "Rows of the version that is served", ["index"], registry=r)
        self.reloads = Counter("hashray_reloads", "Changes of the version", ["index", "result"], registry=r)
        self.ready = Gauge("hashray_ready", "1 while queries are answered", registry=r)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a step: decode, encode, search or describe."""
        start_s = perf_counter()
        try:
            yield
        finally:
            self.stage_s.labels(name).observe(perf_counter() - start_s)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


def log(event: str, level: str = "info", **fields: Any) -> None:
    """Write one JSON line to standard error."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": time, "level": level, "event": event, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)
