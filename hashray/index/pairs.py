"""All pairs of codes within some bits of each other, exact: the pigeonhole principle on sorted pieces. No Ray.

Codes that differ in at most d bits are equal in one of d + 1 pieces at least. So the codes are sorted by each piece in
turn, and only codes that are equal in it are compared. A pair that several pieces give is kept by the first of them.
Which bits make which piece is free: of some ways to deal them out, the one with the fewest comparisons on a sample is
taken, since bits of trained codes are neither balanced nor independent. Where no way beats comparing all codes with
all, that is done.

Against FAISS's range search and `hammingbird` (PyPI): benchmarks/duplicates.py, docs/INDEX.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes, as_codes, pad_width

Words = NDArray[np.uint64]
Positions = NDArray[np.int64]

SAMPLE = 1 << 15  # codes on which ways to deal out the bits are compared
WAYS = 8
SHORT_RUN = 192  # rows to compare with: up to here all together, above in tiles of a matrix
TILE_ROWS, TILE_COLUMNS = 32, 4096  # 1 MiB of XORs: 1.2 ns a comparison, 3.8 at 64 x 2048 (Xeon, AVX512)
AT_ONCE = 1 << 17  # comparisons of short runs at a time: a third less time than 1 << 20
YIELD = 1 << 22  # pairs in one answer, about
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows: left int64 [p], right int64 [p] and their distance uint16 [p], in bits."""

    left: Positions
    right: Positions
    distance: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.left)


def pairs_within(codes: Codes, within: int, others: Codes | None = None, seed: int = 0) -> Iterator[Pairs]:
    """Yield every pair of rows that differ in at most `within` bits, once, in blocks, in no order.

    Args:
        codes: packed codes uint8 [n, b].
        within: largest distance, in bits.
        others: packed codes uint8 [m, b]; then `right` is a row of these. Unset: pairs inside `codes`, left < right.
        seed: of the ways to deal out the bits; the answer does not depend on it.

    Memory: about 40 bytes a code, and a block of some million pairs.

    >>> codes = np.array([[0b0000], [0b0001], [0b1110]], np.uint8)
    >>> [(pairs.left.tolist(), pairs.right.tolist(), pairs.distance.tolist()) for pairs in pairs_within(codes, 1)]
    [([0], [1], [1])]
    """
    left = to_words(codes)
    right = None if others is None else to_words(others)
    if not len(left) or (right is not None and not len(right)):
        return
    pieces = _choose_pieces(left, right, within, as_codes(codes).shape[1] * 8, seed)
    waiting, count = list[Pairs](), 0
    for number in range(len(pieces)):
        for block in _of_piece(left, right, within, pieces, number):
            waiting.append(block)
            count += len(block)
            if count >= YIELD:
                yield _joined(waiting)
                waiting, count = [], 0
    if count:
        yield _joined(waiting)


