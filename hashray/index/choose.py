"""Which kind of index, how many lists and how many of them to look into: measured on a sample of the codes. No Ray.

Recall is distance-recall over all shards: of the k rows that a query gets, the share whose distance is at most that of
the exact k-th row (under ties ids mean nothing). All shards share one quantizer and a query looks into the same lists
of each, so the lists of one sample drawn from all shards say what all shards together would answer. The k nearest rows
of a sample lie further away than the k nearest of all rows: the recall of the index is higher, not lower.

What decides is what does not depend on the machine: recall, and the codes a query is compared with. Times are measured
only where the user limits them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hashray.codes import Codes, pad_width
from hashray.errors import InputError
from hashray.index.groups import READ_FOR_SAMPLE
from hashray.index.shard import (
    SAMPLE_PER_LIST,
    Shard,
    build_shard,
    default_nlist,
    omp_threads,
    shard_bits,
    train_quantizer,
)

SAMPLE = 1 << 18
QUERIES = 2048
K = 100
# A code in a probed list costs twice a code of a flat scan: it is looked at for the bound, and again for the answer;
# and a list starts at any place. Below this gain flat stays: it is exact and half the memory.
LIST_COST, LEAST_GAIN = 2.0, 2.0
MOST_DOUBLED = 2048  # training 2,236 lists takes 24 CPU s, and four times as long for twice as many
ID_BYTES = 8  # FAISS keeps a number beside each code of a list
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
         "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip


class Candidate(BaseModel):
    """One kind with its settings, and what was measured of it.

    Attributes:
        recall: mean of the sample's queries.
        sure_recall: the same less two standard errors. A query whose list is wrong loses most of its rows, so that the
            mean of a few hundred queries says little: .990 on 256 queries was .957 on 256 others.
        compared: codes that a query is compared with, of all rows: those of the lists probed, and the lists.
        ram_bytes: of a searcher that has all shards: codes, and the numbers beside the codes of lists.
        ms: CPU time of a query among all rows; None where there is no limit of time.
        lost: why it was not chosen; None for the one that was.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    nlist: int | None = None
    nprobe: int | None = None
    recall: float
    sure_recall: float
    compared: int
    ram_bytes: int
    ms: float | None = None
    lost: str | None = None


class Choice(BaseModel):
    """The candidates, the chosen one first, and on what they were measured."""

    model_config = ConfigDict(frozen=True)

    candidates: tuple[Candidate, ...]
    sample: int
    queries: int
    k: int

    @property
    def chosen(self) -> Candidate:
        """The candidate that was chosen."""
        return self.candidates[0]


@dataclass(frozen=True)
class Limits:
    """What the user asks for; `rows` and `shards` of the index to be built."""

    rows: int
    shards: int
    min_recall: float
    max_ram_bytes: int | None = None
    max_ms: float | None = None


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as 8GiB, 500 MB or 123456.

    Raises:
        ValueError: no such size.

    >>> parse_bytes("8GiB"), parse_bytes("1.5 KB")
    (8589934592, 1500)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not a size; write a number with {', '.join(unit for unit in UNITS if unit)}")
    return int(float(match[1]) * units[match[2].lower()])


