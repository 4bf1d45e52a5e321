"""One shard: exact answers in (distance, position) order, widths, files, quantizers, mapped ids."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from hashray.codes import hamming
from hashray.errors import ConfigError, CorruptArtifact, InputError
from hashray.index import lists
from hashray.index import shard as module
from hashray.index.ids import MappedIds, ids_bytes
from hashray.index.shard import (
    build_shard,
    check_kind,
    default_nlist,
    omp_threads,
    open_shard,
    shard_bits,
    train_quantizer,
    write_shard,
)
from hashray.storage import open_store

INT_MAX = np.iinfo(np.int32).max


def tied_codes(rng, rows, num_bits, words=4):
    """Codes that are copies of a few words with at most one bit flipped: nearly every distance is a tie."""
    codes = rng.integers(0, 256, (words, num_bits // 8), dtype=np.uint8)[rng.integers(words, size=rows)]
    flip = rng.integers(0, num_bits, rows)
    codes[np.arange(rows), flip // 8] ^= np.where(rng.random(rows) < 0.3, 1 << (flip % 8), 0).astype(np.uint8)
    return codes


def brute_force(queries, codes, k):
    distances = hamming(queries, codes)
    order = np.stack([np.lexsort((np.arange(len(codes)), row)) for row in distances])[:, :k]
    return np.take_along_axis(distances, order, 1), order


def opened(tmp_path, codes, kind="flat", quantizer=None, nprobe=None):
    path = tmp_path / "shard.faiss"
    path.write_bytes(build_shard(codes, kind, quantizer))
    return open_shard(path, kind, codes.shape[1] * 8, len(codes), nprobe)


@pytest.mark.parametrize("num_bits", [8, 16, 24, 32, 40, 48, 64, 72, 96, 128, 136, 192, 256, 520])
@pytest.mark.parametrize("counting", [True, False])
def test_flat_is_exact_with_ties_by_position(tmp_path, monkeypatch, num_bits, counting):
    if not counting:
        monkeypatch.setattr(module, "COUNTING_BYTES", 0)
    rng = np.random.default_rng(num_bits)
    codes, queries = tied_codes(rng, 700, num_bits), tied_codes(rng, 5, num_bits)
    shard = opened(tmp_path, codes)
    for k in (1, 10, 699, 700):
        for array, expected in zip(shard.search(queries, k), brute_force(queries, codes, k), strict=True):
            np.testing.assert_array_equal(array, expected)
    distances, positions = shard.search(queries, 703)
    assert (positions[:, 700:] == -1).all() and (distances[:, 700:] == INT_MAX).all()


def test_flat_ties_beyond_a_block_of_faiss(tmp_path):
    """FAISS walks the rows in blocks of 65,536."""
    rng = np.random.default_rng(0)
    codes, queries = tied_codes(rng, 150_000, 8), tied_codes(rng, 40, 8)
    np.testing.assert_array_equal(opened(tmp_path, codes).search(queries, 50)[1], brute_force(queries, codes, 50)[1])


def test_widths_inside_a_shard():
    assert [shard_bits(bits) for bits in (16, 24, 40, 56, 72, 120, 128)] == [32, 32, 64, 64, 128, 128, 128]
    with pytest.raises(ConfigError, match="not a positive multiple of 8"):
        shard_bits(12)


def test_kinds_not_built_are_refused():
    for kind in ("hnsw", "multihash"):
        with pytest.raises(ConfigError, match=f"index kind '{kind}' is not built by this hashray; use flat or ivf"):
            check_kind(kind)
    with pytest.raises(ConfigError, match="perhaps you meant 'flat'"):
        build_shard(np.zeros((2, 4), np.uint8), "flta")


def test_a_quantizer_is_the_same_for_the_same_seed():
    codes = tied_codes(np.random.default_rng(1), 2000, 48, words=20)
    quantizer = train_quantizer(codes, 20, seed=3)
    assert quantizer == train_quantizer(codes, 20, seed=3) != train_quantizer(codes, 20, seed=4)


def probed_rows(quantizer, codes, queries, nprobe):
    """Which rows bool [n, rows] are in the lists that a query looks into: the nearest by distance, then by number."""
    trained = faiss.deserialize_index_binary(np.frombuffer(quantizer, np.uint8))
    centres = faiss.downcast_IndexBinary(trained.quantizer)
    lists_of = [centres.search(module.pad_width(some, trained.d // 8), count)[1] for some, count in
                ((queries, nprobe), (codes, 1))]  # fmt: skip
    return (lists_of[0][:, :, None] == lists_of[1][None, None, :, 0]).any(1)


@pytest.mark.parametrize("num_bits", [8, 48, 64])
@pytest.mark.parametrize("nprobe", [1, 2, 9, 20])
@pytest.mark.parametrize("together", [1, 700, 1 << 22])
def test_ivf_ranks_all_rows_of_the_probed_lists(tmp_path, monkeypatch, num_bits, nprobe, together):
    """Nearly every distance is a tie, so that the k-th row is hardly ever the only one at its distance.

    Queries are searched one by one, some at a time, and all of one bound together.
    """
    monkeypatch.setattr(lists, "TOGETHER_ROWS", together)
    rng = np.random.default_rng(nprobe)
    codes, queries = tied_codes(rng, 2000, num_bits, words=20), tied_codes(rng, 30, num_bits, words=20)
    quantizer = train_quantizer(codes, 20, seed=3)
    shard = opened(tmp_path, codes, "ivf", quantizer, nprobe)
    near, probed = hamming(queries, codes), probed_rows(quantizer, codes, queries, nprobe)
    for k in (1, 3, 50, 700, 2000):
        distances, positions = shard.search(queries, k)
        for query in range(30):
            ranked = sorted((int(near[query, row]), int(row)) for row in np.flatnonzero(probed[query]))[:k]
            ranked += [(INT_MAX, -1)] * (k - len(ranked))
            assert list(zip(distances[query].tolist(), positions[query].tolist(), strict=True)) == ranked
    assert shard.search(queries[:0], 3)[0].shape == (0, 3)


def test_ivf_finds_what_is_near(tmp_path):
    """Distance-recall: how many answers are as near as the k-th of an exact search."""
    rng = np.random.default_rng(2)
    words = rng.random((100, 64)) < 0.5
    draw = lambda n: np.packbits(words[rng.integers(100, size=n)] ^ (rng.random((n, 64)) < 0.1), axis=1)  # noqa: E731
    codes, queries = draw(20_000), draw(100)
    quantizer = train_quantizer(codes[::2], default_nlist(len(codes)))
    distances, positions = opened(tmp_path, codes, "ivf", quantizer, module.NPROBE).search(queries, 10)
    exact = brute_force(queries, codes, 10)[0]
    np.testing.assert_array_equal(np.take_along_axis(hamming(queries, codes), positions, 1), distances)
    assert (distances <= exact[:, -1:]).mean() >= 0.99


def test_a_quantizer_needs_39_rows_a_list():
    with pytest.raises(ConfigError, match=r"nlist = 10 needs 39 rows a list to train on, there are 100; use 1 to 2"):
        train_quantizer(np.zeros((100, 8), np.uint8), 10)


def test_threads_of_the_caller_are_left_alone(tmp_path):
    shard = opened(tmp_path, np.zeros((10, 8), np.uint8))
    before = faiss.omp_get_max_threads()
    inside, elsewhere = [], []
    with omp_threads(before + 1):
        inside.append(faiss.omp_get_max_threads())
        other = threading.Thread(target=lambda: elsewhere.append(faiss.omp_get_max_threads()))
        other.start()
        other.join()
        shard.search(np.zeros((1, 8), np.uint8), 1)
        inside.append(faiss.omp_get_max_threads())
    assert inside == [before + 1] * 2 and elsewhere == [before] and faiss.omp_get_max_threads() == before


def test_a_file_that_is_not_what_its_version_says(tmp_path):
    path = tmp_path / "shard.faiss"
    data = build_shard(np.zeros((10, 8), np.uint8), "flat")
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="holds 10 codes of 64 bits, its version says 11 of 64"):
        open_shard(path, "flat", 64, 11)
    path.write_bytes(data[:-20])
    with pytest.raises(CorruptArtifact, match="is no FAISS binary index"):
        open_shard(path, "flat", 64, 10)


@pytest.mark.parametrize(
    "ids", [["b", "a"], ["é", "z", "", "日本", "\U0001f600", "\uffff"], [f"{i:05}" for i in range(9999)]]
)
def test_a_written_shard_ascends_by_id(tmp_path, ids):
    rng = np.random.default_rng(0)
    codes, store = rng.integers(0, 256, (len(ids), 4), dtype=np.uint8), open_store(tmp_path)
    shuffled = rng.permutation(len(ids))
    written = write_shard(store, pa.array([ids[i] for i in shuffled]), codes[shuffled], "flat")
    again = write_shard(store, pa.array(ids, pa.large_string()), codes, "flat")
    assert written == again and sorted(store.list()) == [(file.name, file.bytes) for file in written.files[::-1]]
    stored = MappedIds(tmp_path / written.ids.name, len(ids)).array
    assert stored.to_pylist() == sorted(ids) and stored.type == pa.string()
    assert (written.first, written.last, written.rows) == (min(ids), max(ids), len(ids))
    shard = open_shard(tmp_path / written.codes.name, "flat", 32, len(ids))
    places = shard.search(codes[:5], 1)
    nearest = [codes[ids.index(stored[int(place)].as_py())].tolist() for place in places[1][:, 0]]
    assert nearest == codes[:5].tolist() and not places[0].any()


def test_an_id_twice(tmp_path):
    with pytest.raises(InputError, match=r"1 ids stand in more than one row, the first 'b': .*hashray verify"):
        write_shard(open_store(tmp_path), pa.array(["b", "a", "b"]), np.zeros((3, 4), np.uint8), "flat")
    assert not list(tmp_path.iterdir())


def test_mapped_ids(tmp_path, monkeypatch):
    ids = sorted(["", "é", "\0", "a\0", *(f"photos/{i:07}.jpg" for i in range(200_000))])
    path = tmp_path / "ids.arrow"
    for array in (pa.array(ids), pa.array(ids, pa.large_string()), pa.array(["x", *ids])[1:]):
        data = ids_bytes(array)
        assert not path.exists() or path.read_bytes() == data
        path.write_bytes(data)
    mapped = MappedIds(path, len(ids))
    for places in ([0, 3, 1], [199_999, 5, 5], []):
        assert mapped.take(np.array(places, np.int64)) == [ids[place] for place in places]
        mapped.release()
    with pytest.raises(CorruptArtifact, match="holds 200,004 ids, its version says 7"):
        MappedIds(path, 7)
    for wrong in (b"", b"no Arrow file", path.read_bytes()[:-20]):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(CorruptArtifact, match="is no Arrow file of ids"):
            MappedIds(tmp_path / "wrong", 3)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("id", pa.int64())])) as writer:
        writer.write_batch(pa.record_batch([pa.array([1, 2])], names=["id"]))
    with pytest.raises(CorruptArtifact, match="expected one batch of one text column, id"):
        MappedIds(path, 2)


def test_released_ids_are_no_memory_of_the_process(tmp_path):
    """All ids are touched, and after each release hardly any of their pages is mapped."""
    path = tmp_path / "ids.arrow"
    path.write_bytes(ids_bytes(pa.array([f"{i:020}" for i in range(1_000_000)])))
    mapped = MappedIds(path, 1_000_000)

    def resident():
        text = Path("/proc/self/smaps").read_text()
        return int(re.search(rf"{path}\n.*\nKern.*\nMMU.*\nRss: +(\d+) kB", text)[1])

    for touched in (True, False):
        if touched:
            mapped.take(np.arange(0, 1_000_000, 50))
        else:
            mapped.release()
        assert (resident() > 10_000) == touched
