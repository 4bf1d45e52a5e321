"""`hashray evaluate` on a class split: three scenarios on the right rows, with every baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import files_of, write_corpus, write_tiny_model

from hashray import artifact
from hashray.cli import main
from hashray.codes import binarize
from hashray.data.corpus import open_corpus
from hashray.metrics import mean_average_precision
from hashray.model import load_model

pytestmark = pytest.mark.usefixtures("ray_session")


def split_of(number: int) -> str:
    """Class 2 is unseen; every third row of a class is a query."""
    half, part = ("query", "unseen" if number % 3 == 2 else "seen") if number % 9 < 3 else (
        "database", "unseen" if number % 3 == 2 else "seen")  # fmt: skip
    return f"{half}+{half}-{part}" + ("+train" if (half, part) == ("database", "seen") else "")


def test_codewords_are_shown_under_the_names_of_the_classes_that_they_were_trained_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_tiny_model(model, kind="adalabelhash")
    monkeypatch.setattr("tiny.CLASSES", ("bee", "ant", "cat", "dog"))  # more of them, in another order
    write_corpus(
        corpus, 20, 20, split_of=lambda i: "query" if i % 5 == 4 else "database+train", labels_of=lambda i: [i % 4]
    )
    words = ["evaluate", "--model", model, "--corpus", corpus, "--out", out, "--no-baselines", "--top-k", "-1"]
    assert main(words) == 2
    assert "top_k = -1 is of ties" in capfd.readouterr().err
    assert main([*words, "--ties", "deephash_pytorch"]) == 0
    assert "codewords left out" in capfd.readouterr().err
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "codewords" not in metrics and metrics["results"][0]["top_k"] == -1


def test_a_class_split_is_scored_within_across_and_generalised(tmp_path: Path) -> None:
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_corpus(corpus, 72, 30, split_of=split_of, config={"split_protocol": "class-split", "seed": 0})
    write_tiny_model(model, kind="adalabelhash")
    assert main(["evaluate", "--model", model, "--corpus", corpus, "--out", out]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    opened, loaded = open_corpus(corpus), load_model(model)

    def rows(split: str) -> tuple[np.ndarray, np.ndarray]:
        tables = [opened.read_part(record, split) for record in opened.parts]
        pixels = [opened.inputs(table, 16, "crop") for table in tables if len(table)]
        labels = [opened.label_matrix(table) for table in tables if len(table)]
        return binarize(loaded.logits(np.concatenate(pixels))), np.concatenate(labels)

    for name, query, database in (
        ("within", "query-seen", "database-seen"),
        ("cross", "query-unseen", "database-unseen"),
        ("generalised", "query-unseen", "database"),
    ):
        results = [row for row in metrics["results"] if row["scenario"] == name]
        assert results[0]["name"] == "adalabelhash"
        assert results[0]["mAP"] == pytest.approx(mean_average_precision(*rows(query), *rows(database)))
        assert (results[0]["queries"], results[0]["database"]) == (len(rows(query)[0]), len(rows(database)[0]))
        baselines = {row["name"] for row in results[1:]}
        assert baselines == {"random", "lsh", "pca-sign", "itq", "itq-linear", "class-code", "float-cosine"}
    within, cross = (
        row["mAP"] for row in metrics["results"] if row["name"] == "itq" and row["scenario"] != "generalised"
    )
    assert metrics["harmonic_mean"]["itq"] == pytest.approx(2 * within * cross / (within + cross))
    assert metrics["codewords"]["classes"] == ["ant", "bee"]  # the unseen class was never taught
    assert len(metrics["sample"]["codes"]) == 24
    assert artifact.verify(out) == []
    assert "never saw" in (tmp_path / "out/report.html").read_text()


def test_a_finished_evaluation_is_shown_again_and_never_overwritten(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_corpus(corpus, 40, 20, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    write_tiny_model(model)
    words = ["evaluate", "--model", model, "--corpus", corpus, "--out", out]
    assert main(words) == 0
    table = capfd.readouterr().out
    before, times = files_of(out), {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    assert main([*words, "--workers", "1"]) == 0
    again = capfd.readouterr()
    assert again.out == table and "is finished already" in again.err
    for other in (["--top-k", "5"], ["--seed", "1"], ["--no-baselines"]):
        assert main([*words, *other]) == 1
        assert "Choose another --out" in capfd.readouterr().err
    assert files_of(out) == before and times == {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}


def test_rows_whose_labels_nobody_knows_are_not_scored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They would all count as irrelevant; those whose labels the corpus only hides are scored."""
    splits = ("query", "database+train", "database+unlabelled", "database+unlabelled")
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_corpus(corpus, 60, 20, split_of=lambda i: splits[i % 4], labels_of=lambda i: [] if i % 4 == 3 else [i % 3])
    write_tiny_model(model)
    assert main(["evaluate", "--model", model, "--corpus", corpus, "--out", out, "--no-baselines"]) == 0
    metrics = json.loads(Path(out, "metrics.json").read_text())
    assert metrics["results"][0]["database"] == metrics["protocol"]["database"] == 30
    assert "15 database rows are not scored" in capfd.readouterr().err


def test_queries_that_are_gone_are_counted_and_nothing_else_fails(tmp_path: Path) -> None:
    corpus, model, out, images = (str(tmp_path / name) for name in ("corpus", "model", "out", "images"))
    write_corpus(corpus, 60, 20, images, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    write_tiny_model(model)
    for i in (4, 9, 14, 19):  # all queries of the first part
        Path(images, f"{i:04d}.png").unlink()
    words = ["evaluate", "--model", model, "--corpus", corpus, "--out", out, "--no-baselines", "--max-bad", "0.5"]
    assert main(words) == 0
    metrics = json.loads(Path(out, "metrics.json").read_text())
    assert metrics["protocol"]["queries"] == 8
    assert "near_zero" in metrics["results"][0]["code_health"]
