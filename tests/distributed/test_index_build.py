"""`hashray index build` on Ray: every row once, ties by id, resume, racing builds, wrong input; folder and S3."""

from __future__ import annotations

import io
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from hashray import artifact
from hashray.artifact import Manifest, version_key
from hashray.codes import BIT_ORDER, hamming
from hashray.data import unique
from hashray.engine.session import WorkersConfig
from hashray.errors import AlreadyExists, AuditError, ConfigError, CorruptArtifact, InputError
from hashray.index import shards as module
from hashray.index.build import IndexConfig, build_index
from hashray.index.version import shards_of
from hashray.search.reader import open_index
from hashray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")
NUM_BITS = 48


def draw(seed, rows):
    """Ids in no order, and codes with many ties."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, (20, NUM_BITS // 8), dtype=np.uint8)
    codes = words[rng.integers(20, size=rows)]
    codes[:, 0] ^= rng.choice([0, 1, 2, 8], rows).astype(np.uint8)
    return [f"img/{name:x}.png" for name in rng.permutation(10 * rows)[:rows]], codes


def write_codes(url, ids, codes, num_parts=5, rows_out=None):
    """A codes artifact as `hashray encode` writes it, in several row groups."""
    store, files = open_store(url), []
    for number, part in enumerate(np.array_split(np.arange(len(ids)), num_parts)):
        column = pa.array([codes[row].tobytes() for row in part], pa.binary(codes.shape[1]))
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": pa.array([ids[row] for row in part]), "code": column}), sink, row_group_size=70)
        name = f"parts/part-{number:05d}.parquet"
        files.append(artifact.write_file(store, name, sink.getvalue(), rows=len(part)))
    manifest = Manifest(
        kind="codes", project_version="0", config={}, parents={"model": "1" * 64, "corpus": "2" * 64},
        files=tuple(files), fingerprint="ab" * 32, bit_order=BIT_ORDER, rows_in=len(ids), rows_out=len(ids),
        rows_quarantined=0, info={"num_bits": codes.shape[1] * 8, "split": "database"},
    )  # fmt: skip
    return artifact.publish(store, manifest)


def check_answers(url, ids, codes, k=30):
    queries = codes[:8]
    answers, distances = open_index(url, threads=1).search(queries, k)
    for row, near in enumerate(hamming(queries, codes)):
        expected = sorted(zip(near.tolist(), ids, strict=True))[:k]
        assert list(zip(distances[row].tolist(), answers[row].tolist(), strict=True)) == expected


def stored(url):
    """Every file with what tells a rewritten one from the old."""
    return {str(p.relative_to(url)): p.stat().st_mtime_ns for p in url.rglob("*") if p.is_file()}


def test_every_row_once_and_ties_by_id(tmp_path, monkeypatch):
    ids, codes = draw(0, 1500)
    parent = write_codes(tmp_path / "codes", ids, codes)
    config = IndexConfig(codes=str(tmp_path / "codes"), out=str(tmp_path / "index"), shards=4)
    manifest = build_index(config)
    assert (manifest.rows_in, manifest.rows_out, manifest.fingerprint) == (1500, 1500, "ab" * 32)
    assert manifest.parents == {"codes": parent.id, "model": "1" * 64}
    assert sorted(shard.rows for shard in shards_of(manifest)) == [300, 300, 300, 600]
    assert artifact.verify(config.out) == [] and not list((tmp_path / "index").rglob("progress/*/*"))
    check_answers(config.out, ids, codes)
    before = stored(tmp_path / "index")
    assert build_index(config) == manifest and stored(tmp_path / "index") == before
    # More shards than parts: a part makes several. The answers are the same for any number.
    for shards in (1, 3, 11):
        other = config.model_copy(update={"out": str(tmp_path / str(shards)), "shards": shards})
        rows = [shard.rows for shard in shards_of(build_index(other))]
        assert (sum(rows), len(rows)) == (1500, shards)
        check_answers(other.out, ids, codes)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_any_number_of_workers_writes_the_same_bytes_and_each_part_is_read_once(tmp_path, monkeypatch, kind):
    ids, codes = draw(8, 900)
    write_codes(tmp_path / "codes", ids, codes)
    config = IndexConfig(codes=str(tmp_path / "codes"), out=str(tmp_path / "ray"), kind=kind, shards=3)
    reads, read_table = Counter[str](), module.read_table
    built = build_index(config)
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "read_table", lambda store, part, columns: (
                reads.update([f"{part.name} {' '.join(columns)}"]), read_table(store, part, columns))[1]
        )  # fmt: skip
        here = config.model_copy(update={"out": str(tmp_path / "here"), "pool": WorkersConfig(ray="never")})
        assert build_index(here) == built
    parts = [f"parts/part-{number:05d}.parquet" for number in range(5)]
    columns = ["id code", "code"] if kind == "ivf" else ["id code"]
    assert reads == {f"{part} {names}": 1 for part in parts for names in columns}
    files = {
        where: {str(path.relative_to(tmp_path / where)): path.read_bytes()
                for path in (tmp_path / where).rglob("*") if path.is_file()}
        for where in ("ray", "here")
    }  # fmt: skip
    assert files["ray"] == files["here"]


def test_ivf_shards_share_one_quantizer(tmp_path):
    ids, codes = draw(1, 3000)
    write_codes(tmp_path / "codes", ids, codes)
    config = IndexConfig(codes=str(tmp_path / "codes"), out=str(tmp_path / "index"), kind="ivf", shards=3)
    manifest = build_index(config)
    info = manifest.info
    assert (info["nlist"], info["nprobe"]) == (25, 16) and info["quantizer"].startswith("quantizers/")
    assert artifact.verify(config.out) == []
    queries, k = codes[:50], 20
    answers, distances = open_index(config.out).search(queries, k)
    near = hamming(queries, codes)
    place = {name: row for row, name in enumerate(ids)}
    for row in range(50):
        assert [near[row, place[name]] for name in answers[row]] == distances[row].tolist()
    assert (distances <= np.sort(near, axis=1)[:, k - 1 : k]).mean() >= 0.99
    wrong = config.model_copy(update={"out": str(tmp_path / "wrong"), "nlist": 100})
    with pytest.raises(ConfigError, match="nlist = 100 needs 39 rows a list"):
        build_index(wrong)
    with pytest.raises(ValidationError, match="nlist and nprobe are of kind ivf, not flat"):
        IndexConfig(codes="a", out="b", nprobe=3)


def test_on_s3(s3_url):
    ids, codes = draw(2, 600)
    write_codes(f"{s3_url}/codes", ids, codes)
    config = IndexConfig(codes=f"{s3_url}/codes", out=f"{s3_url}/index", shards=2)
    manifest = build_index(config)
    assert artifact.verify(config.out) == [] and build_index(config) == manifest
    assert sorted(name for name, _ in open_store(config.out).list()) == sorted(
        [version_key(1), *(record.name for record in manifest.stored)]
    )
    check_answers(config.out, ids, codes)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_build_that_was_killed_goes_on(tmp_path, monkeypatch, kind):
    ids, codes = draw(3, 900)
    write_codes(tmp_path / "codes", ids, codes)
    config = IndexConfig(codes=str(tmp_path / "codes"), out=str(tmp_path / "index"), kind=kind, shards=3)
    whole = build_index(config.model_copy(update={"out": str(tmp_path / "unbroken")}))
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(config)
    before = stored(tmp_path / "index")
    lost = next((tmp_path / "index" / "shards").iterdir())
    lost.unlink()
    half = next(path for path in (tmp_path / "index" / "progress").rglob("*.json") if lost.name not in path.read_text())
    half.write_bytes(half.read_bytes()[:10])
    with monkeypatch.context() as patch:
        patch.setattr(module.Bar, "add", lambda self, count: None)
        assert build_index(config) == whole
    after = stored(tmp_path / "index")
    unchanged = [name for name in after if name.startswith("shards/") and after[name] == before[name]]
    # Flat: the shard whose file is lost and the one whose record is broken are built again, the third is not. IVF: the
    # broken record may have been the quantizer's, without which no shard counts.
    assert len(unchanged) == 1 or (kind == "ivf" and not unchanged)
    assert artifact.verify(config.out) == [] and not list((tmp_path / "index").rglob("progress/*/*"))
    check_answers(config.out, ids, codes) if kind == "flat" else None


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_of_two_racing_builds_one_wins(tmp_path, where, monkeypatch, request):
    url = str(tmp_path) if where == "folder" else request.getfixturevalue("s3_url")
    drawn = [draw(seed, 300) for seed in (4, 5)]
    configs = []
    for number, (ids, codes) in enumerate(drawn):
        write_codes(f"{url}/codes{number}", ids, codes)
        configs.append(IndexConfig(codes=f"{url}/codes{number}", out=f"{url}/index", shards=2))
    ready, publish = threading.Barrier(2), artifact.publish

    def publish_together(*arguments):
        ready.wait(timeout=120)
        return publish(*arguments)

    monkeypatch.setattr(artifact, "publish", publish_together)
    outcomes: dict[int, object] = {}

    def run(number):
        try:
            outcomes[number] = build_index(configs[number])
        except AlreadyExists as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number in outcomes if isinstance(outcomes[number], Manifest)]
    error = str(outcomes[1 - winner])
    assert f"holds a finished index ({outcomes[winner].id[:12]}) of another input or configuration" in error
    assert "Choose another --out" in error
    assert artifact.load_manifest(configs[0].out) == outcomes[winner] and artifact.verify(configs[0].out) == []
    check_answers(configs[0].out, *drawn[winner])
    # Another configuration on a finished index is refused before anything is built; the loser's rerun as well.
    monkeypatch.setattr(artifact, "publish", publish)
    for config in (configs[1 - winner], configs[winner].model_copy(update={"shards": 1})):
        with pytest.raises(AlreadyExists, match="holds a finished index"):
            build_index(config)


def test_codes_that_cannot_be_indexed(tmp_path, monkeypatch):
    ids, codes = draw(6, 200)
    url, out = str(tmp_path / "codes"), str(tmp_path / "index")
    config = IndexConfig(codes=url, out=out, shards=2)
    with pytest.raises(InputError, match="is not a finished artifact"):
        build_index(config)
    write_codes(url, [*ids[:-2], ids[0], ids[1]], codes)
    with pytest.raises(InputError, match=rf"2 ids stand in more than one row, the first '{min(ids[:2])}'"):
        build_index(config)
    # In one group, the task that sorts it finds them.
    with pytest.raises(InputError, match=rf"2 ids stand in more than one row, the first '{min(ids[:2])}'"):
        build_index(config.model_copy(update={"shards": 1}))
    assert not (tmp_path / "index" / "versions").exists()
    write_codes(tmp_path / "empty", [], codes[:0], num_parts=1)
    with pytest.raises(InputError, match="holds no codes: there is nothing to index"):
        build_index(IndexConfig(codes=str(tmp_path / "empty"), out=out))
    write_codes(tmp_path / "whole", ids, codes)
    part = tmp_path / "whole" / "parts" / "part-00002.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(CorruptArtifact, match=r"part-00002.parquet is corrupt"):
        build_index(IndexConfig(codes=str(tmp_path / "whole"), out=out))
    part.write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(module.ShardBuild, "run", lambda *_: ([], None))
        with pytest.raises(AuditError, match="holds 200 rows, the shards 0; nothing was published"):
            build_index(IndexConfig(codes=str(tmp_path / "whole"), out=out))


def test_ids_in_two_groups_are_compared_and_equal_hashes_are_not_enough(tmp_path, monkeypatch):
    """Hashes of four values only: nearly all ids are suspects, in several buckets and rounds."""
    ids, codes = draw(7, 300)
    config = IndexConfig(codes=str(tmp_path / "codes"), out=str(tmp_path / "index"), shards=4)
    here = config.model_copy(update={"pool": WorkersConfig(ray="never")})
    hash_ids = unique.hash_ids
    monkeypatch.setattr(unique, "hash_ids", lambda texts: (hash_ids(texts) >> np.uint64(62)) << np.uint64(62))
    monkeypatch.setattr(unique, "HASHES_PER_BUCKET", 100)
    monkeypatch.setattr(unique, "SUSPECTS", 1)
    write_codes(tmp_path / "twice", [*ids[:-1], ids[3]], codes)
    with pytest.raises(InputError, match=rf"1 ids stand in more than one row, the first '{ids[3]}'"):
        build_index(here.model_copy(update={"codes": str(tmp_path / "twice")}))
    write_codes(tmp_path / "codes", ids, codes)
    assert build_index(here).rows_out == 300
    check_answers(config.out, ids, codes)
