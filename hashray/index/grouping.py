"""Groups of near codes by a centre, without chains: each member is within the radius of its centre. No Ray.

The rule, one code after the other: codes are ordered by the number of rows within the radius, most first, and then by
their first id. The first code without a group becomes a centre, and takes all its neighbours that have no group yet.
So the groups depend on the codes and the ids alone, not on shards, blocks or the order of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Nodes = NDArray[np.int64]

ROUNDS = 32  # then one code after the other: a chain of frames of a video is decided by one centre a round
UNDECIDED, CENTRE, MEMBER = 0, 1, 2


@dataclass(frozen=True)
class Grouping:
    """The group of each of n codes: `centre` int64 [n] is itself for a centre, `distance` int64 [n] in bits."""

    centre: Nodes
    distance: Nodes


def group_by_centre(left: Nodes, right: Nodes, distance: Nodes, rows: Nodes, order_of_id: Nodes) -> Grouping:
    """Group n distinct codes by the pairs within the radius.

    Args:
        left, right: the two codes of each pair, integers [p], each pair once.
        distance: of each pair, integers [p], in bits.
        rows: rows that have each code, int64 [n].
        order_of_id: the place of each code's first id among all, int64 [n].

    >>> pair = np.array([[0, 1], [1, 2], [2, 3]]).T  # a chain: code 1 takes 0 and 2, and 3 is alone
    >>> group_by_centre(*pair, np.array([1, 1, 1]), np.ones(4, int), np.arange(4)).centre.tolist()
    [1, 1, 1, 3]
    """
    count = len(rows)
    near = rows + np.bincount(left, rows[right], count).astype(np.int64)
    near += np.bincount(right, rows[left], count).astype(np.int64)
    rank = np.empty(count, np.int64)
    rank[np.lexsort((order_of_id, -near))] = np.arange(count)
    earlier, later = np.where(rank[left] < rank[right], (left, right), (right, left))
    state = _decide(earlier, later, rank)
    of_group = (state[earlier] == CENTRE) & (state[later] == MEMBER)
    earlier, later, distance = earlier[of_group], later[of_group], distance[of_group]
    best = np.full(count, count, np.int64)
    np.minimum.at(best, later, rank[earlier])
    chosen = rank[earlier] == best[later]
    centre, away = np.arange(count), np.zeros(count, np.int64)
    centre[later[chosen]], away[later[chosen]] = earlier[chosen], distance[chosen]
    return Grouping(centre, away)


def _decide(earlier: Nodes, later: Nodes, rank: Nodes) -> NDArray[np.int8]:
    """Which codes are centres: in each round those without an undecided neighbour that comes earlier."""
    state = np.full(len(rank), UNDECIDED, np.int8)
    for _ in range(ROUNDS):
        if not len(earlier):
            break
        waits = np.zeros(len(rank), bool)
        waits[later] = True
        free = ~waits[earlier]
        state[earlier[free]], state[later[free]] = CENTRE, MEMBER
        open_ = (state[earlier] == UNDECIDED) & (state[later] == UNDECIDED)
        earlier, later = earlier[open_], later[open_]
    _decide_one_by_one(earlier, later, rank, state)
    state[state == UNDECIDED] = CENTRE
    return state


def _decide_one_by_one(earlier: Nodes, later: Nodes, rank: Nodes, state: NDArray[np.int8]) -> None:
    if not len(earlier):
        return
    order = np.argsort(rank[earlier], kind="stable")
    earlier, later = earlier[order], later[order]
    starts = np.flatnonzero(np.diff(earlier, prepend=-1))
    ends = [*starts[1:].tolist(), len(earlier)]
    for node, start, end in zip(earlier[starts].tolist(), starts.tolist(), ends, strict=True):
        if state[node] == UNDECIDED:
            state[node] = CENTRE
            some = later[start:end]
            state[some[state[some] == UNDECIDED]] = MEMBER
