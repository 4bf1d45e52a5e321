"""Pseudo-labels from class scores: proposals, confidence, which are accepted. No Ray.

AdaLabelHash section 4; what the paper leaves open is decided in METHODS 2.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hashray.errors import InputError


@dataclass(frozen=True)
class Shape:
    """How many classes a proposal sets: `top` to 1, `bottom` to 0, the rest stay unknown (-1).

    Rows of exactly one class have top = 1 and every other class at 0.
    """

    top: int
    bottom: int

    @staticmethod
    def of(labels: NDArray[np.uint8], top: int | None = None, bottom: int | None = None) -> Shape:
        """From the labelled rows [n, c]: k is the mean number of labels a row, k' is c - 3 k (METHODS 2.5)."""
        present = int(labels.any(0).sum())
        if top is None and bottom is None and bool((labels.sum(1) == 1).all()):
            return Shape(1, present - 1)
        top = max(1, round(float(labels.sum(1).mean()))) if top is None else top
        if top > present:
            raise InputError(f"self_training.top_classes = {top}, and the labelled rows have {present} classes")
        return Shape(top, max(0, present - 3 * top) if bottom is None else min(bottom, present - top))


@dataclass(frozen=True)
class Proposals:
    """labels int8 [n, c] in {0, 1, -1}; confidence float64 [n], the mass of the top classes."""

    labels: NDArray[np.int8]
    confidence: NDArray[np.float64]


def propose(scores: NDArray[np.floating], temperature: float, shape: Shape) -> Proposals:
    """Rank the classes of each row by p = softmax(scores / temperature).

    Args:
        scores: [n, c]; -inf for a class never trained on, which stays 0.
    """
    from scipy.special import softmax  # a quarter second of imports, for self-training alone

    p = softmax(scores.astype(np.float64) / temperature, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    labels = np.full(scores.shape, -1, dtype=np.int8)
    labels[np.isneginf(scores)] = 0
    present = np.isfinite(scores).sum(1)[:, None]
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(scores.shape[1])[None, :], axis=1)
    labels[(rank >= present - shape.bottom) & (rank < present)] = 0
    labels[rank < shape.top] = 1
    confidence = np.take_along_axis(p, order[:, : shape.top], axis=1).sum(1)
    return Proposals(labels, confidence)


def fit_temperature(scores: NDArray[np.floating], labels: NDArray[np.uint8]) -> float:
    """The temperature that minimises the negative log-likelihood of labelled rows [n, c], of each of their labels.

    One label more is taken for any class alike: where every row is right, the likelihood alone would have 0. Between
    1e-3 and 1e3 times the spread of the scores.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    values = scores.astype(np.float64)
    present = np.isfinite(values)
    spread = float(values[present].std()) or 1.0
    row, column = np.nonzero((labels == 1) & present)
    if not len(row):
        return 1.0

    def cost(log_temperature: float) -> float:
        scaled = values / math.exp(log_temperature)
        surprise = logsumexp(scaled, axis=1, keepdims=True) - scaled
        return float((surprise[row, column].sum() + surprise[present].mean()) / (len(row) + 1))

    middle = math.log(spread)
    return math.exp(minimize_scalar(cost, bounds=(middle - 7, middle + 7), method="bounded").x)


def accept(
    ids: Sequence[str],
    proposed: NDArray[np.int8],
    confidence: NDArray[np.float64],
    threshold: float,
    most: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which rows [n] are accepted: the most confident first, ties by id, while none of their classes is full.

    Args:
        proposed: [n, c], 1 for the classes of a row.
        most: [c], of how many accepted rows each class may be one.
    """
    chosen = np.zeros(len(ids), dtype=bool)
    order = np.lexsort((np.asarray(ids, dtype=object).astype(str), -confidence))
    left = most.copy()
    for i in order:
        classes = proposed[i] == 1
        if confidence[i] >= threshold and bool((left[classes] > 0).all()):
            left[classes] -= 1
            chosen[i] = True
    return chosen


def most_per_class(labels: NDArray[np.uint8], rows: int, balance: float) -> NDArray[np.int64]:
    """How many of `rows` each class may get: `balance` times the share of labelled rows [n, c] it has, rounded up."""
    return np.ceil(balance * labels.mean(0) * rows).astype(np.int64)


def precision(proposed: NDArray[np.int8], hidden: NDArray[np.uint8]) -> float | None:
    """Share of proposed positive labels [n, c] that are true, over rows that have hidden labels; None without any."""
    known = hidden.any(1)
    positive = (proposed[known] == 1).sum()
    return float(((proposed[known] == 1) & (hidden[known] == 1)).sum() / positive) if positive else None


def falls_of(scores: Sequence[float]) -> int:
    """How many rounds scored below the one before them, in a row or not (the guard of METHODS 2.5).

    >>> falls_of([0.9, 0.8, 0.85, 0.85, 0.84])
    2
    """
    return sum(after < before for before, after in pairwise(scores))
