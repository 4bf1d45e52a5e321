"""[Ray] Scans of coded rows: any cut into tasks, on Ray or not, gives the numbers of the whole database at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import file_of, write_corpus, write_tiny_model

from hashray import artifact
from hashray.artifact import Manifest, table_bytes
from hashray.cli import main
from hashray.codes import Codes, hamming
from hashray.data.columns import bytes_column
from hashray.data.corpus import open_corpus
from hashray.engine.session import WorkersConfig
from hashray.errors import MismatchError
from hashray.evaluate import counts, run
from hashray.evaluate.counts import Scanner, Target, sample_places, scanner
from hashray.metrics import Ranking, mean_average_precision, merge_side, rank
from hashray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS, PER_PART, GONE = 90, 20, {5, *range(20, 40), 77}  # the second part has no code at all
RNG = np.random.default_rng(0)
CODES: Codes = RNG.choice(np.uint8([0, 1, 3, 7, 255]), size=(ROWS, 2))
KEPT = [i for i in range(ROWS) if i not in GONE]
QUERIES, QUERY_LABELS = RNG.integers(0, 8, (7, 2), dtype=np.uint8), np.eye(3, dtype=np.uint8)[RNG.integers(0, 3, 7)]


def labels_of(number: int) -> list[int]:
    return [] if number % 10 == 3 else sorted({number % 3, number % 2})


def split_of(number: int) -> str:
    """Every tenth row has no label and says so, or does not."""
    return "database+unlabelled" if number % 20 == 3 else "database+train" if number % 3 else "database+database-seen"


def write_codes(url: str, corpus: str, numbers: list[list[int]]) -> Manifest:
    """Codes as encoding leaves them, a part for each list of row numbers."""
    store, files, rows = open_store(url), [], sum(map(len, numbers))
    for index, part in enumerate(numbers):
        table = pa.table({"id": pa.array([f"{i:04d}" for i in part]), "code": bytes_column(CODES[part])})
        files.append(artifact.write_file(store, f"parts/part-{index:05d}.parquet", table_bytes(table), rows=len(part)))
    parents = {"corpus": artifact.load_manifest(corpus).id, "model": ""}
    return artifact.publish(
        store,
        Manifest(
            kind="codes", project_version="0", config={}, parents=parents, files=tuple(files),
            rows_in=ROWS, rows_out=rows, rows_quarantined=ROWS - rows, info={"num_bits": 16, "split": "database"},
        ),
    )  # fmt: skip


@pytest.fixture
def scanned(tmp_path: Path) -> Scanner:
    corpus, codes = str(tmp_path / "corpus"), str(tmp_path / "codes")
    write_corpus(corpus, ROWS, PER_PART, split_of=split_of, labels_of=labels_of)
    parts = [[i for i in range(start, min(ROWS, start + PER_PART)) if i not in GONE] for start in (0, 40, 60, 80)]
    manifest = write_codes(codes, corpus, parts)
    return scanner(open_corpus(corpus), open_store(codes), manifest, "dseh", WorkersConfig(cpus_per_worker=0.5))


def known(split: str) -> list[int]:
    """The rows that are ranked: with a code, in the split, and with labels that are known."""
    return [i for i in KEPT if split in split_of(i).split("+") and (labels_of(i) or "unlabelled" not in split_of(i))]


def multi_hot(numbers: list[int]) -> Any:
    return np.array([[int(c in labels_of(i)) for c in range(3)] for i in numbers], dtype=np.uint8)


@pytest.mark.parametrize("ray", ["always", "never"])
@pytest.mark.parametrize("task_rows", [1, 35, 1 << 16])
def test_counts_nearest_rows_and_samples_are_those_of_the_whole(
    scanned: Scanner, ray: str, task_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "TASK_ROWS", task_rows)
    codes = Scanner(scanned.split, scanned.pairs, scanned.pool.model_copy(update={"ray": ray}))
    queries = merge_side(QUERIES, QUERY_LABELS, "query")
    targets = [Target(split, queries) for split in ("database", "database-seen", "query")]
    whole = codes.scan("count", targets)
    assert whole.rows == [len(known("database")), len(known("database-seen")), 0] and not whole.tables[2].any()
    assert (whole.known, whole.hidden) == (len(known("database")), len(KEPT) - len(known("database")))
    for target, table in zip(targets[:2], whole.tables, strict=False):
        rows = known(target.split)
        expected = rank(QUERIES, QUERY_LABELS, CODES[rows], multi_hot(rows))
        ranking = Ranking.of(queries, table)
        assert (ranking.total == expected.total).all() and (ranking.relevant == expected.relevant).all()
    ids = [f"{i:04d}" for i in known("database")]
    assert whole.side.ids == ids and (whole.side.values["dseh"] == CODES[known("database")]).all()
    assert (whole.side.labels.multi_hot() == multi_hot(known("database"))).all()
    assert whole.side.parts.tolist() == [int(row_id) // PER_PART for row_id in ids]
    assert whole.taught.tolist() == [True, True, True] and whole.parts == {0, 2, 3, 4}

    sample = codes.scan("count", targets[:1], sample_places(codes.num_rows, 30, seed=1))
    assert (sample.tables[0] == whole.tables[0]).all() and set(sample.side.ids) < set(ids)
    assert len(sample.side.ids) + sample.hidden >= 30 - sample.hidden and sample.known == whole.known
    assert sample.places.tolist() == sorted(sample.places.tolist())

    distances = hamming(QUERIES, CODES)
    for split in ("database", "database-seen"):
        near = codes.nearest(QUERIES, split, k=4)
        for row, hits in enumerate(near):
            naive = sorted((distances[row, i], f"{i:04d}") for i in known(split))[:4]
            assert [(hit.distance, hit.id) for hit in hits] == naive
            assert all(list(hit.labels) == labels_of(int(hit.id)) for hit in hits)


def test_codes_of_other_rows_are_refused(scanned: Scanner, tmp_path: Path) -> None:
    corpus = str(tmp_path / "corpus")
    other = write_codes(str(tmp_path / "other"), corpus, [list(range(40, 60)), list(range(20))])
    swapped = scanner(open_corpus(corpus), open_store(tmp_path / "other"), other, "dseh", scanned.pool)
    with pytest.raises(MismatchError, match=r"20 rows of .*other/parts/part-00001.* are not in the part of .*corpus"):
        swapped.scan("count")


def test_a_larger_database_is_counted_whole_and_its_baselines_see_a_stated_sample(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_corpus(corpus, 90, 10, split_of=lambda i: "query" if i < 10 else "database+train")
    write_tiny_model(model, kind="adalabelhash")
    words = ["evaluate", "--model", model, "--corpus", corpus, "--gallery", "4"]
    assert main([*words, "--out", f"{out}-whole"]) == 0
    codes = f"{out}-whole/codes/database"
    assert main([*words, "--out", out, "--codes", codes, "--sample-rows", "25", "--ray", "always"]) == 0
    assert "baselines on 25 of them" in capfd.readouterr().out
    whole, sampled = (json.loads(Path(folder, "metrics.json").read_text()) for folder in (f"{out}-whole", out))
    ours, theirs = sampled["results"][0], whole["results"][0]
    assert (ours["database"], ours["sample_rows"], sampled["protocol"]["sample_rows"]) == (80, 25, 25)
    assert whole["protocol"]["sample_rows"] == 80 and "sample_rows" not in theirs
    for name in ("mAP", "precision_at", "precision_radius_2", "pr_curve"):
        assert ours[name] == theirs[name]
    for name in ("gallery", "distances", "codewords", "sample"):
        assert sampled[name] == whole[name]
    assert {row["database"] for row in sampled["results"][1:]} == {25}
    assert {row["name"] for row in sampled["results"]} == {row["name"] for row in whole["results"]}
    assert "Baselines and code health are those of 25 rows" in Path(out, "report.html").read_text()


def test_only_the_images_that_the_page_shows_are_read(tmp_path: Path) -> None:
    """All other images of the database may be gone: codes are given, and no baseline needs them."""
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_corpus(corpus, 90, 10, split_of=lambda i: "query" if i < 10 else "database+train")
    write_tiny_model(model)
    words = ["evaluate", "--model", model, "--corpus", corpus, "--no-baselines", "--gallery", "1"]
    assert main([*words, "--out", f"{out}-whole"]) == 0
    (entry,) = json.loads(Path(f"{out}-whole/metrics.json").read_text())["gallery"]
    needed = {int(row["id"]) // 10 for row in entry["neighbours"]} | {0}
    assert len(needed) < 9
    for number in set(range(9)) - needed:
        file_of(corpus, f"images/part-{number:05d}.parquet").unlink()
    given = ["--codes", f"{out}-whole/codes/database", "--sample-rows", "25"]
    assert main([*words, "--out", out, *given]) == 0


def test_ties_that_walk_the_database_say_how_much_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, model, out = (str(tmp_path / name) for name in ("corpus", "model", "out"))
    write_corpus(corpus, 60, 10, split_of=lambda i: "query" if i < 10 else "database+train")
    write_tiny_model(model)
    words = ["evaluate", "--model", model, "--corpus", corpus, "--out", out, "--no-baselines", "--ties", "dseh"]
    monkeypatch.setattr(run, "IN_ORDER_ROWS", 49)
    assert main(words) == 2
    error = capfd.readouterr().err
    assert "allowed up to 49 rows, 'database' of" in error and "has 50. Use ties" in error
    monkeypatch.setattr(run, "IN_ORDER_ROWS", 50)
    assert main([*words, "--sample-rows", "20"]) == 0
    row = json.loads(Path(out, "metrics.json").read_text())["results"][0]
    corpus_rows = open_corpus(corpus)
    labels = corpus_rows.rows("database").labels, corpus_rows.rows("query").labels
    tables = []
    for split in ("query", "database"):
        folder = open_store(f"{out}/codes/{split}")
        parts = [record for record in artifact.load_manifest(folder).files if record.name.startswith("parts/")]
        tables += [artifact.read_table(folder, record) for record in parts]
    codes = [np.array([list(code) for code in table.column("code").to_pylist()], np.uint8) for table in tables]
    expected = mean_average_precision(codes[0], labels[1], np.concatenate(codes[1:]), labels[0], ties="dseh")
    assert (row["mAP"], row["database"], row["sample_rows"]) == (expected, 50, 20)
