"""The results tables of README.md, made from benchmarks/results/ and never typed.

python benchmarks/results.py --add TABLE ROW DIR/metrics.json   keep an evaluation as a result (--replace another)
python benchmarks/results.py --add-sweep DIR                    keep a sweep as a result
python benchmarks/results.py --write                            write the tables into README.md
python benchmarks/results.py --check                            exit 1 if README.md says otherwise

results/TABLE/table.json says the title, the protocol by name and in words, what the papers report, which two rows are
compared seed by seed, and whether all rows share one trunk; every other file there is one evaluation. Rows are methods
and baselines, columns code lengths; several seeds become mean ± standard deviation. What does not belong into one cell
(another config, other sizes, baselines of some seeds only) is refused, not averaged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hashray.report.calibration import CALIBRATION

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks/results", ROOT / "README.md"
BEGIN, END = "<!-- results: made by `make results` -->", "<!-- end of results -->"
FLAGGED = f"† not above a calibration row on the same features ({', '.join(CALIBRATION)})."
BASELINES = ("class-code", "float-cosine", "itq-linear", "itq", "pca-sign", "lsh", "random")
LABEL_NET = {"label_map": "map_l", "label_n_h": "n_h"}
SIZES = ("name", "train", "queries", "database", "classes")
NO_SWEEPS = ("about.json", "speed.json")
SIDES = ("default", "winner")
SHOWN = {"within": "within", "cross": "cross", "generalised": "gen."}
Seeds = tuple[int, int]
Cells = dict[tuple[str, str], dict[Seeds, float]]


def add(table: str, row: str, metrics_path: Path, replace: bool = False) -> Path:
    """Keep what the tables need of an evaluation's metrics.json, without curves, gallery and samples."""
    about = json.loads((RESULTS / table / "table.json").read_text())
    if row not in about["rows"]:
        raise SystemExit(f"{table} has no row {row!r}; it has {', '.join(about['rows'])}")
    metrics = json.loads(metrics_path.read_text())
    protocol = metrics["protocol"]
    if (protocol["top_k"], protocol["ties"]) != (None, "expected"):
        raise SystemExit("the tables are of the whole ranking with expected ties; evaluate without --top-k and --ties")
    if protocol["name"] != about["split_protocol"]:
        raise SystemExit(f"{table} is of protocol {about['split_protocol']}, this evaluation of {protocol['name']}")
    kept = {
        "row": row,
        "protocol": protocol,
        "environment": metrics["environment"],
        "results": [
            {k: v for k, v in result.items() if k not in ("pr_curve", "code_health")} for result in metrics["results"]
        ],
        "harmonic_mean": metrics.get("harmonic_mean", {}),
        "training": metrics.get("training", {}),
    }
    backbone = kept["training"].get("config", {}).get("backbone", {})
    if backbone.get("weights"):  # the file's name: where it lies is of one machine
        backbone["weights"] = Path(backbone["weights"]).name
    bits = metrics["results"][0]["num_bits"]
    path = RESULTS / table / f"{row}_{bits}_{protocol['split_seed']}-{protocol['train_seed']}.json"
    text = json.dumps(kept, indent=1, sort_keys=True) + "\n"
    if path.exists() and path.read_text() != text and not replace:
        raise SystemExit(f"{path.relative_to(ROOT)} is of another evaluation; give --replace to put this one there")
    path.write_text(text)
    return path


def tables() -> str:
    """Every table as Markdown, in the order of their names."""
    parts = []
    for path in sorted(RESULTS.glob("*/table.json")):
        files = [file for file in sorted(path.parent.glob("*.json")) if file.name != path.name]
        if files:
            parts.append(table_of(json.loads(path.read_text()), [json.loads(file.read_text()) for file in files]))
    return "\n\n".join([*parts, *_sweep_lines(), *_label_lines()])


