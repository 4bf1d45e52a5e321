"""[Ray] Scans of coded rows: an evaluation as a sum over code parts.

A task takes some parts, joins codes and labels inside each, and counts, for every query, items and relevant items at
each distance. The driver adds these integers: exact for any number of rows, in O(queries x bits) of memory. Whatever
needs more than counts sees a sample of the rows, drawn from all parts alike; a database that is not larger than the
sample is kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge as merge_sorted
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.artifact import Manifest
from hashray.codes import Codes
from hashray.data.corpus import Corpus
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.tasks import run_tasks
from hashray.evaluate.sides import CodedSplit, Joined, Near, PartPair, Side, nearest
from hashray.metrics import Merged, count, merge_side
from hashray.progress import Bar
from hashray.storage import Store

TASK_ROWS = 1 << 16
SHORT_ROWS, SHORT_PAIRS = 1_000_000, 2_000_000_000  # some 10 s on one core: Ray takes as long to start

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Target:
    """The distinct queries of a scenario, and the split of the database that they are ranked against."""

    split: str
    queries: Merged


@dataclass(frozen=True)
class Scan:
    """What a scan gives.

    Attributes:
        tables: for each target int64 [m, 2, K+1], irrelevant and relevant items at each distance from its m queries.
        rows: for each target, how many rows were counted.
        side: the rows that were picked, in the order of the codes.
        places: int64 [n], their places among the codes of all parts.
        known: how many rows have known labels. hidden: how many do not, and are not counted.
        taught: bool [c], the classes of the train rows in `parts`, the parts of the corpus that were read.
    """

    tables: list[Ints]
    rows: list[int]
    side: Side
    places: Ints
    known: int
    hidden: int
    taught: NDArray[np.bool_]
    parts: set[int]


@dataclass(frozen=True)
class Scanner:
    """The codes of a split, to be scanned any number of times."""

    split: CodedSplit
    pairs: Sequence[PartPair]
    pool: WorkersConfig

    @property
    def num_rows(self) -> int:
        return sum(int(pair.codes.rows or 0) for pair in self.pairs)

    def scan(self, title: str, targets: Sequence[Target] = (), picks: Ints | None = None) -> Scan:
        """Count the rows for each target, and keep the rows at some places among all (None: every row)."""
        pieces: dict[int, Scan] = {}
        tables: list[Ints] | None = None
        num_queries = sum(len(target.queries.codes) for target in targets)
        for number, piece in self._calls(title, _scan_parts, num_queries, picks, self.split, tuple(targets)):
            tables = _added(tables, piece.tables)
            # Only the sum is kept: a table is as large for few rows as for many. Arrays from a task are views of Ray's
            # store, and one of them would keep the tables there.
            pieces[number] = replace(
                piece, tables=[], side=piece.side.copied(), places=piece.places.copy(), taught=piece.taught.copy()
            )
        ordered = [pieces[number] for number in sorted(pieces)]
        return _together(ordered, tables or [])

    def nearest(self, codes: Codes, split: str, k: int) -> list[list[Near]]:
        """The k rows of a split of the database nearest to each code uint8 [q, b], ascending, ties by id."""
        near: list[list[Near]] = [[] for _ in codes]
        none = np.zeros(0, dtype=np.int64)
        for _, lists in self._calls("nearest rows", _nearest_in_parts, len(codes), none, self.split, codes, split, k):
            near = [list(islice(merge_sorted(old, new), k)) for old, new in zip(near, lists, strict=True)]
        return near

    def _calls(
        self, title: str, function: Callable[..., Any], num_queries: int, picks: Ints | None, *shared: Any
    ) -> Iterator[tuple[int, Any]]:
        rows = self.num_rows
        jobs, sizes = {}, []
        for number, pairs in enumerate(_groups(self.pairs)):
            sizes.append(sum(int(pair.codes.rows or 0) for pair in pairs))
            start = pairs[0].start
            ends = None if picks is None else np.searchsorted(picks, [start, start + sizes[-1]])
            jobs[number] = (pairs, None if ends is None or picks is None else picks[ends[0] : ends[1]])
        short = rows <= SHORT_ROWS and rows * num_queries <= SHORT_PAIRS
        with Bar(title, rows, "rows") as bar:
            meter = Meter(bar, "group of parts")
            for number, result in run_tasks(function, jobs, self.pool, short, meter, shared):
                yield number, result
                meter.finish(number, sizes[number])


def scanner(corpus: Corpus, codes: Store, manifest: Manifest, method: str, pool: WorkersConfig) -> Scanner:
    """Pair the parts of the codes of a corpus's split with the parts of the corpus.

    They stand in the same order. Where a corpus part has no codes at all, because every row of it went to quarantine,
    the codes have fewer parts: then a codes part is of its own place or of one of the next ones, which its ids tell.
    """
    split = str(manifest.info["split"])
    chosen = [(i, record) for i, record in enumerate(corpus.parts) if corpus.count_part(record, split)]
    parts = [record for record in manifest.files if record.name.startswith("parts/")]
    missing = max(0, len(chosen) - len(parts))
    pairs, start = [], 0
    for number, record in enumerate(parts):
        pairs.append(PartPair(record, start, tuple(chosen[number : number + missing + 1])))
        start += int(record.rows or 0)
    return Scanner(
        CodedSplit(method, corpus.store.url, corpus.manifest.id, codes, int(manifest.info["num_bits"])), pairs, pool
    )


def sample_places(num_rows: int, size: int, seed: int) -> Ints | None:
    """Places of `size` rows out of `num_rows`, ascending; None (every row) where there are no more than that.

    >>> sample_places(10, 3, seed=0), sample_places(3, 3, seed=0)
    (array([4, 6, 7]), None)
    """
    if num_rows <= size:
        return None
    return np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False, shuffle=False))


def _groups(pairs: Sequence[PartPair]) -> Iterator[tuple[PartPair, ...]]:
    """Neighbouring parts of `TASK_ROWS` rows together, or of one part with more."""
    group: list[PartPair] = []
    rows = 0
    for pair in pairs:
        if group and rows + int(pair.codes.rows or 0) > TASK_ROWS:
            yield tuple(group)
            group, rows = [], 0
        group.append(pair)
        rows += int(pair.codes.rows or 0)
    if group:
        yield tuple(group)


def _scan_parts(
    pairs: Sequence[PartPair], picks: Ints | None, split: CodedSplit, targets: Sequence[Target],
    advance: Callable[[int], None],
) -> Scan:  # fmt: skip
    joined = _read(pairs, split, advance)
    side = Side.concatenate([part.side for part in joined])
    places = np.concatenate([part.places for part in joined])
    tables, rows = [], []
    for target in targets:
        database = side.among(target.split)
        rows.append(len(database.ids))
        if database.ids:
            merged = merge_side(database.values[split.method], database.labels, "database")
            tables.append(count(target.queries, merged))
        else:
            tables.append(np.zeros((len(target.queries.codes), 2, split.num_bits + 1), dtype=np.int64))
    kept = np.ones(len(places), dtype=bool) if picks is None else np.isin(places, picks)
    return Scan(
        tables, rows, side.take(kept), places[kept], len(places), sum(part.hidden for part in joined),
        np.any([part.taught for part in joined], axis=0), {part.part for part in joined},
    )  # fmt: skip


def _nearest_in_parts(
    pairs: Sequence[PartPair], picks: Ints | None, split: CodedSplit, codes: Codes, database_split: str, k: int,
    advance: Callable[[int], None],
) -> list[list[Near]]:  # fmt: skip
    side = Side.concatenate([part.side for part in _read(pairs, split, advance)])
    return nearest(codes, side.among(database_split), split.method, k)


def _read(pairs: Sequence[PartPair], split: CodedSplit, advance: Callable[[int], None]) -> list[Joined]:
    joined = []
    for pair in pairs:
        joined.append(split.read(pair))
        advance(int(pair.codes.rows or 0))
    return joined


def _added(tables: list[Ints] | None, more: list[Ints]) -> list[Ints]:
    if tables is None:
        return [table.copy() for table in more]
    for table, other in zip(tables, more, strict=True):
        table += other
    return tables


def _together(pieces: Sequence[Scan], tables: list[Ints]) -> Scan:
    return Scan(
        tables,
        [sum(counts) for counts in zip(*(piece.rows for piece in pieces), strict=True)],
        Side.concatenate([piece.side for piece in pieces]),
        np.concatenate([piece.places for piece in pieces]),
        sum(piece.known for piece in pieces),
        sum(piece.hidden for piece in pieces),
        np.any([piece.taught for piece in pieces], axis=0),
        set().union(*(piece.parts for piece in pieces)),
    )
