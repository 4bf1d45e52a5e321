"""The results tables of README.md, made from benchmarks/results/ and never typed.

python benchmarks/results.py --add TABLE ROW DIR/metrics.json   keep an evaluation as a result
python benchmarks/results.py --write                            write the tables into README.md
python benchmarks/results.py --check                            exit 1 if README.md says otherwise

results/TABLE/table.json says the title, the protocol in words, and what the papers report; every other file there is
one evaluation. Rows are methods and baselines, columns code lengths; several seeds become mean ± standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks/results", ROOT / "README.md"
BEGIN, END = "<!-- results: made by `make results` -->", "<!-- end of results -->"
BASELINES = ("class-code", "float-cosine", "itq-linear", "itq", "pca-sign", "lsh", "random")
LABEL_NET = {"label_map": "LabNet's map_l", "label_n_h": "n_h"}
SHOWN = {"within": "within", "cross": "cross", "generalised": "gen."}
Cells = dict[tuple[str, str], list[float]]


def add(table: str, row: str, metrics_path: Path) -> Path:
    """Keep what the tables need of an evaluation's metrics.json, without curves, gallery and samples."""
    about = json.loads((RESULTS / table / "table.json").read_text())
    if row not in about["rows"]:
        raise SystemExit(f"{table} has no row {row!r}; it has {', '.join(about['rows'])}")
    metrics = json.loads(metrics_path.read_text())
    if (metrics["protocol"]["top_k"], metrics["protocol"]["ties"]) != (None, "expected"):
        raise SystemExit("the tables are of the whole ranking with expected ties; evaluate without --top-k and --ties")
    kept = {
        "row": row,
        "protocol": metrics["protocol"],
        "environment": metrics["environment"],
        "results": [
            {k: v for k, v in result.items() if k not in ("pr_curve", "code_health")} for result in metrics["results"]
        ],
        "harmonic_mean": metrics.get("harmonic_mean", {}),
        "training": metrics.get("training", {}),
    }
    bits = metrics["results"][0]["num_bits"]
    seeds = f"{metrics['protocol']['split_seed']}-{metrics['protocol']['train_seed']}"
    path = RESULTS / table / f"{row}_{bits}_{seeds}.json"
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return path


def tables() -> str:
    """Every table as Markdown, in the order of their names."""
    parts = [_table(path.parent) for path in sorted(RESULTS.glob("*/table.json"))]
    return "\n\n".join([*[part for part in parts if part], *_label_lines()])


def _table(folder: Path) -> str:
    about = json.loads((folder / "table.json").read_text())
    entries = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "table.json"]
    if not entries:
        return ""
    cells: Cells = {}
    for entry in entries:
        for row, column, value in _numbers(entry):
            cells.setdefault((row, column), []).append(value)
    columns = sorted({column for _, column in cells}, key=_column_order)
    own = [row for row in about["rows"] if any((row, column) in cells for column in columns)]
    rows = own + [name for name in BASELINES if any((name, column) in cells for column in columns)]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    paper = about.get("paper", {})
    for row in rows:
        texts = [_cell(cells.get((row, column)), paper.get(row, {}).get(column), row in own) for column in columns]
        lines.append(f"| {about['rows'].get(row, row) if row in own else row} | " + " | ".join(texts) + " |")
    title = f"**{about['title']}.** {about['protocol']}"
    return "\n".join([title, "", *lines, "", _made(entries)])


def _numbers(entry: dict[str, Any]) -> Iterable[tuple[str, str, float]]:
    """(row, column, value): our own method goes by the entry's row name, baselines by their own."""
    bits, ours = entry["results"][0]["num_bits"], entry["results"][0]["name"]
    for result in entry["results"]:
        column = f"{bits} bits" + (f" {SHOWN[result['scenario']]}" if "scenario" in result else "")
        yield entry["row"] if result["name"] == ours else result["name"], column, result["mAP"]
    for name, value in entry["harmonic_mean"].items():
        yield entry["row"] if name == ours else name, f"{bits} bits H", value
    last = (entry["training"].get("phases") or [{}])[-1]
    for name, column in LABEL_NET.items():
        if name in last:
            yield entry["row"], column, last[name]


def _column_order(column: str) -> tuple[int, int]:
    bits, _, rest = column.partition(" bits")
    names = ["", " within", " cross", " gen.", " H"]
    return (int(bits), names.index(rest)) if bits.isdigit() else (1 << 30, -len(column))


def _cell(values: list[float] | None, paper: float | None, own: bool) -> str:
    if not values:
        return f"({paper:g})" if paper is not None else ""
    mean = statistics.fmean(values)
    text = f"{mean:.0f}" if mean > 2 else f"{mean:.4f}"
    if len(values) > 1 and own:
        text += f" ± {statistics.stdev(values):.4f}" if mean <= 2 else f" ± {statistics.stdev(values):.0f}"
    text = f"**{text}**" if own else text
    return text + (f" ({paper:g})" if paper is not None else "")


def _made(entries: list[dict[str, Any]]) -> str:
    """Sizes, seeds, commit and hardware of a table's runs."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(f"{v:,}" if isinstance(v, int) else str(v) for v in values))

    protocols = [entry["protocol"] for entry in entries]
    made = [entry["environment"] for entry in entries]
    features = [protocol["baseline_features"] for protocol in protocols if "baseline_features" in protocol]
    return (
        f"Protocol `{all_of(p['name'] for p in protocols)}`: {all_of(p['train'] for p in protocols)} train, "
        f"{all_of(p['queries'] for p in protocols)} query, {all_of(p['database'] for p in protocols)} database rows; "
        f"baselines on {all_of(features) or 'nothing'}; split seeds {all_of(p['split_seed'] for p in protocols)}, "
        f"train seeds {all_of(p['train_seed'] for p in protocols)}; commits {all_of(m['commit'] for m in made)}; "
        f"torch {all_of(m['torch'] for m in made)}; {all_of(m['hardware'] for m in made)}."
    )


def _label_lines() -> list[str]:
    """LabNet alone, from label matrices: map_l and n_h beside the paper's Table 2."""
    lines = [
        "| LabNet alone on label rows | bits | seed | map_l | n_h | distinct rows |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for path in sorted(RESULTS.glob("labels_*.json")):
        kept = json.loads(path.read_text())
        for run in kept["runs"]:
            score = f"{run['map_l']:.4f}"
            cells = (kept["labels"], kept["num_bits"], run["seed"], score, run["n_h"], run["label_rows"])
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return ["\n".join(lines)] if len(lines) > 2 else []


def readme_with(text: str, body: str) -> str:
    """README.md's text with the tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=3, metavar=("TABLE", "ROW", "METRICS"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    if wanted.add:
        print(f"kept in {add(wanted.add[0], wanted.add[1], Path(wanted.add[2])).relative_to(ROOT)}")
    text = README.read_text()
    made = readme_with(text, tables())
    if wanted.write:
        README.write_text(made)
    if wanted.check and made != text:
        print("README.md's results tables are stale: run `make results`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
