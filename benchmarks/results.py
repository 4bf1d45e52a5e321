"""The results table of README.md, made from benchmarks/results/*.json and never typed.

python benchmarks/results.py --add NAME DIR/metrics.json [--paper .930]   keep an evaluation as a result
python benchmarks/results.py --write                                      write the table into README.md
python benchmarks/results.py --check                                      exit 1 if README.md says otherwise
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks/results", ROOT / "README.md"
BEGIN, END = "<!-- results: made by `make results` -->", "<!-- end of results -->"
COLUMNS = ("dseh", "itq", "lsh", "pca-sign", "class-code", "random", "float-cosine")


def add(name: str, metrics_path: Path) -> None:
    """Keep what the table needs of an evaluation's metrics.json, without curves and gallery."""
    metrics = json.loads(metrics_path.read_text())
    kept = {
        "name": name,
        "protocol": metrics["protocol"],
        "environment": metrics["environment"],
        "results": [
            {k: v for k, v in row.items() if k not in ("pr_curve", "code_health")} for row in metrics["results"]
        ],
    }
    bits = metrics["results"][0]["num_bits"]
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}_{bits}.json"
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(f"kept in {path.relative_to(ROOT)}")


def table() -> str:
    """The table as Markdown: a row for each corpus, protocol and code length, a column for each method."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    found = [entry for entry in found if "protocol" in entry]
    found.sort(key=lambda entry: (entry["name"], entry["results"][0]["num_bits"]))
    lines = [
        "| corpus and protocol | bits | " + " | ".join(COLUMNS) + " |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    for entry in found:
        scores = {row["name"]: row["mAP"] for row in entry["results"]}
        cells = [f"**{scores[n]:.4f}**" if n == "dseh" else f"{scores[n]:.4f}" if n in scores else "" for n in COLUMNS]
        lines.append(f"| {entry['name']} | {entry['results'][0]['num_bits']} | " + " | ".join(cells) + " |")
    notes = sorted({_note(entry) for entry in found})
    legend = "mAP over the whole ranking, the mean over all orders of ties."
    return "\n".join([*lines, "", legend, "", *notes, "", *_label_lines()])


def _label_lines() -> list[str]:
    """LabNet alone, from label matrices: map_l and n_h beside the paper's Table 2."""
    lines = [
        "| LabNet alone on label rows | bits | seed | map_l | n_h | distinct rows |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for path in sorted(RESULTS.glob("labels_*.json")):
        kept = json.loads(path.read_text())
        for run in kept["runs"]:
            cells = (
                kept["labels"],
                kept["num_bits"],
                run["seed"],
                f"{run['map_l']:.4f}",
                run["n_h"],
                run["label_rows"],
            )
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines if len(lines) > 2 else []


def _note(entry: dict[str, Any]) -> str:
    protocol, made = entry["protocol"], entry["environment"]
    features = protocol.get("baseline_features", "no")
    return (
        f"- {entry['name']}: protocol `{protocol['name']}`; {protocol['train']:,} train, "
        f"{protocol['queries']:,} query, "
        f"{protocol['database']:,} database rows; baselines on {features} features; "
        f"split seed {protocol['split_seed']}, train seed {protocol['train_seed']}; "
        f"commit {made['commit']}, torch {made['torch']}, {made['hardware']}."
    )


def readme_with(text: str, body: str) -> str:
    """README.md's text with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "METRICS"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    if wanted.add:
        add(wanted.add[0], Path(wanted.add[1]))
    text = README.read_text()
    made = readme_with(text, table())
    if wanted.write:
        README.write_text(made)
    if wanted.check and made != text:
        print("README.md's results table is stale: run `make results`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
