"""Trials of a sweep on cached trunk features against trials that run the trunk, in one run on the same rows.

    python benchmarks/tune.py CORPUS --weights FILE [--trials 24] [--trunk-trials 2] [--epochs 3] [--image-size 128]
        [--out FILE.json]

AdaLabelHash on MobileNetV2, random search, nothing stopped early, so trials of both kinds train the same epochs over
the same rows; the trunk that runs is fine-tuned, as it would be where features cannot be cached, with all cores for one
trial, and heads train one on each core. What a sweep takes to begin counts for both. The pass that computes the
features is made once and shared by all trials: it is shown by itself, and in the ratio that counts it as well.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update({"RAY_worker_niceness": "0", "OMP_WAIT_POLICY": "passive"})  # before torch is imported and Ray starts

import ray
from timing import write_json

from hashray.config import validate
from hashray.data.corpus import open_corpus
from hashray.engine.session import connect
from hashray.storage import absolute, join
from hashray.train.run import training_data, with_absolute_paths
from hashray.tune.search import search
from hashray.tune.space import SweepConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--trunk-trials", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    corpus = open_corpus(absolute(given.corpus))
    connect()
    counts, rates, features_s = {True: given.trials, False: given.trunk_trials}, {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for frozen in (True, False):
            config = _config(given, frozen, counts[frozen], join(folder, "features") if frozen else None)
            if frozen:
                start = time.perf_counter()
                training_data(config.base, corpus, None)
                features_s = time.perf_counter() - start
            start = time.perf_counter()
            trials, _ = search(config, corpus, join(folder, "cached" if frozen else "trunk"), "benchmark")
            assert all(trial.state == "finished" for trial in trials)
            rates[frozen] = counts[frozen] / (time.perf_counter() - start) * 3600
    with_features = given.trials / (given.trials / rates[True] * 3600 + features_s) * 3600
    report: dict[str, Any] = {
        "rows": corpus.count("train"), "trials": given.trials, "trunk_trials": given.trunk_trials,
        "epochs": given.epochs, "image_size": given.image_size,
        "cached_trials_per_hour": rates[True], "trunk_trials_per_hour": rates[False], "features_s": features_s,
        "ratio": rates[True] / rates[False], "ratio_with_features": with_features / rates[False],
        "ray": ray.__version__,
    }  # fmt: skip
    print(f"cached features: {rates[True]:.1f} trials/h; trunk: {rates[False]:.1f} trials/h; {report['ratio']:.1f}x")
    print(f"with the {features_s:.0f} s of the features counted, once: {report['ratio_with_features']:.1f}x")
    if given.out is not None:
        write_json(given.out, report)


def _config(given: argparse.Namespace, frozen: bool, trials: int, features: str | None) -> SweepConfig:
    table = {
        "method": {"kind": "adalabelhash", "num_bits": 32, "label_loss": "hinge", "codeword_init": "spread"},
        "backbone": {"name": "mobilenet_v2", "weights": given.weights, "image_size": given.image_size,
                     "frozen": frozen, "frozen_norms": not frozen},
        "epochs": given.epochs, "batch_size": 256, "validation_rows": 500, "features": features,
        "cpus_per_worker": 1 if frozen else os.cpu_count(), "memory_limit_mib": 16_384,
        "space": {"optim.lr": {"log": [1e-4, 1e-2]}},
        "search": {"trials": trials, "algorithm": "random", "scheduler": "none"},
    }  # fmt: skip
    return with_absolute_paths(validate(SweepConfig, table, "the benchmark"))


if __name__ == "__main__":
    main()
