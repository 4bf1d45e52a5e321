"""mAP and code health of binary codes: numbers that do not depend on the order of the database.

`mean_average_precision` is the mean over all orders inside each Hamming distance; the papers' own conventions, which
walk one fixed order, are options by name. Precision at n, precision within a radius and the precision-recall curve
are read from the same histograms, counted once: `rank(...)` gives a `Ranking`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes, as_codes, hamming, unpack
from hashray.errors import ConfigError, InputError, MismatchError, perhaps
from hashray.evaluate.ranking import (
    AveragePrecisions,
    Ints,
    LabelRows,
    PrecisionRecall,
    Ranking,
    check_classes,
    check_top_k,
    distinct,
    divide,
    label_rows,
    merge,
    rank,
    walk,
    words64,
)

__all__ = [
    "TIES",
    "AveragePrecisions",
    "PrecisionRecall",
    "Ranking",
    "average_precisions",
    "code_health",
    "mean_average_precision",
    "mean_average_precision_float",
    "rank",
]


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

    def order(rows: slice) -> Ints:
        return np.argsort(hamming(queries.codes[rows], codes).astype(small), axis=1, kind="stable")

    in_order = LabelRows(database.labels.ids[database.inverse], database.labels.rows)
    sums, found, existing = walk(order, queries.labels, in_order, cut)
    merged = divide(sums, existing if convention.whole else found, existing, skipped=(found == 0) & convention.skips)
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
    Differs: a cut beyond the database ends with the database; dseh and adalabel take a cut, though dseh has none.

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
    sums, found, existing = walk(order, queries, database, cut)
    return divide(sums, found, existing, skipped=existing == 0).mean


def code_health(codes: Codes, logits: Any = None, labels: Any = None) -> dict[str, float]:
    """Numbers that show a sick code before mAP does (METHODS.md 6.7). Bits b are in {-1, +1}.

    Always: `bit_bias` mean over bits of |E b| (0 is balanced); `bit_entropy_mean`, `bit_entropy_min` in bits;
    `bit_corr_mean`, `bit_corr_max` of |correlation| between two bits (constant bits left out); `distinct_codes`.
    With `logits` float [n, K]: `near_zero` share of |u| < 0.1; `quantization` mean ||u| - 1|; `exact_zeros`, a count.
    With `labels` multi-hot [n, c]: `collision_rate`, share of labelled items whose code an item sharing no class
    with them has too; `within_class_variance`, mean over classes and bits of the variance of b (0 is one code a class).

    Raises:
        ValueError, InputError, MismatchError: shapes or rows do not fit, as in `rank`.

    >>> health = code_health(np.uint8([[240], [240], [15]]), labels=np.eye(2)[[0, 1, 1]])
    >>> health["distinct_codes"], round(health["collision_rate"], 3), round(health["bit_bias"], 3)
    (2.0, 0.667, 0.333)
    """
    codes = as_codes(codes)
    if not len(codes):
        raise InputError("there is no code to look at")
    bits = unpack(codes).astype(np.float32)
    means = bits.mean(0, dtype=np.float64)
    shares = np.stack([1 + means, 1 - means]) / 2
    entropy = -(shares * np.log2(np.maximum(shares, 1e-300))).sum(0)
    moving = np.flatnonzero(np.abs(means) < 1)
    deviations = np.sqrt(1 - means[moving] ** 2)
    covariance = bits[:, moving].T @ bits[:, moving] / len(bits) - np.outer(means[moving], means[moving])
    corr = np.abs(covariance / np.outer(deviations, deviations))[np.triu_indices(len(moving), 1)]
    first, group, _ = distinct(words64(codes))
    health = {
        "bit_bias": float(np.abs(means).mean()),
        "bit_entropy_mean": float(entropy.mean()),
        "bit_entropy_min": float(entropy.min()),
        "bit_corr_mean": float(corr.mean()) if corr.size else 0.0,
        "bit_corr_max": float(corr.max()) if corr.size else 0.0,
        "distinct_codes": float(len(first)),
    }
    if logits is not None:
        size = np.abs(np.asarray(logits, dtype=np.float64))
        if size.shape != bits.shape:
            raise MismatchError(f"logits are {size.shape}, the codes unpack to {bits.shape}")
        health["near_zero"] = float((size < 0.1).mean())
        health["quantization"] = float(np.abs(size - 1).mean())
        health["exact_zeros"] = float((size == 0).sum())
    if labels is not None:
        known = label_rows(labels, len(codes), "code")
        health["collision_rate"] = _collision_rate(group, known)
        num_rows = np.bincount(known.ids)
        row_sums = np.add.reduceat(bits[np.argsort(known.ids, kind="stable")], np.cumsum(num_rows) - num_rows)
        sizes = np.asarray(num_rows @ known.rows, dtype=np.float64)
        centres = (known.rows.T @ row_sums)[sizes > 0] / sizes[sizes > 0, None]
        health["within_class_variance"] = float((1 - centres**2).mean()) if len(centres) else 0.0
    return health


def _collision_rate(group: Ints, labels: LabelRows) -> float:
    """Return the share of labelled items that have a labelled item of disjoint classes in their `group` [n]."""
    pairs, _, counts = distinct(np.column_stack([labels.ids, group]).astype(np.uint64))
    rows = labels.rows[labels.ids[pairs]]  # of the distinct (label row, code) pairs, ascending by code
    labelled = rows.max(axis=1) > 0
    collides = np.zeros(len(pairs), dtype=bool)
    starts = np.flatnonzero(np.diff(group[pairs], prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(pairs)), strict=True):
        if stop - start > 1:
            others = rows[start:stop][labelled[start:stop]]
            for first in range(start, stop, 1024):  # all codes may be one: never all pairs of label rows at once
                part = slice(first, min(first + 1024, stop))
                collides[part] = (rows[part] @ others.T == 0).any(1) & labelled[part]
    return float(counts[collides].sum() / max(1, counts[labelled].sum()))


def _units(features: Any, side: str) -> NDArray[np.float32]:
    """Scale features [n, d] to length 1, float32; a zero row stays zero. Errors as in the float mAP."""
    values = np.asarray(features, dtype=np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"{side} features have shape {values.shape}; expected [n, d], every number finite")
    if not len(values):
        raise InputError(f"there is no {side} feature to rank")
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.ascontiguousarray(values / np.where(lengths > 0, lengths, 1))
