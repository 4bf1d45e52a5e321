"""The baselines that a method must beat before its score means anything (METHODS 6.8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CALIBRATION = ("class-code", "itq-linear", "itq")


def baselines_not_beaten(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the calibration baselines that score at least as high as the first row, which is ours (METHODS 6.8).

    Where the baselines rank a sample of the database, they are compared with our score on the same sample.
    """
    ours, *others = results
    score = ours.get("sample_mAP", ours["mAP"])
    return [row["name"] for row in others if row["name"] in CALIBRATION and row["mAP"] >= score]
