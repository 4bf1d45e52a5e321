"""A set of rows of one shard, one bit a row: the deleted ones, those that a filter keeps. No Ray.

deleted/<sha256>.bin    the bits, row i in bit i % 8 of byte i // 8 (FAISS's order), compressed by zlib
"""

from __future__ import annotations

import zlib
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

from hashray.errors import CorruptArtifact

LEVEL = 6
ROWS_AT_ONCE = 1 << 23  # unpacked at a time


@final
class Bitmap:
    """A set of rows 0 to `rows` - 1. Constant."""

    def __init__(self, rows: int, bits: NDArray[np.uint8]) -> None:
        """Take bits uint8 [ceil(rows / 8)], the unused ones of the last byte 0."""
        assert bits.shape == (-(-rows // 8),), (rows, bits.shape)
        self.rows, self.bits = rows, bits

    @classmethod
    def of(cls, rows: int, positions: NDArray[np.int64]) -> Bitmap:
        """The set of some positions int64 [m], in any order.

        >>> Bitmap.of(10, np.array([9, 3])).positions()
        array([3, 9])
        """
        bits = np.zeros(-(-rows // 8), np.uint8)
        np.bitwise_or.at(bits, positions >> 3, np.uint8(1) << (positions & 7).astype(np.uint8))
        return cls(rows, bits)

    @classmethod
    def of_mask(cls, mask: NDArray[np.bool_]) -> Bitmap:
        """The set of the rows where mask bool [rows] is true."""
        return cls(len(mask), np.packbits(mask, bitorder="little"))

    @cached_property
    def count(self) -> int:
        """The number of rows in the set."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def __contains__(self, position: int) -> bool:
        return bool(self.bits[position >> 3] >> (position & 7) & 1)

    def contains(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some positions, of any shape, are in the set; none of -1 is."""
        inside = np.maximum(positions, 0)
        return (self.bits[inside >> 3] >> (inside & 7).astype(np.uint8) & 1).astype(bool) & (positions >= 0)

    def positions(self) -> NDArray[np.int64]:
        """The rows of the set int64 [count], ascending."""
        step = ROWS_AT_ONCE // 8
        pieces = [
            np.flatnonzero(np.unpackbits(self.bits[start : start + step], bitorder="little")) + 8 * start
            for start in range(0, len(self.bits), step)
        ]
        return np.concatenate([np.empty(0, np.int64), *pieces])

    def __or__(self, other: Bitmap) -> Bitmap:
        return Bitmap(self.rows, self.bits | other.bits)

    def __and__(self, other: Bitmap) -> Bitmap:
        return Bitmap(self.rows, self.bits & other.bits)

    def __sub__(self, other: Bitmap) -> Bitmap:
        return Bitmap(self.rows, self.bits & ~other.bits)

    def __le__(self, other: Bitmap) -> bool:
        return not (self.bits & ~other.bits).any()

    def __invert__(self) -> Bitmap:
        bits = ~self.bits
        if self.rows % 8:
            bits[-1] &= (1 << self.rows % 8) - 1
        return Bitmap(self.rows, bits)

    def to_bytes(self) -> bytes:
        """The bytes of its file: a few for a few rows, at most about rows / 8."""
        return zlib.compress(self.bits.tobytes(), LEVEL)

    @classmethod
    def from_bytes(cls, data: bytes, rows: int, count: int, name: str) -> Bitmap:
        """The set of `count` rows in the bytes of `to_bytes`; `name` is for the error.

        Raises:
            CorruptArtifact: these are no such bytes.
        """
        try:
            bits = np.frombuffer(zlib.decompress(data), np.uint8)
            bitmap = cls(rows, bits) if len(bits) == -(-rows // 8) else None
        except zlib.error:
            bitmap = None
        if bitmap is None or bitmap.count != count or not bitmap <= ~cls(rows, np.zeros_like(bitmap.bits)):
            raise CorruptArtifact(f"{name} is no bitmap of {count:,} of {rows:,} rows")
        return bitmap
