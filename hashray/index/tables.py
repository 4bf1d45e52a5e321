"""The tables of a duplicates report, from pairs of codes and the rows of each code. No Ray.

groups   group, id, distance (of the group's centre), kept, kind (of the group: exact or near), split (with a corpus)
pairs    left, right, distance, left_rows, right_rows: two different codes, each named by its first id
leaks    query, train, distance: for each row of the query split, its nearest row of the train split within the radius
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.data.columns import in_split
from hashray.index.grouping import Grouping, Nodes, group_by_centre

Keep = Literal["best", "first"]
NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Linked:
    """Codes with a neighbour, or with several rows; n codes in any order, p pairs of them, r rows.

    Attributes:
        left, right, distance: of each pair, integers [p]; the codes as numbers from 0 to n - 1.
        code: the code of each row, int64 [r].
        ids: text [r].
        splits: text [r], null where the corpus does not have the row; None without a corpus.
    """

    left: Nodes
    right: Nodes
    distance: Nodes
    code: Nodes
    ids: pa.Array
    splits: pa.Array | None = None


@dataclass(frozen=True)
class PairRows:
    """The rows of the table of pairs, nearest first, without their text: places in `ids`, which ascend."""

    ids: pa.Array
    left: NDArray[Any]
    right: NDArray[Any]
    distance: NDArray[Any]
    left_rows: NDArray[Any]
    right_rows: NDArray[Any]

    def __len__(self) -> int:
        return len(self.left)

    def table(self, start: int = 0, stop: int | None = None) -> pa.Table:
        """The table of some of the rows."""
        some = slice(start, stop)
        return pa.table(
            {
                "left": self.ids.take(pa.array(self.left[some])), "right": self.ids.take(pa.array(self.right[some])),
                "distance": pa.array(self.distance[some].astype(np.int32)),
                "left_rows": pa.array(self.left_rows[some].astype(np.int64)),
                "right_rows": pa.array(self.right_rows[some].astype(np.int64)),
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """The tables, largest groups and nearest pairs first; `leaks` is None without a corpus."""

    groups: pa.Table
    pairs: PairRows
    leaks: pa.Table | None


def make_tables(linked: Linked, keep: Keep) -> Tables:
    """Group the codes and write down what was seen.

    Args:
        keep: which row of a group is kept. best: the centre, the row with the most rows within the radius; first: the
            first id of the group.

    The answer depends on codes and ids, not on the order of pairs, codes or rows.
    """
    order = pc.sort_indices(linked.ids).to_numpy().astype(np.int64)
    place = np.empty(len(order), np.int64)  # of each row's id among all
    place[order] = np.arange(len(order))
    counts = np.bincount(linked.code)
    first = np.full(len(counts), NOWHERE)  # of each code: the place of its first id
    np.minimum.at(first, linked.code, place)
    grouping = group_by_centre(linked.left, linked.right, linked.distance, counts, first)
    in_order = linked.ids.take(pa.array(order))
    return Tables(
        _groups(linked, grouping, place, first, keep),
        _pairs(linked, counts, first, in_order),
        None if linked.splits is None else _leaks(linked, place, in_order),
    )


def _groups(linked: Linked, grouping: Grouping, place: Nodes, first: Nodes, keep: Keep) -> pa.Table:
    centre, distance = grouping.centre[linked.code], grouping.distance[linked.code]
    sizes = np.bincount(centre, minlength=len(first))
    several = np.flatnonzero(sizes > 1)
    ranked = several[np.lexsort((first[several], -sizes[several]))]
    number = np.full(len(first), -1)
    number[ranked] = np.arange(len(ranked))
    group = number[centre]
    rows = np.flatnonzero(group >= 0)
    rows = rows[np.lexsort((place[rows], distance[rows], group[rows]))]
    group, distance = group[rows], distance[rows]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    kept = np.zeros(len(rows), bool)
    if len(rows):
        best = starts if keep == "best" else np.lexsort((place[rows], group))[starts]
        kept[best] = True
    furthest = np.maximum.reduceat(distance, starts) if len(rows) else distance
    kind = pa.DictionaryArray.from_arrays(pa.array((furthest > 0)[group].astype(np.int8)), ["exact", "near"])
    columns = {
        "group": pa.array(group), "id": linked.ids.take(pa.array(rows)),
        "distance": pa.array(distance.astype(np.int32)),
        "kept": pa.array(kept), "kind": kind.cast(pa.string()),
    }  # fmt: skip
    if linked.splits is not None:
        columns["split"] = linked.splits.take(pa.array(rows))
    return pa.table(columns)


def _pairs(linked: Linked, counts: Nodes, first: Nodes, in_order: pa.Array) -> PairRows:
    swap = first[linked.left] > first[linked.right]
    left = np.where(swap, linked.right, linked.left)
    right = np.where(swap, linked.left, linked.right)
    order = np.lexsort((first[right], first[left], linked.distance))
    left, right, small = left[order], right[order], counts.astype(np.int32)
    place = first.astype(np.int32 if len(in_order) < 1 << 31 else np.int64)
    return PairRows(in_order, place[left], place[right], linked.distance[order], small[left], small[right])


def _leaks(linked: Linked, place: Nodes, in_order: pa.Array) -> pa.Table:
    words = pc.fill_null(linked.splits, "")
    train, query = in_split(words, "train"), in_split(words, "query")
    num_codes, width = len(np.bincount(linked.code)), max(1, len(place))
    nearest_train = np.full(num_codes, NOWHERE)
    np.minimum.at(nearest_train, linked.code[train], place[train])
    has_train = nearest_train < NOWHERE
    # One number for each code: the distance of its nearest train row, then the place of that row's id.
    best = np.where(has_train, nearest_train, NOWHERE)
    for here, there in ((linked.left, linked.right), (linked.right, linked.left)):
        some = has_train[there]
        np.minimum.at(best, here[some], linked.distance[some].astype(np.int64) * width + nearest_train[there[some]])
    rows = np.flatnonzero(query & (best[linked.code] < NOWHERE))
    distance, near = np.divmod(best[linked.code[rows]], width)
    order = np.lexsort((place[rows], distance))
    return pa.table(
        {
            "query": linked.ids.take(pa.array(rows[order])), "train": in_order.take(pa.array(near[order])),
            "distance": pa.array(distance[order].astype(np.int32)),
        }
    )  # fmt: skip


def summarise(tables: Tables) -> dict[str, Any]:
    """Count groups, rows and pairs: what a person wants to know first."""
    groups = tables.groups
    kind, kept = groups.column("kind").to_numpy(), groups.column("kept").to_numpy()
    distances = np.bincount(tables.pairs.distance).tolist()
    leaks = tables.leaks
    return {
        "groups": int(kept.sum()),
        "exact_groups": int((kept & (kind == "exact")).sum()),
        "near_groups": int((kept & (kind == "near")).sum()),
        "rows_in_groups": len(groups),
        "rows_not_kept": int((~kept).sum()),
        "pairs": len(tables.pairs),
        "pairs_by_distance": {str(bits): count for bits, count in enumerate(distances) if count},
        "leaks": None if leaks is None else len(leaks),
        "exact_leaks": None if leaks is None else int((leaks.column("distance").to_numpy() == 0).sum()),
    }
