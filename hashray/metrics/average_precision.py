"""mAP of binary codes: numbers that do not depend on the order of the database.

`mean_average_precision` is the mean over all orders inside each Hamming distance; the papers' own conventions, which
walk one fixed order, are options by name. Precision at n, precision within a radius and the precision-recall curve
are read from the same histograms, counted once: `rank(...)` gives a `Ranking`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes, as_codes
from hashray.errors import ConfigError, InputError, MismatchError, perhaps
from hashray.metrics.distances import distances, prepare
from hashray.metrics.labels import Ints, LabelRows, check_classes, label_rows
from hashray.metrics.ranking import AveragePrecisions, check_top_k, divide, merge, rank, walk


class _Convention(NamedTuple):
    skips: bool  # a query with nothing relevant in its list is left out of the mean, not counted as 0
    whole: bool  # AP is divided by the relevant items of the whole database, not of the list


_CONVENTIONS = {
    "hashnet": _Convention(skips=True, whole=False),
    "deephash_pytorch": _Convention(skips=False, whole=False),
    "orthohash": _Convention(skips=False, whole=False),
    "dseh": _Convention(skips=False, whole=True),
    "adalabel": _Convention(skips=False, whole=False),
}
TIES = ("expected", *_CONVENTIONS)


def average_precisions(
    query_codes: Codes,
    query_labels: Any,
    database_codes: Codes,
    database_labels: Any,
    top_k: int | None = None,
    ties: str = "expected",
) -> AveragePrecisions:
    """AP of every query; arguments, conventions and errors as in `mean_average_precision`.

    >>> one_hot = np.eye(3, dtype=np.uint8)
    >>> average_precisions(np.uint8([[0], [0]]), one_hot[[0, 2]], np.uint8([[0], [0], [1]]), one_hot[[0, 1, 0]])
    AveragePrecisions(values=array([0.70833333,        nan]), num_without_relevant=1)
    """
    if ties not in TIES:
        raise ConfigError(f"unknown ties {ties!r}{perhaps(ties, TIES)} (allowed: {', '.join(TIES)})")
    if ties == "expected":
        check_top_k(top_k, 1)  # before the work, not after it
        return rank(query_codes, query_labels, database_codes, database_labels).average_precisions(top_k)
    queries, database = merge(query_codes, query_labels, database_codes, database_labels)
    codes, convention = as_codes(database_codes), _CONVENTIONS[ties]
    drops_last = ties == "deephash_pytorch" and top_k == -1
    cut = len(codes) - 1 if drops_last else check_top_k(top_k, len(codes))
    small = np.uint8 if codes.shape[1] < 32 else np.uint16  # numpy sorts both by radix, stably
    query_codes, codes = prepare(queries.codes), prepare(codes)

    def order(rows: slice) -> Ints:
        return np.argsort(distances(query_codes[rows], codes).astype(small), axis=1, kind="stable")

    in_order = LabelRows(database.labels.ids[database.inverse], database.labels.rows)
    sums, hits, existing = walk(order, queries.labels, in_order, cut)
    merged = divide(sums, existing if convention.whole else hits, existing, skipped=(hits == 0) & convention.skips)
    missing = int((existing == 0)[queries.inverse].sum())
    return AveragePrecisions(merged.values[queries.inverse], missing)


def mean_average_precision(
    query_codes: Codes,
    query_labels: Any,
    database_codes: Codes,
    database_labels: Any,
    top_k: int | None = None,
    ties: str = "expected",
) -> float:
    """mAP (mAP@`top_k`) of a Hamming ranking.

    "expected" is the mean over all orders inside each distance (`Ranking.average_precisions` says what a cut does);
    queries without a relevant item in the database are left out (`average_precisions` counts them). The others,
    each as in the code it is named after:

    | ties | AP is divided by | nothing relevant in the list |
    |---|---|---|
    | hashnet | relevant items inside the cut | query left out |
    | deephash_pytorch (`top_k=-1`: the last item is dropped, as its CIFAR-10 slice does) | inside the cut | 0 |
    | orthohash | inside the cut | 0 |
    | dseh (its database is train + retrieval) | relevant items of the whole database | 0 |
    | adalabel (its database is sorted by class) | inside the cut | 0 |

    Differs: within a distance all five walk the database in the order given; the originals leave it to an unstable
        argsort or topk (adalabel: MATLAB's sort, stable as here).
    Differs: a cut beyond the database ends with the database; dseh and adalabel accept a cut here,
        although DSEH's code has none.

    Args:
        query_codes: packed uint8 [q, b]; query_labels: multi-hot [q, c], integers or booleans.
        database_codes: packed uint8 [n, b]; database_labels: multi-hot [n, c].
        top_k: the cut R >= 1; None for the whole database.
        ties: one of `TIES`.

    Raises:
        ConfigError: unknown `ties`, or `top_k` below 1.
        InputError: there is no query, no database, or no query has a relevant item.
        MismatchError: code widths, numbers of classes, or rows of codes and labels differ.
        ValueError: codes are not packed uint8, or labels are not two-dimensional.

    >>> one_hot = np.eye(2, dtype=np.uint8)
    >>> tied = np.uint8([[0]]), one_hot[[0]], np.uint8([[3], [3], [0]]), one_hot[[1, 0, 0]]
    >>> round(mean_average_precision(*tied), 4), round(mean_average_precision(*tied, ties="dseh"), 4)
    (0.9167, 0.8333)
    """
    return average_precisions(query_codes, query_labels, database_codes, database_labels, top_k, ties).mean


def mean_average_precision_float(
    query_features: Any, query_labels: Any, database_features: Any, database_labels: Any, top_k: int | None = None
) -> float:
    """mAP of a cosine ranking of features float [q, d] and [n, d]; equal float32 cosines in database order.

    AP is divided by the relevant items inside the cut; queries without a relevant item in the database are left out.

    Raises:
        As `mean_average_precision`; ValueError also for features that are not finite and two-dimensional.

    >>> one_hot = np.eye(2, dtype=np.uint8)
    >>> mean_average_precision_float([[1, 0]], one_hot[[0]], [[2, 1], [9, 0], [0, 1]], one_hot[[1, 0, 1]])
    1.0
    """
    query_units, database_units = _units(query_features, "query"), _units(database_features, "database")
    if query_units.shape[1] != database_units.shape[1]:
        raise MismatchError(
            f"query features have {query_units.shape[1]} dimensions, database features {database_units.shape[1]}"
        )
    queries = label_rows(query_labels, len(query_units), "query")
    database = label_rows(database_labels, len(database_units), "database")
    check_classes(queries, database)

    def order(rows: slice) -> Ints:
        return np.argsort(-(query_units[rows] @ database_units.T), axis=1, kind="stable")

    cut = check_top_k(top_k, len(database_units))
    sums, hits, existing = walk(order, queries, database, cut)
    return divide(sums, hits, existing, skipped=existing == 0).mean


def _units(features: Any, side: str) -> NDArray[np.float32]:
    """Scale features [n, d] to length 1, float32; a zero row stays zero. Errors as in the float mAP."""
    values = np.asarray(features, dtype=np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"{side} features have shape {values.shape}; expected [n, d], every number finite")
    if not len(values):
        raise InputError(f"there is no {side} feature to rank")
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.ascontiguousarray(values / np.where(lengths > 0, lengths, 1))
