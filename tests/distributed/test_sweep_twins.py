"""Two sweeps into one folder, each process with a Ray of its own: one whole sweep, and the other's message."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from tiny import head_config, write_corpus, write_trunk
from twins import twins

from hashray.artifact import Manifest
from hashray.config import validate
from hashray.tune.run import tune
from hashray.tune.space import SweepConfig

PAIRS = 2  # a minute each on two busy cores


@dataclass(frozen=True)
class Places:
    """Inputs that all pairs share."""

    corpus: str
    weights: Path


def run_tune(places: Places, which: int, out: str) -> Manifest:
    search = {
        "trials": 2, "scheduler": "none", "algorithm": "random", "seed": which, "at_once": 1, "report_seeds": []
    }  # fmt: skip
    config = {
        **head_config(places.weights), "epochs": 1, "validation_rows": 8, "corpus": places.corpus, "out": out,
        "space": {"optim.lr": {"log": [1e-4, 1e-1]}}, "search": search,
    }  # fmt: skip
    return tune(validate(SweepConfig, config, "twin"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("different", [True, False], ids=["different", "identical"])
def test_racing_sweeps_leave_one_whole_sweep(different: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    places = Places(str(tmp_path / "corpus"), tmp_path / "trunk.pth")
    write_corpus(places.corpus, 40, 20, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    write_trunk(places.weights)
    with twins() as pair:
        pair.race_pairs(partial(run_tune, places), different, tmp_path, PAIRS)
