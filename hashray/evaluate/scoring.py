"""The numbers of an evaluation: scores by scenario, distances, a gallery. Arrays in, JSON-able out. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes, hamming
from hashray.metrics import Ranking, average_precisions, code_health, rank

GALLERY_NEIGHBOURS = 10
SAMPLE_ROWS = 1000


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
    """The queries or the database: ids [n], labels multi-hot uint8 [n, c], and packed codes or features by name."""

    ids: list[str]
    labels: NDArray[np.uint8]
    values: dict[str, NDArray[Any]]

    def among(self, ids: set[str]) -> Side:
        """Only the rows with these ids."""
        kept = np.array([row_id in ids for row_id in self.ids], dtype=bool)
        names = [row_id for row_id in self.ids if row_id in ids]
        return Side(names, self.labels[kept], {name: values[kept] for name, values in self.values.items()})


def score(
    name: str, num_bits: int, query: Side, database: Side, top_k: int | None, ties: str
) -> tuple[dict[str, Any], Ranking]:
    """One row of the results, and the ranking behind it."""
    labelled = query.values[name], query.labels, database.values[name], database.labels
    ranking = rank(*labelled)
    scores = average_precisions(*labelled, top_k, ties)
    curve = ranking.precision_recall_curve()
    row = {
        "name": name,
        "num_bits": num_bits,
        "top_k": top_k,
        "ties": ties,
        "mAP": scores.mean,
        "queries_without_relevant": scores.num_without_relevant,
        "precision_at": {str(n): value for n, value in ranking.precision_at().items()},
        "precision_radius_2": ranking.precision_within_radius(2),
        "pr_curve": {"precision": curve.precision.tolist(), "recall": curve.recall.tolist()},
        "code_health": code_health(database.values[name], labels=database.labels),
    }
    return row, ranking


def harmonic_means(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """H = 2 W C / (W + C) of the mAP within and across classes, by method (METHODS 3.3); empty without both."""
    scores = {(row["name"], row.get("scenario")): row["mAP"] for row in results}
    names = dict.fromkeys(row["name"] for row in results)
    both = [(name, scores.get((name, "within")), scores.get((name, "cross"))) for name in names]
    return {name: 2 * w * c / max(w + c, 1e-12) for name, w, c in both if w is not None and c is not None}


def distance_shares(ranking: Ranking) -> dict[str, list[float]]:
    """Share of relevant and of other pairs at each Hamming distance 0 .. num_bits."""
    relevant, total = ranking.relevant.sum(0), ranking.total.sum(0)
    other = total - relevant
    return {
        "relevant": (relevant / max(1, relevant.sum())).tolist(),
        "other": (other / max(1, other.sum())).tolist(),
    }


def code_sample(query: Side, name: str, seed: int) -> dict[str, Any]:
    """Some queries' codes as hexadecimal text, with their first class (-1: none), for a map of the codes."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(query.ids))[:SAMPLE_ROWS])
    labels = query.labels[chosen]
    first = np.where(labels.any(1), labels.argmax(1), -1)
    return {"codes": [code.tobytes().hex() for code in query.values[name][chosen]], "labels": first.tolist()}


def gallery(
    name: str, query: Side, database: Side, ranking: Ranking, classes: Sequence[str], count: int, seed: int
) -> list[dict[str, Any]]:
    """Some queries spread over the classes, then those of the lowest AP, with their nearest rows; ties by id."""
    order = np.lexsort((np.random.default_rng(seed).permutation(len(query.ids)), query.labels.argmax(1)))
    hard = count // 4
    places = np.linspace(0, len(order) - 1, min(count - hard, len(order))).round().astype(int)
    scores = ranking.average_precisions().values
    hardest = np.argsort(scores, kind="stable")[:hard]
    by_id = np.argsort(np.array(database.ids))
    codes: Codes = database.values[name]

    def names(labels: NDArray[np.uint8]) -> list[str]:
        return [classes[int(i)] for i in np.flatnonzero(labels)]

    entries = []
    for row in dict.fromkeys([*order[places].tolist(), *hardest.tolist()]):
        distances = hamming(query.values[name][row : row + 1], codes)[0][by_id]
        near = np.argsort(distances, kind="stable")[:GALLERY_NEIGHBOURS]
        neighbours = [
            {
                "id": database.ids[by_id[i]],
                "distance": int(distances[i]),
                "labels": names(database.labels[by_id[i]]),
                "relevant": bool((database.labels[by_id[i]] & query.labels[row]).any()),
            }
            for i in near
        ]
        ap = None if np.isnan(scores[row]) else float(scores[row])
        hit = {"query": query.ids[row], "labels": names(query.labels[row]), "average_precision": ap}
        entries.append({**hit, "neighbours": neighbours, "hardest": row in hardest})
    return entries
