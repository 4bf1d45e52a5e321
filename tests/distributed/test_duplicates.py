"""`hashray index duplicates` on Ray: the naive answer whatever shards, buckets and workers; resume; errors; S3."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import write_corpus

from hashray import artifact
from hashray.artifact import Manifest
from hashray.codes import BIT_ORDER, hamming
from hashray.duplicates import duplicates
from hashray.engine.session import WorkersConfig
from hashray.errors import AlreadyExists, CorruptArtifact, InputError
from hashray.index import distinct, linking
from hashray.index import duplicates as module
from hashray.index.build import IndexConfig, build_index
from hashray.index.catalog import open_catalog
from hashray.index.duplicates import DuplicatesConfig
from hashray.index.tables import Linked, make_tables
from hashray.index.version import shards_of
from hashray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")
ROWS = 400
SPLITS = ("train", "database", "query")


def draw(seed=0):
    """Ids of a tiny corpus in no order, and codes of 24 bits with equals and neighbours across all parts."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, (60, 3), dtype=np.uint8)
    codes = words[rng.integers(60, size=ROWS)]
    codes[:, 1] ^= rng.choice([0, 0, 1, 2, 128], ROWS).astype(np.uint8)
    codes[rng.choice(ROWS, 50, replace=False)] = codes[0]  # a code that stands very often
    return [f"{number:04d}" for number in rng.permutation(ROWS)], codes


def write_codes(url, ids, codes):
    """A codes artifact of four parts at url/codes."""
    store, files = open_store(f"{url}/codes"), []
    for number, rows in enumerate(np.array_split(np.arange(len(ids)), 4)):
        column = pa.array([codes[row].tobytes() for row in rows], pa.binary(3))
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": pa.array([ids[row] for row in rows]), "code": column}), sink)
        name = f"parts/part-{number:05d}.parquet"
        files.append(artifact.write_file(store, name, sink.getvalue(), rows=len(rows)))
    artifact.publish(store, Manifest(
        kind="codes", project_version="0", config={}, parents={}, files=tuple(files), bit_order=BIT_ORDER,
        rows_in=len(ids), rows_out=len(ids), rows_quarantined=0, info={"num_bits": 24},
    ))  # fmt: skip


def write_index(url, ids, codes, shards=3, kind="flat"):
    write_codes(url, ids, codes)
    build_index(IndexConfig(codes=f"{url}/codes", out=f"{url}/index-{kind}-{shards}", kind=kind, shards=shards))
    return f"{url}/index-{kind}-{shards}"


def naive(ids, codes, within, keep="best", splits=None):
    unique, code = np.unique(codes, axis=0, return_inverse=True)
    near = hamming(unique, unique)
    left, right = np.nonzero(np.triu(near <= within, 1))
    matter = (np.bincount(code.ravel()) > 1) | np.isin(np.arange(len(unique)), [*left, *right])
    new, rows = np.cumsum(matter) - 1, np.flatnonzero(matter[code.ravel()])
    texts = pa.array(ids, pa.large_string()).take(pa.array(rows))
    of_rows = None if splits is None else pa.array([splits[ids[row]] for row in rows], pa.string())
    columns = (new[left], new[right], near[left, right].astype(np.int64), new[code.ravel()[rows]])
    return make_tables(Linked(*columns, texts, of_rows), keep)


def read(url, folder):
    store = open_store(url)
    manifest = artifact.load_manifest(store, "duplicates")
    tables = [artifact.read_table(store, r) for r in manifest.files if r.name.startswith(folder)]
    return pa.concat_tables(tables)


def same(table, expected):
    return table.equals(expected.cast(table.schema))