def to_words(codes: Codes) -> Words:
    """Codes uint8 [n, b] as 64-bit words [n, w], with zero bits at the end; only XOR and popcount may look at them."""
    array = as_codes(codes)
    return pad_width(array, -(-array.shape[1] // 8) * 8).view(np.uint64)


def distances(left: Words, right: Words) -> NDArray[np.uint16]:
    """Hamming distances uint16 of words [..., w] that are broadcast together."""
    counts = np.bitwise_count(left[..., 0] ^ right[..., 0]).astype(np.uint16)
    for word in range(1, left.shape[-1]):
        counts += np.bitwise_count(left[..., word] ^ right[..., word])
    return counts


def _choose_pieces(left: Words, right: Words | None, within: int, num_bits: int, seed: int) -> Words:
    """Masks uint64 [pieces, w] of disjoint bits: `within` + 1 of them, or one of no bits, which all codes share."""
    everything = np.zeros((1, left.shape[1]), np.uint64)
    if within + 1 > num_bits:
        return everything
    rng = np.random.default_rng(seed)
    some = left[np.sort(rng.choice(len(left), min(SAMPLE, len(left)), replace=False, shuffle=False))]
    ones = np.unpackbits(some.view(np.uint8), axis=1)[:, :num_bits].mean(0)
    by_balance = np.argsort(np.abs(ones - 0.5), kind="stable")
    best, fewest = everything, len(some) * (len(some) - 1) / 2
    for way in range(WAYS):
        # The most balanced bits are dealt out first, in rounds: every piece gets as many of them as the others.
        order = by_balance if way == 0 else np.concatenate(
            [rng.permutation(part) for part in np.array_split(by_balance, -(-num_bits // (within + 1)))]
        )  # fmt: skip
        bits = np.zeros((within + 1, left.shape[1] * 64), np.uint8)
        bits[np.arange(num_bits) % (within + 1), order] = 1
        pieces = np.packbits(bits, axis=1).view(np.uint64)
        count = sum(_equal_pairs(keys_of(some, piece)) for piece in pieces)
        if count < fewest:
            best, fewest = pieces, count
    return best


def keys_of(words: Words, mask: Words) -> NDArray[np.uint64]:
    """Keys uint64 [n] that are equal where the bits of the mask uint64 [w] are; rarely elsewhere too."""
    keys = np.zeros(len(words), np.uint64)
    for word in np.flatnonzero(mask):
        keys = keys * MIX + (words[:, word] & mask[word])
    return keys


def _equal_pairs(keys: NDArray[np.uint64]) -> float:
    counts = np.unique(keys, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())


def _of_piece(left: Words, right: Words | None, within: int, pieces: Words, number: int) -> Iterator[Pairs]:
    keys = keys_of(left, pieces[number])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if right is None:
        others, low = order, np.arange(1, len(order) + 1)
        high = np.searchsorted(keys, keys, side="right")
    else:
        other_keys = keys_of(right, pieces[number])
        others = np.argsort(other_keys, kind="stable")
        other_keys = other_keys[others]
        low, high = (np.searchsorted(other_keys, keys, side=side) for side in ("left", "right"))
    side_a, side_b = left[order], (left if right is None else right)[others]
    runs = (side_a, side_b, low, high, within)
    for rows, columns, near in chain(_short_runs(*runs), _long_runs(*runs)):
        new = _is_new(side_a[rows] ^ side_b[columns], pieces[:number])
        a, b = order[rows[new]], others[columns[new]]
        if right is None:
            a, b = np.minimum(a, b), np.maximum(a, b)
        yield Pairs(a, b, near[new])


def _is_new(differ: Words, before: Words) -> NDArray[np.bool_]:
    """Which pairs, as XORs [p, w], are equal in none of the pieces before."""
    new = np.ones(len(differ), bool)
    for piece in before:
        shared = np.zeros(len(differ), np.uint64)
        for word in np.flatnonzero(piece):
            shared |= differ[:, word] & piece[word]
        new &= shared != 0
    return new


Hits = Iterator[tuple[Positions, Positions, NDArray[np.uint16]]]  # rows, columns, distances


def _short_runs(side_a: Words, side_b: Words, low: Positions, high: Positions, within: int) -> Hits:
    """Compare each row with the few that have its key."""
    counts = np.where(high - low <= SHORT_RUN, high - low, 0)
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    start = 0
    while start < len(rows):
        base = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + AT_ONCE, side="right")))
        some, many = rows[start:stop], counts[rows[start:stop]]
        before = np.cumsum(many) - many
        left = np.repeat(some, many)
        right = np.arange(len(left)) + np.repeat(low[some] - before, many)
        near = distances(side_a[left], side_b[right])
        hits = np.flatnonzero(near <= within)
        yield left[hits], right[hits], near[hits]
        start = stop


def _long_runs(side_a: Words, side_b: Words, low: Positions, high: Positions, within: int) -> Hits:
    """Compare the rows of each long run in tiles of a matrix."""
    rows = np.flatnonzero(high - low > SHORT_RUN)
    if not len(rows):
        return
    cuts = np.flatnonzero((np.diff(high[rows]) != 0) | (np.diff(rows) != 1)) + 1
    columns_of = np.ascontiguousarray(side_b.T)
    for run in np.split(rows, cuts):
        for top in range(run[0], run[-1] + 1, TILE_ROWS):
            bottom = min(top + TILE_ROWS, run[-1] + 1)
            for first in range(int(low[top]), int(high[top]), TILE_COLUMNS):
                last = min(first + TILE_COLUMNS, int(high[top]))
                near = np.bitwise_count(side_a[top:bottom, :1] ^ columns_of[0, first:last])
                for word in range(1, side_a.shape[1]):
                    more = np.bitwise_count(side_a[top:bottom, word, None] ^ columns_of[word, first:last])
                    near = near.astype(np.uint16) + more
                # Of a matrix over one set of rows the lower half holds each pair again, and each row with itself.
                hits = np.flatnonzero(near <= within)
                left, right = np.divmod(hits, last - first)
                left, right = left + top, right + first
                keep = right >= low[left]
                yield left[keep], right[keep], near.ravel()[hits[keep]].astype(np.uint16)


def _joined(blocks: Sequence[Pairs]) -> Pairs:
    return Pairs(
        np.concatenate([block.left for block in blocks]),
        np.concatenate([block.right for block in blocks]),
        np.concatenate([block.distance for block in blocks]),
    )
