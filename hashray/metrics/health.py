"""Numbers that show a sick code before mAP does (METHODS 6.7)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hashray.codes import Codes, as_codes, unpack
from hashray.errors import InputError, MismatchError
from hashray.metrics.labels import Ints, LabelRows, distinct, label_rows, words64


def code_health(codes: Codes, logits: Any = None, labels: Any = None) -> dict[str, float]:
    """Numbers that show a sick code before mAP does (METHODS.md 6.7). Bits b are in {-1, +1}.

    Always: `bit_bias` mean over bits of |E b| (0 is balanced); `bit_entropy_mean`, `bit_entropy_min` in bits;
    `bit_corr_mean`, `bit_corr_max` of |correlation| between two bits (constant bits left out); `distinct_codes`.
    With `logits` float [n, K]: `near_zero` share of |u| < 0.1; `quantization` mean ||u| - 1|; `exact_zeros`, a count.
    With `labels` multi-hot [n, c]: `collision_rate`, share of labelled items whose code also belongs to a labelled item
    with no class in common; `within_class_variance`, mean over classes and bits of b's variance (0: one code a class).

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
        centres = (known.rows.T.astype(np.float32) @ row_sums)[sizes > 0] / sizes[sizes > 0, None]
        health["within_class_variance"] = float((1 - centres**2).mean()) if len(centres) else 0.0
    return health


def _collision_rate(group: Ints, labels: LabelRows) -> float:
    """Return the share of labelled items that have a labelled item of disjoint classes in their `group` [n]."""
    pairs, _, counts = distinct(np.column_stack([labels.ids, group]).astype(np.uint64))
    rows = labels.rows[labels.ids[pairs]].astype(np.float32)  # of the distinct pairs, ascending by code
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
