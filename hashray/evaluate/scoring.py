"""The numbers of an evaluation: scores, distances, a gallery. Arrays in, JSON-able out. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.evaluate.sides import Near, Side
from hashray.metrics import (
    AveragePrecisions,
    Ranking,
    average_precisions,
    code_health,
    mean_average_precision_float,
    rank,
)
from hashray.progress import Bar

FLOAT = "float-cosine"
GALLERY_NEIGHBOURS = 10
SAMPLE_ROWS = 1000


@dataclass(frozen=True)
class Scoring:
    """How codes are scored: their width, the cut and the convention for ties, and the name of the scenario, if any."""

    num_bits: int
    top_k: int | None
    ties: str
    scenario: str = ""

    def results(
        self, query: Side, sample: Side, ranking: Ranking, num_rows: int, whole: Side | None
    ) -> list[dict[str, Any]]:
        """Results of every method that both sides have, ours first.

        Args:
            sample: rows of the database; it is the whole where it has `num_rows` rows.
            ranking: ours, counted over the `num_rows` rows of the whole database.
            whole: the whole database, for ties that walk it in its order.
        """
        results = []
        where: dict[str, Any] = {"queries": len(query.ids)} | ({"scenario": self.scenario} if self.scenario else {})
        with Bar(f"score {self.scenario}".strip(), len(query.values), "methods") as bar:
            for number, name in enumerate(query.values):
                if name == FLOAT:
                    row = self._float(query, sample)
                elif number:
                    row = self._score(name, query, sample, _ranked(name, query, sample), sample)
                else:
                    row = self._score(name, query, sample, ranking, whole) | {"database": num_rows}
                    if len(sample.ids) < num_rows:
                        scores = self._precisions(name, query, _ranked(name, query, sample), sample)
                        row |= {"sample_rows": len(sample.ids), "sample_mAP": scores.mean}
                results.append({"database": len(sample.ids)} | row | where)
                bar.add(1)
        return results

    def _score(self, name: str, query: Side, sample: Side, ranking: Ranking, in_order: Side | None) -> dict[str, Any]:
        """One row of the results, from a ranking that is counted already; code health is that of the sample."""
        scores, curve = self._precisions(name, query, ranking, in_order), ranking.precision_recall_curve()
        return {
            "name": name,
            "num_bits": self.num_bits,
            "top_k": self.top_k,
            "ties": self.ties,
            "mAP": scores.mean,
            "queries_without_relevant": scores.num_without_relevant,
            "precision_at": {str(n): value for n, value in ranking.precision_at().items()},
            "precision_radius_2": ranking.precision_within_radius(2),
            "pr_curve": {"precision": curve.precision.tolist(), "recall": curve.recall.tolist()},
            "code_health": code_health(sample.values[name], labels=sample.labels),
        }

    def _precisions(self, name: str, query: Side, ranking: Ranking, in_order: Side | None) -> AveragePrecisions:
        if self.ties == "expected":
            return ranking.average_precisions(self.top_k)
        assert in_order is not None, "ties that walk the database need all of it"
        sides = query.values[name], query.labels, in_order.values[name], in_order.labels
        return average_precisions(*sides, self.top_k, self.ties)

    def _float(self, query: Side, sample: Side) -> dict[str, Any]:
        sides = query.values[FLOAT], query.labels, sample.values[FLOAT], sample.labels
        mean = mean_average_precision_float(*sides, None if self.top_k == -1 else self.top_k)
        return {"name": FLOAT, "num_bits": None, "top_k": self.top_k, "ties": None, "mAP": mean}


def _ranked(name: str, query: Side, database: Side) -> Ranking:
    return rank(query.values[name], query.labels, database.values[name], database.labels)


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
    codes, labels = query.values[name][chosen], query.labels.rows
    first = np.where(labels.any(1), labels.argmax(1), -1)[query.labels.ids[chosen]]
    return {"codes": [code.tobytes().hex() for code in codes], "labels": first.tolist()}


def gallery_queries(query: Side, scores: NDArray[np.float64], count: int, seed: int) -> dict[int, str]:
    """Places of some queries, in the order in which they are shown, each with its kind.

    A quarter have the lowest AP [q] ("worst"), a quarter the highest ("best"), the others are spread over the classes
    ("spread"). Queries without anything relevant have no AP (NaN) and are neither.
    """
    first = query.labels.rows.argmax(1)[query.labels.ids]
    order = np.lexsort((np.random.default_rng(seed).permutation(len(query.ids)), first))
    quarter = count // 4
    places = np.linspace(0, len(order) - 1, min(count - 2 * quarter, len(order))).round().astype(int)
    known = np.argsort(scores, kind="stable")[: int((~np.isnan(scores)).sum())]
    best = sorted(known[max(0, len(known) - quarter) :].tolist(), key=lambda row: (-scores[row], row))
    kinds = dict.fromkeys(order[places].tolist(), "spread")
    return kinds | dict.fromkeys(best, "best") | dict.fromkeys(known[:quarter].tolist(), "worst")


def gallery(
    query: Side, kinds: Mapping[int, str], near: Sequence[Sequence[Near]], scores: NDArray[np.float64],
    classes: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """The queries at these places with their kind, their AP and their nearest rows, JSON-able."""
    entries = []
    for (row, kind), neighbours in zip(kinds.items(), near, strict=True):
        labels = query.classes_of(row)
        entries.append(
            {
                "query": query.ids[row],
                "labels": [classes[i] for i in labels],
                "average_precision": None if np.isnan(scores[row]) else float(scores[row]),
                "neighbours": [
                    {
                        "id": hit.id,
                        "distance": hit.distance,
                        "labels": [classes[i] for i in hit.labels],
                        "relevant": not set(hit.labels).isdisjoint(labels),
                    }
                    for hit in neighbours
                ],
                "kind": kind,
                "hardest": kind == "worst",
            }
        )
    return entries