def test_the_naive_answer_whatever_shards_buckets_kind_and_workers(tmp_path, monkeypatch):
    ids, codes = draw()
    monkeypatch.setattr(distinct, "CODES_PER_BUCKET", 150)
    expected, first = naive(ids, codes, 2), None
    assert len(expected.pairs) > 100 and expected.groups.column("group").to_numpy().max() > 10
    for shards, kind, ray in ((3, "flat", "auto"), (3, "flat", "never"), (1, "ivf", "never")):
        index = write_index(tmp_path, ids, codes, shards, kind)
        out = tmp_path / f"out-{shards}-{kind}-{ray}"
        config = DuplicatesConfig(index=index, out=str(out), within=2, pool=WorkersConfig(ray=ray))
        manifest = duplicates(config)
        assert same(read(out, "groups/"), expected.groups) and same(read(out, "pairs/"), expected.pairs.table())
        assert artifact.verify(out) == [] and not list(out.rglob("progress/*/*"))
        assert manifest.info["rows"] == ROWS and manifest.info["codes"] == len(np.unique(codes, axis=0))
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        assert duplicates(config) == manifest
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
        if kind == "flat":
            first = first or manifest
            assert manifest == first  # the same bytes on Ray as here
    assert (out / "report.html").read_text().count("<h3>") == min(
        40, expected.groups.column("group").to_numpy().max() + 1
    )


def test_a_corpus_gives_leaks_and_thumbnails(tmp_path):
    ids, codes = draw(1)
    index = write_index(tmp_path, ids, codes)
    corpus = tmp_path / "corpus"
    write_corpus(corpus, ROWS, 90, split_of=lambda number: SPLITS[number % 3])
    splits = {f"{number:04d}": SPLITS[number % 3] for number in range(ROWS)}
    config = DuplicatesConfig(
        index=index, out=str(tmp_path / "out"), within=1, corpus=str(corpus), keep="first", groups_per_page=4, pages=2
    )
    manifest = duplicates(config)
    expected = naive(ids, codes, 1, "first", splits)
    assert same(read(config.out, "groups/"), expected.groups) and same(read(config.out, "leaks-"), expected.leaks)
    assert 0 < manifest.info["exact_leaks"] < manifest.info["leaks"] == len(expected.leaks)
    assert manifest.info == {"plan": manifest.info["plan"], **json.loads((tmp_path / "out/summary.json").read_text())}
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.html", "report-0002.html")]
    assert [page.count("<h3>") for page in pages] == [4, 4] and not (tmp_path / "out/report-0003.html").exists()
    groups = expected.groups.to_pylist()
    for number in range(8):
        kept = next(row["id"] for row in groups if row["group"] == number and row["kept"])
        assert f'<div class="card query" title="{kept}">\n<img alt="" src="data:image/png' in pages[number // 4]
    assert f"{manifest.info['groups'] - 8:,} smaller groups" in pages[0] and 'href="report-0002.html"' in pages[0]
    # Of another corpus: none of the rows is there.
    write_corpus(tmp_path / "other", 3, 3)
    alien = write_index(tmp_path / "alien", [f"x{name}" for name in ids], codes, 1)
    wrong = config.model_copy(update={"index": alien, "out": str(tmp_path / "wrong")})
    with pytest.raises(InputError, match=r"corpus holds none of the 3\d\d rows with duplicates: give the corpus"):
        duplicates(wrong)
    with pytest.raises(InputError, match="is an index: duplicates need a folder that is no artifact"):
        duplicates(config.model_copy(update={"out": index}))
    with pytest.raises(AlreadyExists, match="holds a finished duplicates"):
        duplicates(config.model_copy(update={"keep": "best"}))


def test_the_radius_is_chosen_and_said(tmp_path, capsys):
    rng = np.random.default_rng(2)
    words = rng.integers(0, 256, (200, 3), dtype=np.uint8)
    codes = np.concatenate([words, words[:40] ^ np.uint8([0, 4, 0])])
    index = write_index(tmp_path, [f"{number:04d}" for number in range(len(codes))], codes)
    manifest = duplicates(DuplicatesConfig(index=index, out=str(tmp_path / "out")))
    info, near = manifest.info, hamming(np.unique(codes, axis=0), np.unique(codes, axis=0))
    expected = [round(((near <= d).sum() - len(near)) / len(near), 4) for d in range(4)]
    assert info["neighbours_by_radius"] == expected
    assert info["within"] == max(d for d in range(4) if expected[d] <= 1) and info["sample"] == info["codes"]
    assert re.search(rf"within {info['within']} of 24 bits: .*neighbours", capsys.readouterr().err)


def test_an_index_without_duplicates_gives_an_empty_report(tmp_path):
    codes = np.unique(draw(6)[1], axis=0)
    index = write_index(tmp_path, [f"{number:04d}" for number in range(len(codes))], codes)
    write_corpus(tmp_path / "corpus", ROWS, ROWS, split_of=lambda number: SPLITS[number % 3])
    config = DuplicatesConfig(index=index, out=str(tmp_path / "out"), within=0, corpus=str(tmp_path / "corpus"))
    info = duplicates(config).info
    assert (info["groups"], info["pairs"], info["leaks"], info["codes"]) == (0, 0, 0, len(codes))
    assert "No two rows are within the radius." in (tmp_path / "out/report.html").read_text()


def test_too_many_pairs_end_the_run_and_nothing_is_published(tmp_path, monkeypatch):
    ids, codes = draw(3)
    index = write_index(tmp_path, ids, codes)
    config = DuplicatesConfig(index=index, out=str(tmp_path / "out"), within=12, max_pairs=500)
    with pytest.raises(
        InputError, match=r"has about [\d,]+ pairs of codes within 12 bits, --max-pairs .*Use --within \d,"
    ):
        duplicates(config)
    # A sample may say too little: the pairs themselves are counted too.
    monkeypatch.setattr(module, "SURE", 10**9)
    with pytest.raises(InputError, match=r"more than 500 pairs of codes within 12 bits.*a smaller --within"):
        duplicates(config)
    assert not artifact.is_finished(open_store(config.out))


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch):
    ids, codes = draw(4)
    monkeypatch.setattr(distinct, "CODES_PER_BUCKET", 150)
    index = write_index(tmp_path, ids, codes)
    config = DuplicatesConfig(index=index, out=str(tmp_path / "out"), within=2, pool=WorkersConfig(ray="never"))
    whole = duplicates(config.model_copy(update={"out": str(tmp_path / "unbroken")}))
    steps, calls = ("_distinct", "_merge", "_pairs", "_group"), []
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            duplicates(config)
    records = sorted((tmp_path / "out/progress").rglob("*.json"))
    next(path for path in records if path.name.startswith("groups")).unlink()
    next(path for path in records if path.name.startswith("pairs-2-000002")).write_bytes(b"{")
    next((tmp_path / "out/progress").rglob("merge-000001.npy")).unlink()
    for step in steps:
        function = getattr(module, step)
        counted = lambda *a, step=step, function=function: (calls.append(step), function(*a))[1]  # noqa: E731
        monkeypatch.setattr(module, step, counted)
    assert duplicates(config) == whole
    assert calls == ["_merge", "_pairs", "_group"]  # what was lost, and nothing else


