"""`hashray plan`: its numbers are those of the stages, and a measured sample scales as rows do."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BACKBONE, METHOD, write_corpus, write_images, write_tiny_model, write_toml

from hashray.cli import main
from hashray.data.corpus import open_corpus
from hashray.data.ingest import IngestConfig, ingest
from hashray.data.listed import cut_parts
from hashray.encode.codes import EncodeConfig, encode
from hashray.engine.session import WorkersConfig
from hashray.plan.costs import Prices, Sample, Work, lay_out_parts, lay_out_windows, work_out
from hashray.plan.report import Cluster, as_json, exceeded
from hashray.plan.sample import sample_size
from hashray.storage.local import LocalStore
from hashray.train.batches import EpochPlan

HERE = WorkersConfig(ray="never")
SAMPLE = Sample(
    rows=512, sizes=(3000, 5000), decoded_bytes=300_000, row_bytes=30, image_bytes=4000, feature_bytes=2048,
    code_bytes=40, shard_bytes=8, ids_bytes=16, list_s=1e-5, ingest_s=1e-3, decode_s=1e-3, forward_s=5e-3, step_s=15e-3,
    index_s=1e-6, search_s=1e-9, pair_s=1e-8, read_part_s=1e-3, start_s=2.0,
    record_bytes=1000, base_bytes=300 << 20, trunk_bytes=700 << 20,
)  # fmt: skip
WORK = Work(
    stages=("ingest", "train", "encode", "index", "evaluate"), rows=1_000_000, train=50_000, database=999_000,
    queries=1000, parts=1000, part_bytes=4 << 20, one_object_a_row=False, blocks=8, epochs=10, in_memory=True,
    frozen=False, row_inputs=3 * 32 * 32, shards=1, num_bits=64, scenarios=1, sample_rows=100_000,
    on_ray=("ingest", "encode"), workers=8,
    train_workers=2, batch_size=128, window_rows=16_384,
)  # fmt: skip
LARGE = Cluster(4, 256 << 30, 64 << 30, cpus=64, gpus=0, free_disk_bytes=1 << 40)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def training(folder: Path) -> str:
    return write_toml(folder / "train.toml", {"method": METHOD, "backbone": BACKBONE, "epochs": 2, "batch_size": 8})


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 200), st.integers(1, 60), st.integers(1, 20),
    st.integers(1, 200),
)  # fmt: skip
def test_parts_are_those_that_ingest_cuts(sizes: list[int], rows: int, block: int, most: int, most_bytes: int) -> None:
    counts = [min(block, rows - start) for start in range(0, rows, block)]
    tiled = [list(islice(cycle(sizes), count)) for count in counts]
    expected = sum(len(cut_parts(block_sizes, most, most_bytes)) for block_sizes in tiled)
    parts, largest = lay_out_parts(sizes, rows, block, most, most_bytes)
    assert parts == expected
    assert rows <= parts * most
    assert max(sizes[: min(block, rows)]) <= largest <= max(most_bytes, *sizes)


def test_parts_of_more_rows_than_are_laid_out_are_in_proportion() -> None:
    assert lay_out_parts([10], 10**9, 10**9, 1000, 1 << 30) == (10**6, 10_000)
    assert lay_out_parts([10], 1_000_000, 1 << 17, 1024, 1 << 30)[0] == 7 * 128 + 81


@given(st.integers(1, 40), st.integers(40, 400), st.integers(1, 32), st.integers(1, 200))
def test_windows_are_those_of_the_epoch(parts: int, train: int, batch: int, window: int) -> None:
    work = replace(WORK, parts=parts, train=train, batch_size=batch, window_rows=window)
    counts = [train * (i + 1) // parts - train * i // parts for i in range(parts)]
    expected = EpochPlan(tuple(counts), batch, window, 0, tuple(10 * count for count in counts)).windows(0)
    windows, pieces, largest = lay_out_windows(work, 10)
    assert (windows, pieces) == (len(expected), sum(len(each.pieces) for each in expected))
    assert largest == 10 * max(each.rows for each in expected)


@given(st.integers(2, 50))
def test_costs_grow_with_rows(times: int) -> None:
    names = ("rows", "train", "database", "parts", "shards", "blocks")
    more = replace(WORK, **{name: getattr(WORK, name) * times for name in names})
    once, often = (work_out(SAMPLE, work) for work in (WORK, more))
    for one, other in zip(once.stages, often.stages, strict=True):
        if one.name == "evaluate":  # there are no more queries
            assert one.cpu_s < other.cpu_s < times * one.cpu_s and other.disk_bytes == one.disk_bytes
        else:
            assert other.cpu_s == pytest.approx(times * one.cpu_s, rel=0.02), one.name
            assert other.disk_bytes == pytest.approx(times * one.disk_bytes, rel=0.02), one.name
        assert one.writes <= other.writes <= times * one.writes, one.name
    memory = {role.name: (role.bytes, after.bytes) for role, after in zip(once.roles, often.roles, strict=True)}
    for name in ("ingest worker", "encode worker", "evaluation driver"):
        assert memory[name][0] == memory[name][1], name  # bounded by a part, or by a sample
    codes, more_codes = (size - SAMPLE.base_bytes for size in memory["searcher"])
    assert more_codes == pytest.approx(times * codes)


def test_money_is_cores_requests_and_months() -> None:
    prices = Prices(currency="EUR", cpu_hour=0.05, gb_month=0.02, reads_1000=0.0004, writes_1000=0.005)
    costs = work_out(SAMPLE, WORK)
    report = as_json(costs, WORK, SAMPLE, LARGE, [], prices)
    stage = costs.stages[0]
    assert stage.cores_s == stage.cpu_s + stage.start_s > stage.cpu_s + 9 * SAMPLE.start_s
    expected = stage.cores_s / 3600 * 0.05 + stage.reads / 1000 * 0.0004 + stage.writes / 1000 * 0.005
    assert report["stages"][0]["price"] == pytest.approx(expected)
    assert report["price"]["stages"] == pytest.approx(sum(line["price"] for line in report["stages"]))
    assert report["price"]["month"] == pytest.approx(costs.disk_bytes / 1e9 * 0.02)
    assert report["price"]["currency"] == "EUR"
    json.dumps(report)


def test_what_is_exceeded_is_said_with_what_to_do() -> None:
    assert exceeded(work_out(SAMPLE, WORK), WORK, LARGE) == []
    work = replace(WORK, rows=10**9, train=10**8, database=10**9, parts=10**6, part_bytes=1 << 30, in_memory=False)
    small = Cluster(1, 2 << 30, 1 << 27, cpus=2, gpus=0, free_disk_bytes=1 << 30)
    faults = {fault.what: fault for fault in exceeded(work_out(SAMPLE, work), work, small)}
    for word in ("ingest worker", "searcher", "stream task", "disk at --out", "time"):
        (what,) = (what for what in faults if word in what)
        assert faults[what].needs > faults[what].has and faults[what].do
    in_s3 = replace(small, free_disk_bytes=None)
    assert not any("disk" in fault.what for fault in exceeded(work_out(SAMPLE, work), work, in_s3))


def test_a_source_is_planned_as_it_is_ingested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_images(tmp_path / "images", 60)
    report = plan(capsys, training(tmp_path), source, "--rows-per-part", "7", "--out", str(tmp_path / "x" / "y"))
    manifest = ingest(IngestConfig(source=source, out=str(tmp_path / "corpus"), rows_per_part=7, pool=HERE))
    corpus = open_corpus(str(tmp_path / "corpus"))
    work, stages = report["work"], {stage["name"]: stage for stage in report["stages"]}
    assert report["rows"] == 60 and work["parts"] == len(corpus.parts) == stages["ingest"]["units"]
    for name, split in (("train", "train"), ("database", "database"), ("queries", "query")):
        assert work[name] == corpus.count(split), split
    assert list(stages) == ["ingest", "train", "encode", "index", "evaluate"]
    really = sum(record.bytes for record in manifest.files if record.name.startswith("images/"))
    planned = report["sample"]["image_bytes"] * 60
    assert really / 2 < planned < really * 2
    assert report["cluster"]["free_disk_bytes"] > 0 and report["exceeded"] == []
    assert all(report["sample"][name] > 0 for name in ("list_s", "ingest_s", "forward_s", "step_s", "pair_s"))


@pytest.mark.parametrize("protocol", ["per-class", "class-split"])
def test_splits_are_those_of_the_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    source = write_images(tmp_path / "images", 48)
    splits = ["--split-protocol", protocol, "--query-per-class", "2", "--train-per-class", "3"]
    report = plan(capsys, training(tmp_path), source, *splits)
    assert main(["ingest", source, "--out", str(tmp_path / "corpus"), *splits]) == 0
    corpus = open_corpus(str(tmp_path / "corpus"))
    for name, split in (("train", "train"), ("database", "database"), ("queries", "query")):
        assert report["work"][name] == corpus.count(split), split
    assert report["work"]["scenarios"] == (3 if protocol == "class-split" else 1)


def test_a_corpus_and_a_model_leave_encoding_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, model = str(tmp_path / "corpus"), str(tmp_path / "model")
    write_corpus(corpus, 30, 8, split_of=lambda n: "query" if n % 3 == 0 else "database+train")
    write_tiny_model(model)
    report = plan(capsys, "--model", model, "--corpus", corpus)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages) == ["encode", "index", "evaluate"]
    assert stages["encode"]["units"] == 4 and stages["encode"]["rows"] == 20 and report["work"]["queries"] == 10
    writes = Counter[str]()
    for name in ("write", "create"):
        real = getattr(LocalStore, name)

        def counted(self: LocalStore, key: str, data: bytes, real: Any = real) -> None:
            writes[self.url] += 1
            real(self, key, data)

        monkeypatch.setattr(LocalStore, name, counted)
    encode(EncodeConfig(model=model, corpus=corpus, out=str(tmp_path / "codes"), pool=HERE))
    assert abs(writes[str(tmp_path / "codes")] - stages["encode"]["writes"]) <= 3
    ten = plan(capsys, "--model", model, "--corpus", corpus, "--rows", "300")
    assert (ten["work"]["database"], ten["work"]["parts"]) == (200, 40)


def test_a_larger_corpus_has_no_more_drawn_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, words = str(tmp_path / "corpus"), ("query", "database", "database+train")
    write_corpus(corpus, 30, 8, split_of=lambda n: words[n % 3], config={"split_protocol": "per-class"})
    work = plan(capsys, training(tmp_path), "--corpus", corpus, "--rows", "300")["work"]
    assert (work["queries"], work["train"], work["database"]) == (10, 10, 290)


def test_a_frozen_trunk_computes_features_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = str(tmp_path / "corpus")
    write_corpus(corpus, 12, 8)
    config = {"method": METHOD, "backbone": {**BACKBONE, "frozen": True, "weights": "later.pth"}, "epochs": 2}
    report = plan(capsys, write_toml(tmp_path / "train.toml", config), "--corpus", corpus)
    assert [stage["name"] for stage in report["stages"]] == ["features", "train", "encode", "index", "evaluate"]
    assert report["work"]["row_inputs"] == 4 * 8 * BACKBONE["width"]


def test_the_table_names_every_stage_and_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_images(tmp_path / "images", 20)
    (tmp_path / "prices.toml").write_text('currency = "EUR"\ncpu_hour = 0.05\n')
    assert main(["plan", training(tmp_path), source, "--prices", str(tmp_path / "prices.toml")]) == 0
    captured = capsys.readouterr()
    for word in ("EUR", "driver", "encode worker", "searcher"):
        assert word in captured.out
    assert "a query on one core" in captured.err and "nothing is exceeded" in captured.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--corpus", "c"], "needs a training config or a --model"),
        (["--model", "m"], "needs a SOURCE of images or a --corpus"),
        (["--model", "m", "--corpus", "nowhere"], "nowhere"),
    ],
)
def test_a_request_that_cannot_be_planned(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert text in capsys.readouterr().err


@given(st.integers(1, 10**9))
def test_a_sample_is_one_row_in_a_hundred_within_bounds(rows: int) -> None:
    size = sample_size(rows)
    assert min(rows, 64) <= size <= min(rows, 512)
