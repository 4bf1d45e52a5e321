"""LabNet alone on the label matrices of the papers' benchmarks: map_l and n_h of DSEH's Table 2, no images.

    python benchmarks/labels.py FOLDER [--name nuswide_21] [--num-bits 32] [--seeds 0]

FOLDER holds NAME__train.npz and NAME__test.npz: `bits`, packed label rows, and `n_classes`. Test rows are the
queries, train rows the database, ties averaged over all orders. Writes benchmarks/results/labels_NAME_BITS.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.evaluate.environment import environment
from hashray.methods.dseh import DSEHConfig, fit_label_network
from hashray.metrics import mean_average_precision

RESULTS = Path(__file__).resolve().parent / "results"


def labels(folder: Path, name: str) -> NDArray[np.uint8]:
    """A label matrix uint8 [n, c] from its packed file."""
    with np.load(folder / f"{name}.npz") as data:
        return np.unpackbits(data["bits"], axis=1)[:, : int(data["n_classes"])]


def run(folder: Path, name: str, num_bits: int, seed: int) -> dict[str, Any]:
    """Fit on the train rows; score the test rows against them."""
    train, test = labels(folder, f"{name}__train"), labels(folder, f"{name}__test")
    start = time.perf_counter()
    net = fit_label_network(train, DSEHConfig(num_bits=num_bits), seed)
    seconds = time.perf_counter() - start
    codes = net.codes(train)
    score = mean_average_precision(net.codes(test), test, codes, train)
    distinct = len(np.unique(codes, axis=0))
    return {"seed": seed, "map_l": score, "n_h": distinct, "label_rows": len(np.unique(train, axis=0)), "s": seconds}


def main() -> None:
    """Run every seed, print a line each, keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="nuswide_21")
    parser.add_argument("--num-bits", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    wanted = parser.parse_args()
    runs = []
    for seed in wanted.seeds:
        runs.append(run(wanted.folder, wanted.name, wanted.num_bits, seed))
        print(json.dumps(runs[-1]), flush=True)
    kept = {"labels": wanted.name, "num_bits": wanted.num_bits, "runs": runs, "environment": environment()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"labels_{wanted.name}_{wanted.num_bits}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
