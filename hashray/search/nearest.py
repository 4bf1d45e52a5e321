"""What a search answers, of one process or of many: `Nearest`, `Row`, and the protocol `Searchable`. No Ray."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.index.ids import find
from hashray.index.version import oldest_kept
from hashray.search.merge import merge
from hashray.search.reader import Index


@dataclass(frozen=True)
class Nearest:
    """The k nearest rows of n queries, each list ascending by (distance, id).

    Attributes:
        ids: object [n, k] of str, None after the last row.
        distances: int32 [n, k], bits; -1 after the last row.
        missing: how many shards did not answer; 0: the answer is whole.
    """

    ids: NDArray[np.object_]
    distances: NDArray[np.int32]
    missing: int = 0


@dataclass(frozen=True)
class Row:
    """A row of an index: its packed code uint8 [num_bits // 8] and its attributes, as JSON has them."""

    code: NDArray[np.uint8]
    attributes: dict[str, Any] = field(default_factory=dict)


class Described(NamedTuple):
    """Rows by id, and how many shards did not say whether they have any of the ids."""

    rows: dict[str, Row]
    missing: int = 0


@dataclass(frozen=True)
class Facts:
    """What there is to say of a version of an index; `attributes` are the names and types of its columns."""

    version: int
    rows: int
    num_bits: int
    kind: str
    fingerprint: str | None
    shards: int
    attributes: dict[str, str]
    oldest_kept: int = 1  # of the versions whose files garbage collection has left


class Searchable(Protocol):
    """An open version of an index, wherever its shards are."""

    facts: Facts

    def search(self, codes: Codes, k: int, where: str | None) -> Nearest:
        """The k nearest rows of packed codes uint8 [n, num_bits // 8], as `Index.search`."""
        ...

    def describe(self, ids: Sequence[str], near: Codes | None) -> Described:
        """The rows with these ids that are in the index; `near` as for `Shard.codes_at`."""
        ...


class OpenIndex:
    """An index that is open in this process."""

    def __init__(self, index: Index) -> None:
        self.index, self.facts = index, facts_of(index)

    def search(self, codes: Codes, k: int, where: str | None) -> Nearest:
        """As `Searchable.search`."""
        return Nearest(*self.index.search(codes, k, where))

    def describe(self, ids: Sequence[str], near: Codes | None) -> Described:
        """As `Searchable.describe`."""
        return Described(rows_of(self.index, ids, near))


def facts_of(index: Index) -> Facts:
    """What there is to say of an open index."""
    names = {field.name: str(field.type) for piece in index.pieces for field in _schema(piece.attributes)}
    return Facts(
        index.version, index.rows, index.num_bits, str(index.manifest.info["kind"]), index.fingerprint,
        len(index.pieces), names, oldest_kept(index.manifest),
    )  # fmt: skip


def _schema(table: pa.Table | None) -> pa.Schema:
    return pa.schema([]) if table is None else table.schema


def rows_of(index: Index, ids: Sequence[str], near: Codes | None) -> dict[str, Row]:
    """The rows of an open index with these ids, by id; ids that are not there, or were deleted, are left out."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    rows: dict[str, Row] = {}
    for piece in index.pieces:
        places = find(piece.ids.array, wanted)
        if piece.living is not None:
            there = places >= 0
            places[there] = np.where(piece.living.contains(places[there]), places[there], -1)
        here = np.flatnonzero(places >= 0)
        if not len(here):
            continue
        codes = piece.shard.codes_at(places[here], near)
        names = piece.ids.take(places[here])
        some = None if piece.attributes is None else piece.attributes.take(pa.array(places[here].tolist(), pa.int64()))
        attributes: list[dict[str, Any]] = [{} for _ in names] if some is None else some.to_pylist()
        for name, code, values in zip(names, codes, attributes, strict=True):
            rows[name] = Row(np.array(code), {key: plain(value) for key, value in values.items() if value is not None})
        piece.ids.release()
    return rows


def merge_nearest(answers: Sequence[Nearest], missing: int = 0) -> Nearest:
    """The k nearest of several answers to the same queries: ascending distance, ties by ascending id.

    >>> a = Nearest(np.array([["b", "d"]], object), np.array([[1, 2]], np.int32))
    >>> b = Nearest(np.array([["a", None]], object), np.array([[1, -1]], np.int32))
    >>> merge_nearest([a, b]).ids.tolist()
    [['a', 'b']]
    """
    distances = np.stack([answer.distances for answer in answers])
    ids = np.stack([answer.ids for answer in answers])
    # Ids ascend inside a run of equal distances, so that a row's place in its list stands for its id.
    places = np.broadcast_to(np.arange(distances[0].size).reshape(distances[0].shape), distances.shape)
    flat = ids.reshape(len(answers), -1)
    best = merge(distances, np.where(distances < 0, -1, places), lambda shard, place: flat[shard, place])
    return Nearest(*best, missing + sum(answer.missing for answer in answers))


def plain(value: Any) -> Any:
    """A value of Arrow as JSON has it: times as ISO text, bytes in base64, NaN and infinity as null.

    >>> plain({"day": datetime.date(2026, 1, 2), "raw": b"x", "score": float("nan")})
    {'day': '2026-01-02', 'raw': 'eA==', 'score': None}
    """
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (datetime.date, datetime.datetime, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
