"""open_index and Index.search against brute force: ties by id, any shards, any width, damaged files, stamps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashray import artifact
from hashray.artifact import Manifest, canonical, sha256_hex, version_key
from hashray.codes import BIT_ORDER, StampedCodes, hamming
from hashray.errors import AlreadyExists, CorruptArtifact, InputError, MismatchError
from hashray.index.shard import train_quantizer, write_shard
from hashray.index.version import index_manifest, write_tables
from hashray.search.reader import open_index
from hashray.storage import open_store

FINGERPRINT = "ab" * 32


def codes_manifest(rows, num_bits, fingerprint=FINGERPRINT):
    return Manifest(
        kind="codes", project_version="0", config={}, parents={"model": "1" * 64, "corpus": "2" * 64}, files=(),
        fingerprint=fingerprint, rows_in=rows, rows_out=rows, rows_quarantined=0, bit_order=BIT_ORDER,
        info={"num_bits": num_bits},
    )  # fmt: skip


def write_index(url, pieces, kind="flat", version=1, trained=None, nprobe=4):
    """Publish an index whose shards hold the (ids, codes) of `pieces`."""
    store, everything = open_store(url), np.concatenate([codes for _, codes in pieces])
    trained = trained or train_quantizer(everything, 4) if kind == "ivf" else None
    quantizer = artifact.write_file(store, f"quantizers/{sha256_hex(trained)}.faiss", trained) if trained else None
    shards = [write_shard(store, pa.array(ids), codes, kind, trained) for ids, codes in pieces]
    parent = codes_manifest(len(everything), everything.shape[1] * 8)
    info, width = {"nprobe": nprobe} if trained else {}, everything.shape[1] * 8
    manifest = index_manifest(width, shards, kind, {}, quantizer, info, parent)
    return artifact.publish(store, write_tables(store, manifest, None), version_key(version))


def split(ids, codes, num_shards):
    """Disjoint ranges of ids, as the build makes them."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [([ids[i] for i in part], codes[part]) for part in np.array_split(order, num_shards)]


def brute_force(ids, codes, queries, k):
    """By a naive loop: sorted by (distance, id), padded."""
    distances = hamming(queries, codes)
    rows = [sorted(zip(row.tolist(), ids, strict=True))[:k] for row in distances]
    rows = [row + [(-1, None)] * (k - len(row)) for row in rows]
    return [[i for _, i in row] for row in rows], [[d for d, _ in row] for row in rows]


