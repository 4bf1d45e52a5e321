"""An object of a store as a read-only file of which only the ranges that are asked for are read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

TAIL_BYTES = 64 << 10  # what pyarrow looks at first: the footer of most Parquet files
FETCH_THREADS = 8

Span = tuple[int, int]  # first byte, and the byte after the last


class RangedFile(io.RawIOBase):
    """An object as an unbuffered file: a read is one request for exactly its bytes, or comes from memory.

    In memory are `data`, the block that the object was opened with, and what `fetch` read last.

    Args:
        read: returns up to `length` bytes from byte `start`, as `Store.read_range` does.
        size_bytes: of the whole object.
        start: where in the object `data` begins.
        keep: whether `data` stays in memory after it was read to its end.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], size_bytes: int, start: int, data: bytes, keep: bool = True
    ) -> None:
        self._read, self._size, self._position, self._keep = read, size_bytes, 0, keep
        self._opened, self._fetched = [(start, data)], list[tuple[int, bytes]]()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        if self.closed:
            raise ValueError("read of a closed file")
        left = max(0, self._size - self._position)
        data = self._take(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def fetch(self, spans: Iterable[Span]) -> None:
        """Read these spans into memory, several at a time, in place of those of the last call.

        Spans are joined over what lies between them, the smallest gaps first, while that at most doubles the bytes.
        """
        missing = [span for span in spans if self._held(*span) is None]
        joined = join_spans(missing, sum(end - start for start, end in missing))
        if len(joined) > 1:
            with ThreadPoolExecutor(min(FETCH_THREADS, len(joined))) as pool:
                blocks = list(pool.map(lambda span: self._read(span[0], span[1] - span[0]), joined))
        else:
            blocks = [self._read(start, end - start) for start, end in joined]
        self._fetched = [(start, data) for (start, _), data in zip(joined, blocks, strict=True)]

    def _take(self, length: int) -> bytes:
        if length == 0:
            return b""
        start, end = self._position, self._position + length
        data = self._held(start, end)
        if data is None:
            return self._read(start, length)
        if not self._keep and self._opened and end >= self._opened[0][0] + len(self._opened[0][1]):
            self._opened = []
        return data

    def _held(self, start: int, end: int) -> bytes | None:
        for first, data in (*self._opened, *self._fetched):
            if first <= start and end <= first + len(data):
                return data[start - first : end - first]
        return None


def join_spans(spans: Sequence[Span], spare_bytes: int) -> list[Span]:
    """Join spans into fewer, ascending ones, over gaps of at most `spare_bytes` in all, the smallest first.

    >>> join_spans([(0, 10), (10, 20), (25, 30), (90, 95)], 6)
    [(0, 30), (90, 95)]
    """
    ordered = sorted(spans)
    ends = list(accumulate((end for _, end in ordered), max))
    gaps = sorted((max(0, start - end), i) for i, ((start, _), end) in enumerate(zip(ordered[1:], ends, strict=False)))
    joins = set[int]()
    for gap, i in gaps:
        spare_bytes -= gap
        if spare_bytes < 0:
            break
        joins.add(i)
    joined = list[Span]()
    for i, (start, end) in enumerate(ordered):
        if i - 1 in joins:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