def nlists(rows: int, shards: int) -> list[int]:
    """Numbers of lists to try: the square root of a shard's rows, and twice as many where training them is cheap.

    >>> nlists(10_000_000, 2), nlists(1_000_000, 1), nlists(100, 1)
    ([2236], [1000, 2000], [2])
    """
    usual = default_nlist(rows // shards)
    cheap = 2 * usual <= MOST_DOUBLED and 2 * usual * SAMPLE_PER_LIST <= rows // READ_FOR_SAMPLE
    return [usual, 2 * usual] if cheap else [usual]


def sample_size(nlists: Sequence[int]) -> int:
    """Rows of a sample on which these numbers of lists can be trained."""
    return max(SAMPLE, SAMPLE_PER_LIST * max(nlists)) + QUERIES


def lines(choice: Choice) -> Iterator[str]:
    """A line for each candidate, the chosen one first."""
    for candidate in choice.candidates:
        ms = "" if candidate.ms is None else f", {candidate.ms:.2f} ms"
        yield (
            f"{_name(candidate)}: recall {candidate.recall:.4f}, {candidate.compared:,} codes a query{ms}, "
            f"{candidate.ram_bytes:,} bytes: {candidate.lost or 'chosen'}"
        )


def distance_recall(distances: NDArray[np.int32], exact: NDArray[np.int32]) -> float:
    """The share of rows in answers int32 [q, k] that are no further away than the exact k-th row of int32 [q, k].

    >>> distance_recall(np.array([[1, 2, 9]], np.int32), np.array([[1, 2, 2]], np.int32))
    0.6666666666666666
    """
    return float((distances <= exact[:, -1:]).mean())


def sure_recall(distances: NDArray[np.int32], exact: NDArray[np.int32]) -> float:
    """The distance-recall less two standard errors over the queries, at least 0; arguments as `distance_recall`."""
    shares = (distances <= exact[:, -1:]).mean(1)
    return max(0.0, float(shares.mean() - 2 * shares.std() / np.sqrt(len(shares))))


def measure(sample: Codes, nlists: Sequence[int], limits: Limits, seed: int = 0) -> tuple[Choice, bytes | None]:
    """Measure flat and ivf on a sample, and choose.

    Args:
        sample: packed codes uint8 [n, b], drawn from all rows, in any order.
        nlists: numbers of lists to try.

    Returns:
        The choice, and for ivf the quantizer that it was measured with, which the index is built with.

    Raises:
        InputError: nothing fits into the memory, or into the time.
    """
    mixed = sample[np.random.default_rng(seed).permutation(len(sample))]
    num_queries = min(QUERIES, max(1, len(mixed) // 10))
    queries, base = mixed[:num_queries], mixed[num_queries:] if len(mixed) > num_queries else mixed
    bench = _Bench(queries, base, min(K, len(base)), limits)
    candidates, quantizers = [bench.flat()], dict[int, bytes]()
    for nlist in nlists:
        quantizers[nlist] = train_quantizer(base[: SAMPLE_PER_LIST * nlist], nlist, seed)
        candidates += bench.lists(nlist, quantizers[nlist])
    choice = Choice(
        candidates=choose(candidates, limits), sample=len(sample), queries=len(queries), k=bench.k
    )  # fmt: skip
    return choice, quantizers.get(choice.chosen.nlist or 0)


class _Bench:
    """Queries uint8 [q, b] against the codes uint8 [n, b] of a sample, whatever the kind."""

    def __init__(self, queries: Codes, base: Codes, k: int, limits: Limits) -> None:
        self.queries, self.base, self.k, self.limits = queries, base, k, limits
        self.scale, self.width = limits.rows / len(base), shard_bits(base.shape[1] * 8) // 8
        self.exact = np.zeros((len(queries), k), np.int32)

    def flat(self) -> Candidate:
        """Measure flat, and keep its distances: the exact ones."""
        index = faiss.deserialize_index_binary(np.frombuffer(build_shard(self.base, "flat"), np.uint8))
        self.exact, ms = self._search(Shard(index, "flat", self.base.shape[1] * 8))
        rows = self.limits.rows
        return Candidate(kind="flat", recall=1.0, sure_recall=1.0, compared=rows, ram_bytes=rows * self.width, ms=ms)

    def lists(self, nlist: int, quantizer: bytes) -> Iterator[Candidate]:
        """Measure ivf with more and more lists probed, until the recall is there or nothing is saved."""
        data = np.frombuffer(build_shard(self.base, "ivf", quantizer), np.uint8)
        index = faiss.deserialize_index_binary(data)  # owns what the next line gives
        ivf: Any = faiss.downcast_IndexBinary(index)
        limits = self.limits
        sizes = np.array([ivf.invlists.list_size(number) for number in range(nlist)])
        ram_bytes = limits.rows * (self.width + ID_BYTES) + limits.shards * nlist * self.width
        nprobe, enough = 1, False
        while nprobe <= nlist and not enough:
            distances, ms = self._search(Shard(ivf, "ivf", self.base.shape[1] * 8, nprobe))
            with omp_threads(1):
                probed = ivf.quantizer.search(pad_width(self.queries, self.width), nprobe)[1]
            compared = round(float(sizes[probed].sum(1).mean()) * self.scale) + limits.shards * nlist
            recall, sure = distance_recall(distances, self.exact), sure_recall(distances, self.exact)
            yield Candidate(kind="ivf", nlist=nlist, nprobe=nprobe, recall=recall, sure_recall=sure,
                            compared=compared, ram_bytes=ram_bytes, ms=ms)  # fmt: skip
            enough = sure >= limits.min_recall or compared > limits.rows
            nprobe *= 2

    def _search(self, shard: Shard) -> tuple[NDArray[np.int32], float | None]:
        """Distances int32 [q, k], and CPU milliseconds of a query among all rows where there is a limit of time."""
        distances, _ = shard.search(self.queries, self.k)
        if self.limits.max_ms is None:
            return distances, None
        start = time.thread_time()
        shard.search(self.queries, self.k)
        return distances, (time.thread_time() - start) / len(self.queries) * 1e3 * self.scale


def choose(candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate, ...]:
    """Put the best candidate first, and say of each other why it lost.

    Those that do not fit into the memory or lack recall are out. Of the others, if there is a limit of time: flat where
    it keeps it, since it is exact; else those that keep it. Then the one with the least work, where ivf has to save
    half of flat's.

    Raises:
        InputError: none fits.
    """
    reasons = {n: _unfit(candidate, limits) for n, candidate in enumerate(candidates)}
    fit = [n for n, reason in reasons.items() if reason is None]
    if not fit:
        raise _nothing_fits(candidates, limits)
    flat = next((n for n in fit if candidates[n].kind == "flat"), None)
    best = min(fit, key=lambda n: (_work(candidates[n]), n))
    if flat is not None and (
        limits.max_ms is not None or _work(candidates[flat]) < LEAST_GAIN * _work(candidates[best])
    ):
        best = flat
    for n in fit:
        if n != best:
            reasons[n] = _why_not(candidates[n], candidates[best], limits)
    others = [c.model_copy(update={"lost": reasons[n]}) for n, c in enumerate(candidates) if n != best]
    return (candidates[best], *others)


def _work(candidate: Candidate) -> float:
    return candidate.compared * (1.0 if candidate.kind == "flat" else LIST_COST)


def _unfit(candidate: Candidate, limits: Limits) -> str | None:
    if limits.max_ram_bytes is not None and candidate.ram_bytes > limits.max_ram_bytes:
        return f"needs {candidate.ram_bytes:,} bytes, {limits.max_ram_bytes:,} are allowed"
    if candidate.sure_recall < limits.min_recall:
        return f"recall may be {candidate.sure_recall:.4f}, {limits.min_recall:g} is the least"
    if limits.max_ms is not None and candidate.ms is not None and candidate.ms > limits.max_ms:
        return f"{candidate.ms:.2f} ms a query, {limits.max_ms:g} are allowed"
    return None


def _why_not(candidate: Candidate, best: Candidate, limits: Limits) -> str:
    if candidate.kind == "flat":
        return f"compares a query with {candidate.compared / best.compared:.1f} times as many codes"
    if best.kind == "flat":
        return "flat is exact, and fast enough" if limits.max_ms is not None else "saves less than half of flat's work"
    return f"compares a query with {candidate.compared:,} codes, not {best.compared:,}"


def _nothing_fits(candidates: Sequence[Candidate], limits: Limits) -> InputError:
    least = min(candidate.ram_bytes for candidate in candidates)
    if limits.max_ram_bytes is not None and least > limits.max_ram_bytes:
        return InputError(
            f"{limits.rows:,} codes need {least:,} bytes of memory at least (kind flat), --max-ram allows "
            f"{limits.max_ram_bytes:,}. Use fewer bits, build an index for each of several machines, or allow more"
        )
    lines = "; ".join(f"{_name(candidate)}: {_unfit(candidate, limits)}" for candidate in candidates)
    return InputError(f"no kind keeps --max-ram, --min-recall and --max-ms together: {lines}. Relax one of them")


def _name(candidate: Candidate) -> str:
    return candidate.kind if candidate.kind == "flat" else f"ivf {candidate.nlist} lists, {candidate.nprobe} probed"