def test_on_s3_and_a_changed_byte_is_refused(s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("HASHRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(linking, "ROWS_PER_FILE", 100)
    ids, codes = draw(5)
    index = write_index(s3_url, ids, codes, 2)
    config = DuplicatesConfig(index=index, out=f"{s3_url}/out", within=1, pool=WorkersConfig(ray="never"))
    duplicates(config)
    assert same(read(config.out, "groups/"), naive(ids, codes, 1).groups) and artifact.verify(config.out) == []
    store = open_store(index)
    name = shards_of(artifact.load_manifest(store, "index"))[0].codes.name
    data = bytearray(store.read(name))
    data[-1] ^= 1
    store.write(name, bytes(data))
    monkeypatch.setenv("HASHRAY_CACHE", str(tmp_path / "other-cache"))
    with pytest.raises(CorruptArtifact, match=name.partition("/")[2]):
        duplicates(config.model_copy(update={"out": f"{s3_url}/again"}))


def test_deleted_rows_have_no_duplicates(tmp_path):
    ids, codes = draw(6)
    index = write_index(tmp_path, ids, codes, 3)
    open_catalog(index).delete(ids[::3])
    config = DuplicatesConfig(index=index, out=str(tmp_path / "out"), within=1, pool=WorkersConfig(ray="never"))
    assert duplicates(config).info["rows"] == len(ids) - len(ids[::3])
    living = [row for row in range(len(ids)) if row % 3]
    expected = naive([ids[row] for row in living], codes[living], 1)
    assert same(read(config.out, "groups/"), expected.groups)
