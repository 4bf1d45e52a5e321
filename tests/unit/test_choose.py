"""Choosing the kind: what is measured on a sample, beside an oracle; which limit decides; what is refused."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from pydantic import ValidationError

from hashray.codes import hamming
from hashray.errors import InputError
from hashray.index import choose as module
from hashray.index.build import IndexConfig
from hashray.index.choose import Candidate, Limits, choose, distance_recall, measure, parse_bytes
from hashray.index.shard import train_quantizer


def draw(seed, rows, clusters=40, num_bits=32):
    rng = np.random.default_rng(seed)
    words = rng.random((clusters, num_bits)) < 0.5
    return np.packbits(words[rng.integers(clusters, size=rows)] ^ (rng.random((rows, num_bits)) < 0.03), axis=1)


def naive_recall(queries, base, nlist, nprobe, quantizer, k):
    """The k nearest among the rows of the nprobe nearest lists, each row in its nearest list."""
    index = faiss.deserialize_index_binary(np.frombuffer(quantizer, np.uint8))
    centres = faiss.downcast_IndexBinary(index.quantizer)
    _, of_row = centres.search(base, 1)
    _, probed = centres.search(queries, nprobe)
    near, shares = hamming(queries, base), []
    for query in range(len(queries)):
        kth = np.sort(near[query])[k - 1]
        answers = np.sort(near[query][np.isin(of_row[:, 0], probed[query])])[:k]
        shares.append((answers <= kth).sum() / k)
    error = np.std(shares) / np.sqrt(len(shares))
    return (
        float(np.mean(shares)),
        float(np.mean(shares) - 2 * error),
        float(np.mean([np.isin(of_row[:, 0], lists).sum() for lists in probed])),
    )


def test_recall_and_work_are_those_of_an_oracle(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 50)
    monkeypatch.setattr(module, "K", 20)
    sample, limits = draw(0, 3050), Limits(rows=30_000, shards=3, min_recall=0.9)
    choice, quantizer = measure(sample, [25], limits, seed=1)
    mixed = sample[np.random.default_rng(1).permutation(3050)]
    queries, base = mixed[:50], mixed[50:]
    trained = train_quantizer(base[: 64 * 25], 25, 1)
    lists = [candidate for candidate in choice.candidates if candidate.kind == "ivf"]
    assert {candidate.nprobe for candidate in lists} >= {1, 2} and len(lists) >= 2
    for candidate in lists:
        recall, sure, rows = naive_recall(queries, base, 25, candidate.nprobe, trained, 20)
        assert (candidate.recall, candidate.sure_recall) == (pytest.approx(recall), pytest.approx(max(0, sure)))
        assert candidate.compared == pytest.approx(10 * rows + 3 * 25, abs=1)
        assert candidate.ram_bytes == 30_000 * (4 + 8) + 3 * 25 * 4 and candidate.ms is None
    assert choice.chosen.kind == "ivf" and choice.chosen.sure_recall >= 0.9 and quantizer == trained
    assert (choice.sample, choice.queries, choice.k) == (3050, 50, 20)
    assert [candidate.lost is None for candidate in choice.candidates] == [True] + [False] * len(lists)
    assert measure(sample, [25], limits, seed=1) == (choice, quantizer)


def test_codes_without_clusters_stay_flat():
    codes = np.random.default_rng(2).integers(0, 256, (4000, 4), dtype=np.uint8)
    choice, quantizer = measure(codes, [20], Limits(rows=4000, shards=1, min_recall=0.99))
    assert choice.chosen.kind == "flat" and choice.chosen.recall == 1.0 and quantizer is None


def test_a_limit_of_time_measures_time_and_prefers_the_exact_kind():
    choice, _ = measure(draw(3, 2000), [10], Limits(rows=2000, shards=1, min_recall=0.9, max_ms=1e9))
    assert choice.chosen.kind == "flat" and all(candidate.ms is not None for candidate in choice.candidates)
    with pytest.raises(
        InputError, match=r"no kind keeps .* flat: [\d.]+ ms a query, 1e-09 are allowed; ivf 10 lists, 1 probed"
    ):
        measure(draw(3, 2000), [10], Limits(rows=2000, shards=1, min_recall=0.9, max_ms=1e-9))


FLAT = Candidate(kind="flat", recall=1.0, sure_recall=1.0, compared=1000, ram_bytes=100, ms=10.0)
FEW = Candidate(kind="ivf", nlist=9, nprobe=1, recall=0.95, sure_recall=0.9, compared=50, ram_bytes=200, ms=1.0)
MANY = Candidate(kind="ivf", nlist=9, nprobe=4, recall=0.999, sure_recall=0.995, compared=200, ram_bytes=200, ms=3.0)
WIDE = Candidate(kind="ivf", nlist=9, nprobe=8, recall=1.0, sure_recall=1.0, compared=400, ram_bytes=200, ms=2.0)


@pytest.mark.parametrize(
    ("limits", "best", "reasons"),
    [
        (
            {},
            MANY,
            [
                "compares a query with 5.0 times as many codes",
                "recall may be 0.9000, 0.99 is the least",
                "400 codes, not 200",
            ],
        ),
        ({"min_recall": 0.5}, FEW, ["20.0 times", "200 codes, not 50", "400 codes, not 50"]),
        (
            {"min_recall": 1.0},
            FLAT,
            ["recall may be 0.9000", "recall may be 0.9950", "saves less than half of flat's work"],
        ),
        ({"max_ram_bytes": 150}, FLAT, ["needs 200 bytes, 150 are allowed"] * 3),
        ({"max_ms": 10.0}, FLAT, ["recall may be 0.9000", "flat is exact, and fast enough", "flat is exact"]),
        ({"max_ms": 5.0}, MANY, ["10.00 ms a query, 5 are allowed", "recall may be 0.9000", "400 codes"]),
        ({"max_ms": 2.5}, WIDE, ["10.00 ms", "recall may be 0.9000", "3.00 ms a query, 2.5 are allowed"]),
    ],
)
def test_which_limit_decides(limits, best, reasons):
    chosen, *others = choose([FLAT, FEW, MANY, WIDE], Limits(1000, 1, **{"min_recall": 0.99, **limits}))
    assert chosen == best and len(others) == 3
    assert all(reason in str(other.lost) for reason, other in zip(reasons, others, strict=True)), others


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        InputError, match=r"1,000 codes need 100 bytes of memory at least \(kind flat\), --max-ram allows 99"
    ):
        choose([FLAT, MANY], Limits(1000, 1, 0.99, max_ram_bytes=99))
    with pytest.raises(InputError, match=r"no kind keeps --max-ram, --min-recall and --max-ms together: .* Relax one"):
        choose([FLAT, MANY], Limits(1000, 1, 0.99, max_ms=1.0))


def test_sizes_and_flags():
    assert [parse_bytes(text) for text in ("1 KiB", "2mb", "7", "1.5GiB")] == [1024, 2_000_000, 7, 3 << 29]
    with pytest.raises(ValidationError, match="'8 gallons' is not a size; write a number with B, KiB"):
        IndexConfig(codes="a", out="b", kind="auto", max_ram="8 gallons")
    with pytest.raises(ValidationError, match="min_recall and max_ms are of kind auto, not flat"):
        IndexConfig(codes="a", out="b", min_recall=0.9, max_ms=1)
    with pytest.raises(ValidationError, match="nlist and nprobe are of kind ivf, not auto"):
        IndexConfig(codes="a", out="b", kind="auto", nprobe=3)
    assert distance_recall(np.int32([[1, 5], [2, 2]]), np.int32([[1, 4], [2, 3]])) == 0.75