def table_of(about: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """A table of evaluations as Markdown.

    Raises:
        SystemExit: what would share a cell or a comparison was not made alike.
    """
    _require_alike(about, entries)
    cells: Cells = {}
    for entry in entries:
        for row, column, value in _numbers(entry):
            cells.setdefault((row, column), {}).setdefault(_seeds(entry), value)
    paper = about.get("paper", {})
    columns = sorted({column for _, column in cells} | {c for own in paper.values() for c in own}, key=_column_order)
    own = [row for row in about["rows"] if any((row, column) in cells for column in columns)]
    # LabNet's scores compare rows that all have one; beside methods without, two columns of gaps say nothing.
    columns = [
        column
        for column in columns
        if column.rpartition(" ")[2] not in LABEL_NET.values()
        or all((row, column) in cells for row in own if (row, column.rpartition(" ")[0]) in cells)
    ]
    for column in columns:
        seeds = {row: set(cells[row, column]) for row in (*own, *BASELINES) if (row, column) in cells}
        _require_same_seeds(column, {row: found for row, found in seeds.items() if row in own})
        _require_same_seeds(column, {row: {(split, 0) for split, _ in found} for row, found in seeds.items()})
    rows = own + [name for name in BASELINES if any((name, column) in cells for column in columns)]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        ours = row in own
        texts = [
            _cell(_told(cells.get((row, c)), ours), paper.get(row, {}).get(c), ours, ours and _reached(cells, row, c))
            for c in columns
        ]
        lines.append(f"| {about['rows'].get(row, row) if ours else row} | " + " | ".join(texts) + " |")
    if "compare" in about:
        lines.append(_paired(about, cells, columns))
    title = f"**{about['title']}.** {about['protocol']}"
    flagged = [FLAGGED, ""] if any("†" in line for line in lines) else []
    return "\n".join(
        [title, "", *lines, "", *flagged, *_round_lines(entries), _made(entries, about.get("configs", []))]
    )


def _baselines_on(entry: dict[str, Any]) -> str:
    protocol = entry["protocol"]
    rows = f", {protocol['baseline_train_rows']:,} train rows" if "baseline_train_rows" in protocol else ""
    return protocol["baseline_features"] + rows if "baseline_features" in protocol else ""


def _seeds(entry: dict[str, Any]) -> Seeds:
    return entry["protocol"]["split_seed"], entry["protocol"]["train_seed"]


def _require_alike(about: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    sizes = {tuple(entry["protocol"][name] for name in SIZES) for entry in entries}
    if len(sizes) > 1:
        raise SystemExit(f"{about['title']}: evaluations of different sizes in one table: {sorted(map(str, sizes))}")
    configs: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in entries:
        config = {k: v for k, v in entry["training"].get("config", {}).items() if k != "seed"}
        key = entry["row"], entry["results"][0]["num_bits"]
        if configs.setdefault(key, config) != config:
            raise SystemExit(
                f"{about['title']}: the seeds of {key[0]} at {key[1]} bits were trained with other configs"
            )
    trunks = {entry["training"].get("trunk") for entry in entries}
    if about.get("one_trunk") and (len(trunks) > 1 or None in trunks):
        raise SystemExit(f"{about['title']}: all rows are to be of one trunk, these are of {sorted(map(str, trunks))}")
    fitted = {_baselines_on(entry) for entry in entries} - {""}
    if len(fitted) > 1:
        raise SystemExit(f"{about['title']}: baselines on different features or rows in one table: {sorted(fitted)}")


def _require_same_seeds(column: str, seeds: dict[str, set[Seeds]]) -> None:
    for row, own in seeds.items():
        if own != next(iter(seeds.values())):
            raise SystemExit(
                f"{column}: {row} is of the seeds {sorted(own)}, others of {sorted(next(iter(seeds.values())))}"
            )


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
            yield entry["row"], f"{bits} bits {column}", last[name]


def _column_order(column: str) -> tuple[int, int]:
    bits, _, rest = column.partition(" bits")
    return int(bits), ["", " within", " cross", " gen.", " H", " map_l", " n_h"].index(rest)


def _told(values: dict[Seeds, float] | None, own: bool) -> list[float]:
    """A cell's values; of a baseline, which no training seed changes, one for each split."""
    if not values or own:
        return list((values or {}).values())
    by_split: dict[int, set[float]] = {}
    for (split, _), value in values.items():
        by_split.setdefault(split, set()).add(value)
    return [value for found in by_split.values() for value in found]


def _cell(values: list[float], paper: float | None, own: bool, reached: bool) -> str:
    if not values:
        return f"({paper:g})" if paper is not None else ""
    text = _mean(values)
    text = f"**{text}**" + "†" * reached if own else text
    return text + (f" ({paper:g})" if paper is not None else "")


def _mean(values: list[float], sign: str = "") -> str:
    mean = statistics.fmean(values)
    shape = f"{sign}.0f" if abs(mean) > 2 else f"{sign}.4f"
    return f"{mean:{shape}}" + (f" ± {statistics.stdev(values):{shape.lstrip('+')}}" if len(values) > 1 else "")


def _paired(about: dict[str, Any], cells: Cells, columns: list[str]) -> str:
    """One row's lead over another on the same split and training seeds: mean and spread of the differences."""
    left, right = about["compare"]
    texts = []
    for column in columns:
        ours, theirs = cells.get((left, column), {}), cells.get((right, column), {})
        shared = [ours[seeds] - theirs[seeds] for seeds in ours if seeds in theirs]
        texts.append(_mean(shared, "+") if shared else "")
    return f"| {about['rows'][left]} over {about['rows'][right]}, seed by seed | " + " | ".join(texts) + " |"


def _reached(cells: Cells, row: str, column: str) -> bool:
    """Whether a calibration row on the same features has as good a mean as this row of ours (METHODS 6.8)."""
    if (row, column) not in cells:
        return False
    mean = statistics.fmean(cells[row, column].values())
    return any(statistics.fmean(cells[n, column].values()) >= mean for n in CALIBRATION if (n, column) in cells)


def _round_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Pseudo-labels of each round of self-training: how many, how many of them true, and what they did."""
    lines = []
    for entry in entries:
        told = []
        for found in entry["training"].get("rounds", []):
            right = "" if found["precision"] is None else f", {found['precision']:.1%} of their labels true"
            told.append(
                f"round {found['round']}: {found['accepted']:,} of {found['unlabelled']:,} rows accepted{right}, "
                f"validation {found['before']:.4f} to {found['validation_map']:.4f}"
            )
        if told:
            lines += [f"At {entry['results'][0]['num_bits']} bits, {'; '.join(told)}.", ""]
    return lines


def _made(entries: list[dict[str, Any]], configs: list[str]) -> str:
    """Sizes, seeds, commands, commit and hardware of a table's runs."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(f"{v:,}" if isinstance(v, int) else str(v) for v in values))

    protocols = [entry["protocol"] for entry in entries]
    made = [entry["environment"] for entry in entries]
    fitted = [on for entry in entries if (on := _baselines_on(entry))]
    return (
        f"Protocol `{all_of(p['name'] for p in protocols)}`: {all_of(p['train'] for p in protocols)} train, "
        f"{all_of(p['queries'] for p in protocols)} query, {all_of(p['database'] for p in protocols)} database rows; "
        f"baselines on {all_of(fitted) or 'nothing'}; split seeds {all_of(p['split_seed'] for p in protocols)}, "
        f"train seeds {all_of(p['train_seed'] for p in protocols)}; "
        + (f"commands at the head of {all_of(f'`jobs/configs/{name}`' for name in configs)}; " if configs else "")
        + f"commits {all_of(m['commit'] for m in made)}; "
        f"torch {all_of(m['torch'] for m in made)}; {all_of(m['hardware'] for m in made)}."
    )


def add_sweep(folder: Path) -> Path:
    """Keep what the table of sweeps needs: what was found, with which winner and default, and what made it."""
    found = json.loads((folder / "sweep.json").read_text())
    metrics = json.loads(min(folder.glob("evaluations/**/metrics.json")).read_text())
    method = metrics["training"]["config"]["method"]
    names = ("trials", "epochs", "epochs_of_full_grid", "best_trial", "best_score", "default_score", "failed")
    kept = {
        **{name: found[name] for name in names},
        "compared": found["compared"], "verdict": found["verdict"], "method": method["kind"],
        "num_bits": method["num_bits"], "protocol": metrics["protocol"], "environment": metrics["environment"],
    }  # fmt: skip
    path = RESULTS / "sweeps" / f"{method['kind']}.json"
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return path


def _sweep_lines() -> list[str]:
    """What sweeps found beside the values that they began from, each trained anew with several seeds."""
    folder = RESULTS / "sweeps"
    sweeps = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.name not in NO_SWEEPS]
    if not sweeps:
        return []
    about = json.loads((folder / "about.json").read_text())
    names = [f"{kind}: {who}" for kind in ("validation", "queries") for who in SIDES]
    lines = [f"**{about['title']}.** {about['protocol']}", ""]
    lines += ["| | trials | epochs of the full grid | " + " | ".join(names) + " |", "|---|" + "---:|" * 6]
    for sweep in sweeps:
        spent, full = sweep["epochs"], sweep["epochs_of_full_grid"]
        cells = [sweep["method"], str(sweep["trials"]), f"{spent:,} of {full:,} ({spent / full:.0%})"]
        sides = [sweep["compared"].get(who, {}).get("seeds", []) for who in SIDES]
        for score in ("validation", "query_harmonic" if "query_harmonic" in sides[1][0] else "query_mAP"):
            cells += [_mean([line[score] for line in seeds]) if seeds else "" for seeds in sides]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *[f"- {sweep['method']}: {sweep['verdict']}" for sweep in sweeps]]
    if (folder / "speed.json").exists():
        ran = json.loads((folder / "speed.json").read_text())
        lines.append(
            f"- Trials an hour, each of {ran['epochs']} epochs over {ran['rows']:,} rows, in one run of "
            f"`benchmarks/tune.py`: {ran['cached_trials_per_hour']:.0f} on cached features ({ran['trials']} trials), "
            f"{ran['trunk_trials_per_hour']:.1f} through the trunk ({ran['trunk_trials']}); "
            f"{ran['ratio']:.1f} times as many ({ran['ratio_with_features']:.1f} with the features' own pass)."
        )
    made = [sweep["environment"] for sweep in sweeps]
    by = [", ".join(dict.fromkeys(str(own[name]) for own in made)) for name in ("commit", "torch", "hardware")]
    return ["\n".join([*lines, "", f"Commits {by[0]}; torch {by[1]}; {by[2]}."])]


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
    parser.add_argument("--add-sweep", type=Path, metavar="DIR")
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    if wanted.add:
        print(f"kept in {add(*wanted.add[:2], Path(wanted.add[2]), wanted.replace).relative_to(ROOT)}")
    if wanted.add_sweep:
        print(f"kept in {add_sweep(wanted.add_sweep).relative_to(ROOT)}")
    if not (wanted.write or wanted.check):
        return 0
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
