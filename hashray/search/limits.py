"""What one request may ask for, and how many may be at work: the rest is refused at once, not queued. No Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from hashray.config import Config
from hashray.errors import HashrayError

MIB = 1 << 20


class LimitsConfig(Config):
    """The limits of the service."""

    k: int = Field(1000, ge=1, description="Most neighbours of one answer")
    offset: int = Field(10_000, ge=1, description="Deepest neighbour of a query: offset + k")
    batch: int = Field(256, ge=1, description="Most queries of one request")
    together: int = Field(64, ge=1, description="Most queries that are searched or encoded together")
    body_mib: int = Field(32, ge=1, description="Largest body of a request in MiB")
    pixels: int = Field(50_000_000, ge=1, description="Most pixels of an image")
    timeout_s: float = Field(10.0, gt=0, description="Longest time of a request in seconds")
    queries: int = Field(256, ge=1, description="Most queries at work or waiting at a time; above: 429")
    bodies_mib: int = Field(256, ge=1, description="Most bytes of bodies in memory at a time in MiB; above: 429")


class Refused(HashrayError):
    """A request is refused: `status` is HTTP's; `retry_after_s`: when it may come again."""

    def __init__(self, status: int, text: str, retry_after_s: int | None = None) -> None:
        super().__init__(text)
        self.status, self.retry_after_s = status, retry_after_s


class Admission:
    """Counts queries and bytes at work, and refuses more than the limits: an answer that comes too late helps nobody.

    For one event loop: nothing here waits or locks.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits, self.queries, self.bytes = limits, 0, 0

    def check(self) -> None:
        """Refuse a query whose body has not been read yet: what is refused must cost little.

        Raises:
            Refused: 429 where no place is left.
        """
        if self.queries >= self.limits.queries:
            raise _overloaded(f"{self.queries:,} queries are at work or waiting")

    @contextmanager
    def body(self, size_bytes: int) -> Iterator[None]:
        """Hold `size_bytes` of memory for a body.

        Raises:
            Refused: 413 for a body above the limit, 429 where too much is held.
        """
        if size_bytes > self.limits.body_mib * MIB:
            raise Refused(413, f"the body has {size_bytes:,} bytes; at most {self.limits.body_mib} MiB are taken")
        if self.bytes + size_bytes > max(self.limits.bodies_mib, self.limits.body_mib) * MIB:
            raise _overloaded("too many bytes of requests are at work")
        self.bytes += size_bytes
        try:
            yield
        finally:
            self.bytes -= size_bytes

    @contextmanager
    def work(self, count: int) -> Iterator[None]:
        """Hold places for `count` queries.

        Raises:
            Refused: 429 where there are too few; a batch is always taken where nothing else is at work.
        """
        if self.queries and self.queries + count > self.limits.queries:
            raise _overloaded(f"{self.queries:,} queries are at work or waiting")
        self.queries += count
        try:
            yield
        finally:
            self.queries -= count


def _overloaded(why: str) -> Refused:
    return Refused(429, f"the service is overloaded: {why}. Try again in a second", 1)
