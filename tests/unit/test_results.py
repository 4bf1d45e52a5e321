"""The results tables: what may share a cell, and what each number is a mean of."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks/results.py")
assert spec is not None and spec.loader is not None
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)

ABOUT: dict[str, Any] = {
    "title": "T", "protocol": "In words.", "split_protocol": "p", "rows": {"a": "Ours", "b": "Labels only"},
    "paper": {"a": {"16 bits": 0.5, "32 bits": 0.6}}, "compare": ["a", "b"],
}  # fmt: skip


def entry(
    row: str, score: float, seed: int = 0, bits: int = 16, itq: float | None = None, **more: Any
) -> dict[str, Any]:
    scores = [{"name": "lcgh", "num_bits": bits, "mAP": score}]
    scores += [] if itq is None else [{"name": "itq", "num_bits": bits, "mAP": itq}]
    protocol = {
        "name": "p", "train": 10, "queries": 5, "database": 10, "classes": 3, "split_seed": seed, "train_seed": seed,
        "top_k": None, "ties": "expected",
    }  # fmt: skip
    if itq is not None:
        protocol |= {"baseline_features": more.pop("features", "f"), "baseline_train_rows": more.pop("fitted", 10)}
    protocol |= more.pop("protocol", {})
    training = {"config": {"epochs": 3, "seed": seed}, "trunk": "t"} | more
    environment = {"commit": "c", "torch": "1", "hardware": "h"}
    return {"row": row, "protocol": protocol, "results": scores, "training": training, "environment": environment,
            "harmonic_mean": {}}  # fmt: skip


def lines(*entries: dict[str, Any], **about: Any) -> dict[str, list[str]]:
    """The cells of each row by its name."""
    text = results.table_of({**ABOUT, **about}, list(entries))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_seeds_become_a_mean_and_a_spread_and_differences_are_taken_seed_by_seed() -> None:
    table = lines(
        entry("a", 0.5, 0, itq=0.2), entry("a", 0.7, 1, itq=0.4), entry("b", 0.4, 0), entry("b", 0.58, 1),
    )  # fmt: skip
    assert table["Ours"] == ["**0.6000 ± 0.1414** (0.5)", "(0.6)"]
    assert table["itq"][0] == "0.3000 ± 0.1414"
    assert table["Ours over Labels only, seed by seed"][0] == "+0.1100 ± 0.0141"


def test_a_baseline_that_no_training_seed_changes_has_no_spread_of_them() -> None:
    one_split = [entry("a", 0.5 + s / 10, s, itq=0.2, protocol={"split_seed": 0}) for s in (0, 1, 2)]
    table = lines(*one_split)
    assert table["Ours"][0] == "**0.6000 ± 0.1000** (0.5)" and table["itq"][0] == "0.2000"
    once = [one_split[0], *(entry("a", 0.5 + s / 10, s, protocol={"split_seed": 0}) for s in (1, 2))]
    assert lines(*once) == table  # it need not be evaluated with every seed
    two_splits = [entry("a", 0.5, s, itq=0.2, protocol={"split_seed": s // 2}) for s in (0, 1, 2, 3)]
    assert lines(*two_splits)["itq"][0] == "0.2000 ± 0.0000"


def test_scores_that_a_calibration_row_reaches_are_marked() -> None:
    entries = [entry("a", 0.5, itq=0.5), entry("b", 0.6), entry("a", 0.5, bits=32, itq=0.4)]
    table = lines(*entries)
    assert table["Ours"] == ["**0.5000**† (0.5)", "**0.5000** (0.6)"] and table["Labels only"][0] == "**0.6000**"
    assert results.FLAGGED in results.table_of(ABOUT, entries)
    assert "†" not in results.table_of(ABOUT, [entry("a", 0.5, itq=0.4)])


def test_label_network_columns_keep_code_lengths_apart() -> None:
    phases = [{"label_map": 0.9, "label_n_h": 12.0}]
    table = lines(entry("a", 0.5, bits=16, phases=phases), entry("a", 0.6, bits=32, phases=phases), paper={})
    assert table["Ours"] == ["**0.5000**", "**0.9000**", "**12**", "**0.6000**", "**0.9000**", "**12**"]
    beside = lines(entry("a", 0.5, bits=16, phases=phases), entry("b", 0.6, bits=16), paper={})
    assert (beside["Ours"], beside["Labels only"]) == (["**0.5000**"], ["**0.6000**"])


def test_rounds_of_self_training_are_told() -> None:
    rounds = [
        {"round": 1, "accepted": 1200, "unlabelled": 5000, "precision": 0.97, "before": 0.8, "validation_map": 0.82}
    ]
    text = results.table_of(ABOUT, [entry("a", 0.5, rounds=rounds)])
    assert "At 16 bits, round 1: 1,200 of 5,000 rows accepted, 97.0% of their labels true, validation 0.8000 to" in text


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (entry("a", 0.6, 1, config={"epochs": 4, "seed": 1}), "trained with other configs"),
        (entry("b", 0.6, 0, protocol={"queries": 6}), "different sizes"),
        (entry("b", 0.6, 0, trunk="u"), r"one trunk, these are of \['t', 'u'\]"),
        (entry("b", 0.6, 0, trunk=None), r"one trunk, these are of \['None', 't'\]"),
        (entry("b", 0.6, 0, itq=0.3, features="g"), "baselines on different features"),
        (entry("b", 0.6, 0, itq=0.3, fitted=9), "different features or rows"),
        (entry("a", 0.6, 1), r"itq is of the seeds \[\(0, 0\)\]"),
    ],
)
def test_what_was_not_made_alike_is_not_put_together(second: dict[str, Any], text: str) -> None:
    with pytest.raises(SystemExit, match=text):
        results.table_of({**ABOUT, "one_trunk": True}, [entry("a", 0.5, itq=0.2), second])


def test_an_evaluation_is_kept_once_and_only_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/table.json").write_text(json.dumps(ABOUT))
    metrics = tmp_path / "metrics.json"
    metrics_json = entry("", 0.5, config={"backbone": {"weights": "/somewhere/of/mine/net.pth"}})
    metrics.write_text(json.dumps(metrics_json))
    kept = results.add("t", "a", metrics)
    assert json.loads(kept.read_text())["training"]["config"]["backbone"]["weights"] == "net.pth"
    assert results.add("t", "a", metrics) == kept
    metrics.write_text(json.dumps(entry("", 0.6)))
    with pytest.raises(SystemExit, match="--replace"):
        results.add("t", "a", metrics)
    results.add("t", "a", metrics, replace=True)
    assert "0.6000" in results.tables()
    metrics.write_text(json.dumps(entry("", 0.6, protocol={"name": "q"})))
    with pytest.raises(SystemExit, match="of protocol p, this evaluation of q"):
        results.add("t", "a", metrics)
    with pytest.raises(SystemExit, match="no row 'c'"):
        results.add("t", "c", metrics)


def test_a_sweep_is_a_row_with_its_seeds_and_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    evaluation = tmp_path / "sweep/evaluations/plan/winner-1"
    evaluation.mkdir(parents=True)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/about.json").write_text(json.dumps({"title": "T", "protocol": "In words."}))
    method = {"kind": "lcgh", "num_bits": 32}
    (evaluation / "metrics.json").write_text(json.dumps(entry("", 0.5, config={"method": method})))
    seeds = {
        who: {"seeds": [{"seed": s, "validation": value, "query_mAP": value + s / 10} for s in (1, 2)]}
        for who, value in (("winner", 0.6), ("default", 0.5))
    }
    summary = {"trials": 4, "epochs": 30, "epochs_of_full_grid": 40, "best_trial": 2, "best_score": 0.6,
             "default_score": 0.5, "failed": [], "compared": seeds, "verdict": "It leads."}  # fmt: skip
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(summary))
    results.add_sweep(tmp_path / "sweep")
    text = results.tables()
    assert (
        "| lcgh | 4 | 30 of 40 (75%) | 0.5000 ± 0.0000 | 0.6000 ± 0.0000 | 0.6500 ± 0.0707 | 0.7500 ± 0.0707 |" in text
    )
    assert "- lcgh: It leads." in text and "**T.** In words." in text


def split_entry(row: str, seed: int, within: float, cross: float, itq: float | None = None) -> dict[str, Any]:
    """An evaluation of a class split; the baseline is at (.2, itq)."""
    evaluation = entry(row, 0.0, seed)
    scores = {"lcgh": (within, cross)} | ({} if itq is None else {"itq": (0.2, itq)})
    evaluation["results"] = [
        {"name": name, "num_bits": 32, "mAP": both[i], "scenario": scenario}
        for i, scenario in enumerate(("within", "cross"))
        for name, both in scores.items()
    ]
    return evaluation


TARGET = {"text": "The target.", "cross": 3, "within": 3, "above": ["itq"]}


def test_a_target_is_judged_by_differences_seed_by_seed() -> None:
    plain = [split_entry("b", 0, 0.70, 0.20), split_entry("b", 1, 0.60, 0.30)]
    ours = [split_entry("a", 0, 0.68, 0.24, itq=0.26), split_entry("a", 1, 0.56, 0.35, itq=0.30)]
    text = results.frontier.verdict({**ABOUT, "target": TARGET}, [*ours, *plain])
    assert text == (
        "The target. At 32 bits: +4.5 points across (kept), +1.5 over itq across, but not on split 0 (kept), "
        "-3.0 within (kept)."
    )
    worse = [split_entry("a", 0, 0.66, 0.24, itq=0.28), split_entry("a", 1, 0.56, 0.31, itq=0.30)]
    text = results.frontier.verdict({**ABOUT, "target": TARGET}, [*worse, *plain])
    assert (
        "+2.5 points across (missed), -1.5 over itq across, but not on split 0 (missed), -4.0 within (missed)" in text
    )


def test_a_figure_is_stale_once_a_number_changes(tmp_path: Path) -> None:
    entries = [split_entry("a", 0, 0.7, 0.2, itq=0.3), split_entry("a", 1, 0.6, 0.3, itq=0.2)]
    figure = results.frontier.frontier(ABOUT, entries)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Ours", "itq"]
    results.frontier.draw(tmp_path / "f.png", ABOUT, entries)
    assert not results.frontier.is_stale(tmp_path / "f.png", ABOUT, entries)
    assert results.frontier.is_stale(tmp_path / "f.png", ABOUT, [split_entry("a", 0, 0.7, 0.2, itq=0.31), entries[1]])
    assert results.frontier.is_stale(tmp_path / "none.png", ABOUT, entries)