def draw(seed, rows, num_bits, words=3):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (words, num_bits // 8), dtype=np.uint8)[rng.integers(words, size=rows)]
    codes[:, -1] ^= rng.choice([0, 0, 1, 2], rows).astype(np.uint8)
    names = rng.permutation(10 * rows)[:rows]
    return [f"{name:x}" for name in names], codes, rng


def small_index(tmp_path, rows=60, num_bits=64, num_shards=3, **options):
    ids, codes, _ = draw(0, rows, num_bits)
    write_index(tmp_path / "index", split(ids, codes, num_shards), **options)
    return str(tmp_path / "index"), ids, codes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_bits=st.sampled_from([8, 16, 24, 32, 48, 64, 96, 128]),
    rows=st.integers(1, 80),
    num_shards=st.integers(1, 5),
    k=st.integers(1, 90),
    threads=st.sampled_from([1, 3]),
    overlapping=st.booleans(),
)
def test_search_against_brute_force(tmp_path_factory, seed, num_bits, rows, num_shards, k, threads, overlapping):
    """Any number of shards, of disjoint ranges of ids or not, gives the answer of a sort by (distance, id)."""
    ids, codes, rng = draw(seed, rows, num_bits)
    num_shards = min(num_shards, rows)
    pieces = split(ids, codes, num_shards)
    if overlapping:
        pieces = [([ids[i] for i in part], codes[part]) for part in np.array_split(rng.permutation(rows), num_shards)]
    url = tmp_path_factory.mktemp("index")
    write_index(url, pieces)
    assert artifact.verify(url) == []
    queries = np.concatenate([codes[:3], rng.integers(0, 256, (2, num_bits // 8), dtype=np.uint8)])
    index = open_index(url, threads=threads)
    answers, distances = index.search(queries, k)
    expected_ids, expected_distances = brute_force(ids, codes, queries, k)
    assert answers.tolist() == expected_ids and distances.tolist() == expected_distances
    assert distances.dtype == np.int32 and answers.dtype == object
    shutil.rmtree(url)


def test_one_group_of_overlapping_shards_among_others(tmp_path):
    """What appends make: a shard of old rows, two that overlap, one beyond."""
    ids, codes, rng = draw(1, 400, 32)
    order = sorted(range(400), key=ids.__getitem__)
    middle = rng.permutation(order[100:300])
    parts = [order[:100], middle[:150], middle[150:], order[300:]]
    write_index(tmp_path, [([ids[i] for i in part], codes[part]) for part in parts])
    answers, distances = open_index(tmp_path, threads=1).search(codes[:20], 350)
    assert (answers.tolist(), distances.tolist()) == brute_force(ids, codes, codes[:20], 350)


def test_ivf_gives_the_same_answer_for_any_shards(tmp_path):
    """The lists that are probed are of one quantizer, and so are the rows that are ranked."""
    ids, codes, rng = draw(2, 600, 48, words=12)
    every, some = [], []
    for num_shards in (1, 4, 9):
        order = rng.permutation(600)
        pieces = [([ids[i] for i in part], codes[part]) for part in np.array_split(order, num_shards)]
        url, trained = tmp_path / str(num_shards), train_quantizer(codes, 12)
        write_index(url, pieces, kind="ivf", trained=trained, nprobe=12)
        assert artifact.verify(url) == []
        every.append([array.tolist() for array in open_index(url, threads=2).search(codes[:10], 600)])
        write_index(url, pieces, kind="ivf", trained=trained, nprobe=2, version=2)
        index = open_index(url, threads=2)
        some.append([[array.tolist() for array in index.search(codes[:10], k)] for k in (1, 7, 80, 600)])
    assert every[0] == list(brute_force(ids, codes, codes[:10], 600)) and every[1:] == every[:1] * 2
    assert some[0][-1] != every[0] and some[1:] == some[:1] * 2


def test_an_index_without_rows(tmp_path):
    artifact.publish(open_store(tmp_path), index_manifest(32, []), version_key(1))
    index = open_index(tmp_path)
    ids, distances = index.search(np.zeros((2, 4), np.uint8), 3)
    assert index.rows == 0 and ids.tolist() == [[None] * 3] * 2 and distances.tolist() == [[-1] * 3] * 2
    with pytest.raises(MismatchError, match="codes of 16 bits cannot be searched in an index of 32 bits"):
        index.search(np.zeros((2, 2), np.uint8), 3)


def test_an_index_of_an_older_hashray(tmp_path):
    url, _, _ = small_index(tmp_path)
    manifest = artifact.load_manifest(url)
    old = manifest.model_copy(update={"info": manifest.info | {"shards": []}})
    artifact.publish(open_store(url), old, version_key(2))
    with pytest.raises(MismatchError, match="was built by an older hashray; run `hashray index build` again"):
        open_index(url)


def test_many_queries_are_searched_in_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr("hashray.search.reader.ROUND_CANDIDATES", 1)
    url, ids, codes = small_index(tmp_path)
    queries = np.repeat(codes, 3, axis=0)
    for threads in (1, 2):
        answers, distances = open_index(url, threads=threads).search(queries, 7)
        assert (answers.tolist(), distances.tolist()) == brute_force(ids, codes, queries, 7)
    assert open_index(url).search(codes[:0], 4)[0].shape == (0, 4)


def test_what_an_index_says_of_itself(tmp_path):
    url, ids, codes = small_index(tmp_path)
    index = open_index(url)
    assert (index.num_bits, index.rows, index.version, index.fingerprint) == (64, 60, 1, FINGERPRINT)
    assert index.manifest.parents["model"] == "1" * 64 and repr(index).startswith("Index(version=1, rows=60")
    write_index(url, split([*ids, "new"], np.concatenate([codes, codes[:1]]), 2), version=2)
    assert open_index(url).rows == 61 and open_index(url, version=1).rows == 60
    with pytest.raises(InputError, match=r"versions/00000009.json is not there: the newest version is 2"):
        open_index(url, version=9)


def test_wrong_requests(tmp_path):
    url, _, codes = small_index(tmp_path)
    index = open_index(url)
    with pytest.raises(InputError, match="k = 0: ask for at least 1 neighbour"):
        index.search(codes, 0)
    with pytest.raises(MismatchError, match="codes of 32 bits cannot be searched in an index of 64 bits"):
        index.search(codes[:, :4], 3)
    with pytest.raises(ValueError, match="expected packed uint8"):
        index.search(codes[0], 3)
    with pytest.raises(InputError, match="threads = 0: a search needs at least 1"):
        open_index(url, threads=0)
    with pytest.raises(InputError, match="is not a finished artifact"):
        open_index(tmp_path / "nowhere")
    artifact.publish(open_store(tmp_path / "codes"), codes_manifest(3, 64))
    with pytest.raises(MismatchError, match="is codes, expected an index"):
        open_index(tmp_path / "codes")


def test_codes_of_another_model_are_refused(tmp_path):
    url, ids, codes = small_index(tmp_path)
    index = open_index(url)
    mine, other = StampedCodes.stamp(codes, FINGERPRINT), StampedCodes.stamp(codes, "cd" * 32)
    expected = brute_force(ids, codes, codes[:4], 3)
    for queries in (codes[:4], mine[:4], pickle.loads(pickle.dumps(mine))[:4], StampedCodes.stamp(codes[:4], None)):
        answers, distances = index.search(queries, 3)
        assert (answers.tolist(), distances.tolist()) == expected
    for queries in (other, other[3:5], pickle.loads(pickle.dumps(other[::2]))):
        with pytest.raises(
            MismatchError, match=r"codes of model cdcdcdcdcdcd… cannot be searched in an index of model"
        ):
            index.search(queries, 3)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_flipped_byte_is_found_in_every_file(tmp_path, kind):
    ids, codes, _ = draw(3, 400, 64)
    write_index(tmp_path, split(ids, codes, 2), kind=kind)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and "quantizers" not in path.parts]
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(CorruptArtifact, match=f"{path.name} is corrupt"):
                open_index(tmp_path)
        path.write_bytes(whole)
        if path.parent.name != "versions":
            path.unlink()
            with pytest.raises(CorruptArtifact, match=f"{path.name} is missing"):
                open_index(tmp_path)
            path.write_bytes(whole)
    open_index(tmp_path)


def test_a_version_of_a_newer_hashray(tmp_path):
    url, _, _ = small_index(tmp_path)
    path = tmp_path / "index" / version_key(1)
    fields = json.loads(path.read_text()) | {"format_version": 3, "project_version": "9.1"}
    del fields["id"]
    path.write_bytes(canonical({**fields, "id": sha256_hex(canonical(fields))}))
    with pytest.raises(MismatchError, match=r"written by a newer hashray \(9.1, format 3; .* upgrade hashray"):
        open_index(url)


def test_an_index_on_s3_through_the_cache(tmp_path, s3_url, s3_server, monkeypatch):
    ids, codes, _ = draw(4, 200, 64)
    write_index(s3_url, split(ids, codes, 2))
    expected = brute_force(ids, codes, codes[:5], 20)
    monkeypatch.setenv("HASHRAY_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        answers, distances = open_index(s3_url, endpoint_url=s3_server).search(codes[:5], 20)
        assert (answers.tolist(), distances.tolist()) == expected
    kept = sorted(path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".faiss", ".arrow"))
    assert len(kept) == 4
    # A damaged file in the cache is fetched again; a whole one is not.
    for path in kept[1:]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = kept[0].stat().st_ino
    answers, distances = open_index(s3_url).search(codes[:5], 20)
    assert (answers.tolist(), distances.tolist()) == expected and kept[0].stat().st_ino == before
    # Damage in the store is found, and leaves nothing in the cache.
    name = next(name for name, _ in open_store(s3_url).list("shards/"))
    open_store(s3_url).write(name, b"x" * open_store(s3_url).size(name))
    with pytest.raises(CorruptArtifact, match="is corrupt"):
        open_index(s3_url, cache_dir=tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*hashray-tmp*"))


def test_two_processes_fill_one_cache(tmp_path, s3_url):
    ids, codes, _ = draw(5, 300, 64)
    write_index(s3_url, split(ids, codes, 3))
    np.save(tmp_path / "q.npy", codes[:5])
    script = (
        "import sys, numpy as np; from hashray.search.reader import open_index\n"
        "index = open_index(sys.argv[1], cache_dir=sys.argv[2]); q = np.load(sys.argv[3])\n"
        "print(index.search(q, 5)[0].tolist())"
    )
    command = [sys.executable, "-c", script, s3_url, str(tmp_path / "cache"), str(tmp_path / "q.npy")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate()[0].strip() for process in processes]
    assert answers == [str(brute_force(ids, codes, codes[:5], 5)[0])] * 3


def test_a_second_version_one_is_refused(tmp_path):
    _, ids, codes = small_index(tmp_path)
    with pytest.raises(AlreadyExists):
        write_index(tmp_path / "index", split(ids, codes, 2))


def test_no_ray_is_needed():
    code = "import sys, hashray.search.reader, hashray.index.shard; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_opening_shows_the_bytes_that_it_fetches_or_verifies_and_nothing_where_all_are_verified(
    place, tmp_path, request, monkeypatch, capfd
):
    clock = time.time_ns
    monkeypatch.setattr("hashray.storage.cache.time.time_ns", lambda: clock() + 60 * 10**9)  # long after the writing
    url = request.getfixturevalue("s3_url") if place == "s3" else tmp_path / "index"
    codes = np.random.default_rng(0).integers(0, 256, (50, 4), dtype=np.uint8)
    manifest = write_index(url, split([f"{i:03d}" for i in range(50)], codes, 3))
    size_bytes = sum(record.bytes for record in manifest.stored)

    def shown():
        capfd.readouterr()
        open_index(url, cache_dir=tmp_path / "cache")
        lines = capfd.readouterr().err.splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"stage": "verify index"')]

    line = shown()[-1]
    assert (line["done"], line["total"], line["unit"]) == (size_bytes, size_bytes, "bytes")
    if place == "s3":  # what was fetched a moment ago has no record yet, and is read once more
        assert shown()[-1]["done"] == size_bytes
    assert shown() == []
    # One file has to be verified again: only its bytes are counted.
    folder = tmp_path / ("cache" if place == "s3" else "index")
    path = next(path for path in sorted(folder.rglob("*.faiss")))
    os.utime(path, (1, 1))
    assert [line["total"] for line in shown()] == [path.stat().st_size]
    assert shown() == []
