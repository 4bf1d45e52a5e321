"""How many requests a stage sent to S3: counted in each process, and carried to the driver with the results.

The counts go to progress lines and are written nowhere else, so no artifact depends on them. Not counted: what Arrow
sends for the checkpoints of Ray Train, what workers sent that were lost, and segments of a sweep that failed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from hashray.progress import show_requests

# Each request on the wire, those of a multipart upload and every retry included.
KINDS = {"Get": "get", "Put": "put", "Upload": "put", "Create": "put", "Complete": "put", "Head": "head",
         "List": "list", "Delete": "delete", "Abort": "delete"}  # fmt: skip


@dataclass(frozen=True)
class Requests:
    """Requests by operation, and the bytes of their bodies."""

    get: int = 0
    put: int = 0
    head: int = 0
    list: int = 0
    delete: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(*(getattr(self, name) + getattr(other, name) for name in _NAMES))

    def __sub__(self, other: Requests) -> Requests:
        return Requests(*(getattr(self, name) - getattr(other, name) for name in _NAMES))


_NAMES = [field.name for field in fields(Requests)]


class _Tally:
    """What this process has counted, and what it was given of others."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts = Counter[str]()
        self.reported = Requests()

    def add(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def total(self) -> Requests:
        with self.lock:
            return Requests(**self.counts)

    def take(self) -> Requests:
        with self.lock:
            counted = Requests(**self.counts)
            new, self.reported = counted - self.reported, counted
            return new


_TALLY = _Tally()


def watch(client: Any) -> None:
    """Count what a boto3 client sends and receives."""

    def sent(request: Any, event_name: str, **_: Any) -> None:
        operation = event_name.rpartition(".")[2]
        kind = next((kind for start, kind in KINDS.items() if operation.startswith(start)), "get")
        _TALLY.add(**{kind: 1, "bytes_up": int(request.headers.get("Content-Length") or 0)})

    def received(response_dict: Any, **_: Any) -> None:
        if response_dict is not None:
            body = response_dict["body"]  # bytes, or the stream of an object
            size = len(body) if isinstance(body, bytes) else response_dict["headers"].get("Content-Length", 0)
            _TALLY.add(bytes_down=int(size))

    client.meta.events.register("before-send.s3", sent)
    client.meta.events.register("response-received.s3", received)


def total() -> Requests:
    """All requests of this process so far, with those of workers whose results came here."""
    return _TALLY.total()


def take() -> Requests:
    """The requests of this process since the last call: a worker carries them to the driver with a result."""
    return _TALLY.take()


def add(requests: Requests) -> None:
    """Count what a worker process has sent."""
    _TALLY.add(**asdict(requests))


@contextmanager
def counting(stage: str) -> Iterator[None]:
    """Show what a stage sent, with all that its workers sent, when it ends; stages inside it count, too."""
    before = total()
    try:
        yield
    finally:
        show_requests(stage, asdict(total() - before))
