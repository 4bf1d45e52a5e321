"""Queries and database rows: codes joined with the labels of their corpus, a part at a time. No Ray.

Codes part i stands beside a part of the corpus. Rows are joined by id inside it, because codes lack the rows that went
to quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.artifact import FileRecord, read_table
from hashray.codes import Codes
from hashray.data.columns import code_matrix, in_split
from hashray.data.corpus import Corpus, open_corpus
from hashray.errors import CorruptArtifact, MismatchError
from hashray.metrics import LabelRows, distances, label_rows
from hashray.storage import Store, join


@dataclass(frozen=True)
class Scenario:
    """Which queries are ranked against which database rows. `name` is empty where there is only one."""

    name: str
    query_split: str
    database_split: str


CLASS_SPLIT = (
    Scenario("within", "query-seen", "database-seen"),
    Scenario("cross", "query-unseen", "database-unseen"),
    Scenario("generalised", "query-unseen", "database"),
)
"""METHODS 3.3: seen classes; classes never trained on; unseen queries in a database of all."""


@dataclass(frozen=True)
class Side:
    """Some rows of n: queries, or rows of the database.

    Attributes:
        ids: [n].
        labels: of the n rows.
        splits: [n], the split word of each row, such as "database+train".
        parts: int32 [n], which part of the corpus holds each row.
        values: packed codes uint8 [n, b] or features float32 [n, d], by method.
    """

    ids: list[str]
    labels: LabelRows
    splits: list[str]
    parts: NDArray[np.int32]
    values: dict[str, NDArray[Any]]

    def take(self, positions: NDArray[Any]) -> Side:
        """The rows at some positions: integers, or a mask of all rows."""
        rows = np.flatnonzero(positions) if positions.dtype == bool else positions
        return Side(
            [self.ids[i] for i in rows], self.labels.take(rows), [self.splits[i] for i in rows], self.parts[rows],
            {name: values[rows] for name, values in self.values.items()},
        )  # fmt: skip

    def among(self, split: str) -> Side:
        """Only the rows of a split."""
        mask = in_split(pa.array(self.splits, pa.string()), split)
        return self if mask.all() else self.take(mask)

    def copied(self) -> Side:
        """The same rows, in arrays of this process."""
        labels = LabelRows(self.labels.ids.copy(), self.labels.rows.copy())
        values = {name: matrix.copy() for name, matrix in self.values.items()}
        return Side(self.ids, labels, self.splits, self.parts.copy(), values)

    def classes_of(self, row: int) -> tuple[int, ...]:
        """The classes of one row, as indices."""
        return tuple(np.flatnonzero(self.labels.rows[self.labels.ids[row]]).tolist())

    @staticmethod
    def concatenate(sides: Sequence[Side]) -> Side:
        """The rows of several sides with the same methods, one after the other; `sides` is not empty."""
        return Side(
            [row_id for side in sides for row_id in side.ids],
            LabelRows.concatenate([side.labels for side in sides]),
            [word for side in sides for word in side.splits],
            np.concatenate([side.parts for side in sides]),
            {name: np.concatenate([side.values[name] for side in sides]) for name in sides[0].values},
        )


class Near(NamedTuple):
    """A row near a query; ascending by distance in bits, then by id. `labels` are class indices."""

    distance: int
    id: str
    labels: tuple[int, ...]
    part: int


def nearest(codes: Codes, database: Side, method: str, k: int) -> list[list[Near]]:
    """The k rows of the database nearest to each code uint8 [q, b], ascending, ties by id."""
    if not database.ids:
        return [[] for _ in codes]
    near = []
    for row in distances(codes, database.values[method]):
        last = np.partition(row, k - 1)[k - 1] if len(row) > k else row.max()
        hits = sorted((int(row[i]), database.ids[i], int(i)) for i in np.flatnonzero(row <= last))[:k]
        near.append([Near(distance, row_id, database.classes_of(i), int(database.parts[i]))
                     for distance, row_id, i in hits])  # fmt: skip
    return near


@dataclass(frozen=True)
class PartPair:
    """A part of codes: its record, the number of rows before it, and the parts of the corpus that it can be of."""

    codes: FileRecord
    start: int
    corpus: tuple[tuple[int, FileRecord], ...]


class Joined(NamedTuple):
    """A part of codes with its labels.

    Attributes:
        side: the rows whose labels are known, in the codes' order.
        places: int64 [n], their places among the codes of all parts.
        hidden: how many rows are left out, because their labels are not known.
        taught: bool [c], the classes of the train rows in the corpus's part.
        part: the place of that part in the corpus.
    """

    side: Side
    places: NDArray[np.int64]
    hidden: int
    taught: NDArray[np.bool_]
    part: int


@dataclass(frozen=True)
class CodedSplit:
    """The codes of a split of a corpus: what a worker needs to read any part of them."""

    method: str
    corpus_url: str
    corpus_id: str
    store: Store
    num_bits: int

    def read(self, pair: PartPair) -> Joined:
        """Join one part of the codes with its labels.

        Raises:
            MismatchError: the codes are of rows that the corpus does not have there.
        """
        corpus = opened(self.corpus_url, self.corpus_id)
        table = read_table(self.store, pair.codes, ["id", "code"])
        codes, ids = code_matrix(table.column("code"), self.num_bits), _texts(table)
        number, rows, where = self._rows_of(pair, corpus, ids)
        taught = corpus.label_matrix(rows.filter(pa.array(in_split(rows.column("split"), "train"))))
        rows = rows.take(where)
        labels, words = corpus.label_matrix(rows), rows.column("split")
        known = np.flatnonzero(labels.any(1) | ~in_split(words, "unlabelled"))
        side = Side(
            ids.take(pa.array(known)).to_pylist(), label_rows(labels[known], len(known), self.method),
            words.take(pa.array(known)).to_pylist(), np.full(len(known), number, np.int32),
            {self.method: codes[known]},
        )  # fmt: skip
        return Joined(side, pair.start + known, len(ids) - len(known), np.any(taught > 0, axis=0), number)

    def _rows_of(self, pair: PartPair, corpus: Corpus, ids: pa.Array) -> tuple[int, pa.Table, pa.Array]:
        """The part of the corpus that has these ids, its rows, and where among them each id stands."""
        missing = len(ids)
        for number, record in pair.corpus:
            rows = corpus.part_rows(record, "all")
            where = pc.index_in(ids, _texts(rows))
            if not where.null_count:
                return number, rows, where
            missing = min(missing, where.null_count)
        raise MismatchError(
            f"{missing:,} rows of {join(self.store.url, pair.codes.name)} are not in the part of {self.corpus_url} "
            "that they are the codes of; encode the corpus again"
        )


def _texts(table: pa.Table) -> pa.Array:
    return table.column("id").cast(pa.large_string()).combine_chunks()


@lru_cache(maxsize=2)
def opened(url: str, manifest_id: str) -> Corpus:
    """A corpus or its cached features, opened once in each process."""
    corpus = open_corpus(url, None)
    if corpus.manifest.id != manifest_id:
        raise CorruptArtifact(f"{url} has changed while it is evaluated; run the same command again")
    return corpus
