"""Which classes stand among each other's nearest rows: a matrix over the classes, counted on a sample. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.evaluate.sides import Side
from hashray.metrics import distances

NEIGHBOURS = 10
QUERIES = 500  # drawn of all; 100,000 rows each take 2 s on one core
CLASSES = 60  # of the matrix; above, those whose neighbours are most often of other classes
PAIRS = 12  # of the table
BLOCK = 64


def confusions(query: Side, database: Side, method: str, classes: Sequence[str], seed: int) -> dict[str, Any]:
    """Shares of the classes among the nearest rows of each class's queries, JSON-able; {} without labelled queries.

    Rows at the same distance share the last places, so that the numbers depend on no order. A row of several classes
    counts for each of them, and so does a query.

    Args:
        query: the queries; 500 of them are drawn.
        database: rows to find, or a sample of them.
        method: whose codes are compared.
        classes: names, by index.
        seed: of the draw.

    Returns:
        `neighbours`, `queries`, `rows`: what was counted. `classes`: names of the matrix's rows and columns. `shares`:
        [c, c], the share of a class (column) among the neighbours of a class's queries (row). `pairs`: [query class,
        neighbours' class, share] of different classes, the largest first. `left_out`: classes that the matrix lacks.
    """
    if not database.ids or not query.ids:
        return {}
    chosen = np.sort(np.random.default_rng(seed).permutation(len(query.ids))[:QUERIES])
    known = database.labels.rows.astype(np.float64)
    sums, counts = np.zeros((len(classes), len(classes))), np.zeros(len(classes))
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK]
        for row, near in zip(rows, distances(query.values[method][rows], database.values[method]), strict=True):
            shares = _weights(near, database.labels.ids, len(known)) @ known
            mine = query.labels.rows[query.labels.ids[row]] > 0
            sums[mine] += shares
            counts[mine] += 1
    present = np.flatnonzero(counts)
    matrix = sums[present] / counts[present, None]
    diagonal = matrix[np.arange(len(present)), present]
    kept = np.sort(np.argsort(diagonal, kind="stable")[:CLASSES])
    matrix, present = matrix[kept], present[kept]
    others = matrix.copy()
    others[np.arange(len(present)), present] = 0
    order = np.argsort(-others, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, others.shape), strict=True) if others[i, j] > 0]
    return {
        "neighbours": min(NEIGHBOURS, len(database.ids)),
        "queries": len(chosen),
        "rows": len(database.ids),
        "classes": [classes[int(i)] for i in present],
        "shares": matrix[:, present].round(6).tolist(),
        "pairs": [[classes[int(present[i])], classes[j], round(float(others[i, j]), 6)] for i, j in pairs],
        "left_out": int((counts > 0).sum()) - len(present),
    }


def _weights(near: NDArray[np.int32], label_ids: NDArray[Any], num_labels: int) -> NDArray[np.float64]:
    """Share of the nearest places that each label row has, float64 [num_labels], over all orders of tied rows."""
    places = min(NEIGHBOURS, len(near))
    last = np.partition(near, places - 1)[places - 1]
    inside = np.bincount(label_ids[near < last], minlength=num_labels).astype(np.float64)
    tied = np.bincount(label_ids[near == last], minlength=num_labels)
    return np.asarray((inside + (places - inside.sum()) * tied / tied.sum()) / places)
