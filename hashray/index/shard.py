"""One FAISS binary shard: build, serialise, open, search. No Ray.

A shard is two files named by their content: shards/<sha256>.faiss and ids/<sha256>.arrow. Rows ascend
by id (by UTF-8 bytes, as Python compares text), and a row's place is its number inside FAISS, so the ids stay
outside. FAISS loads a flipped bit silently, so a shard's sha256 is verified before it is opened.
FAISS hangs in a forked child: start processes by spawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.artifact.bitmap import Bitmap
from hashray.codes import Codes, as_codes, check_num_bits, pad_width
from hashray.errors import ConfigError, CorruptArtifact, InputError, perhaps
from hashray.index.attributes import attributes_bytes
from hashray.index.gpu import GpuCodes
from hashray.index.ids import check_unique, ids_bytes
from hashray.index.lists import INT_MAX, Lists
from hashray.index.stored import codes_at, stored_codes
from hashray.index.version import Folder, ShardRecord, write_content
from hashray.storage import Store

try:
    import faiss
except ModuleNotFoundError as missing:
    raise InputError("faiss is not installed: pip install 'hashray[cpu]', or 'hashray[gpu]' on a GPU node") from missing

Kind = Literal["flat", "ivf"]
KINDS: tuple[str, ...] = get_args(Kind)

# The widths FAISS has its own code for. Flat, 500k codes, k = 100, 16 queries on one thread, ms: 8 bits 27, 16 29,
# 24 29, 32 7, 48 30, 56 33, 64 7, 96 29, 128 9, 136 27, 160 11, 192 27, 256 10, 320 28, 384 31, 512 14.
FAST_WIDTHS = (32, 64, 128, 160, 256, 512)
ROWS_PER_SHARD = 5_000_000  # Flat answers 5M rows of 64 bits in some 4 ms; IVF pays above that
POINTS_PER_LIST = 39  # FAISS's own minimum for k-means; below it warns
SAMPLE_PER_LIST = 64
# 1M clustered 64-bit codes, 1,000 lists: distance-recall at 100 with nprobe 4 .990-.997, 8 .994-.9995, 16 1.0, at
# .035 ms a query against .87 for flat. With 4,000 lists nprobe 16 gives .992 and training takes 12 times as long.
NPROBE = 16
COUNTING_BYTES = 64 << 20
QUERIES_AT_ONCE = 32  # IndexBinaryFlat's own batch
FEW = 0.125  # of the rows: their codes are copied, since FAISS's selector costs 1.6 to 8 times a search of all rows
MORE, ROUNDS = 16, 3  # rows beyond k that a search among most rows asks for, and how often it asks for more


def check_kind(kind: str) -> str:
    """Return `kind` when this hashray can build and search it.

    Raises:
        ConfigError: it cannot; the text lists the kinds it can.
    """
    if kind not in KINDS:
        raise ConfigError(f"index kind {kind!r} is not built by this hashray{perhaps(kind, KINDS)}; use flat or ivf")
    return kind


def shard_bits(num_bits: int) -> int:
    """Return the width codes have inside a shard: zero bits up to one FAISS is fast at, distances unchanged.

    Above 512 bits FAISS has one slow path for all widths: whole 64-bit words.

    >>> [shard_bits(bits) for bits in (8, 24, 32, 48, 96, 136, 192, 520)]
    [32, 32, 32, 64, 128, 160, 256, 576]
    """
    check_num_bits(num_bits)
    return next((width for width in FAST_WIDTHS if width >= num_bits), -(-num_bits // 64) * 64)


def default_nlist(rows: int) -> int:
    """Return the number of lists of an IVF shard: sqrt(rows), at most one for 39 rows.

    >>> default_nlist(1_000_000), default_nlist(100), default_nlist(1)
    (1000, 2, 1)
    """
    return max(1, min(round(math.sqrt(rows)), rows // POINTS_PER_LIST))


@contextmanager
def omp_threads(count: int) -> Iterator[None]:
    """Let FAISS use `count` OpenMP threads in here. The setting is of the calling thread alone."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def train_quantizer(sample: Codes, nlist: int, seed: int = 0) -> bytes:
    """Train the coarse quantizer that all IVF shards of an index share.

    Args:
        sample: packed codes uint8 [n, num_bits // 8], drawn from all rows.
        nlist: number of lists; at least 39 rows of the sample each.

    Returns:
        A serialised empty IVF index; `build_shard` adds rows to a copy. One thread gives the same bytes every time.

    Raises:
        ConfigError: the sample is too small for `nlist`.
    """
    codes = as_codes(sample)
    if nlist < 1 or (nlist > 1 and len(codes) < nlist * POINTS_PER_LIST):
        most = max(1, len(codes) // POINTS_PER_LIST)
        raise ConfigError(
            f"nlist = {nlist} needs {POINTS_PER_LIST} rows a list to train on, there are {len(codes):,}; "
            f"use 1 to {most}"
        )
    width = shard_bits(codes.shape[1] * 8)
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(width), width, nlist)
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1
    with omp_threads(1):
        index.train(pad_width(codes, width // 8))
    return faiss.serialize_index_binary(index).tobytes()


def build_shard(codes: Codes, kind: str, quantizer: bytes | None = None) -> bytes:
    """Serialise the FAISS index of packed codes uint8 [n, num_bits // 8], n >= 1; row i gets the number i.

    Args:
        quantizer: what `train_quantizer` gave; for "ivf" only.

    Raises:
        ConfigError: a kind that is not built.
    """
    width = shard_bits(as_codes(codes).shape[1] * 8)
    if check_kind(kind) == "flat":
        index: Any = faiss.IndexBinaryFlat(width)
    else:
        assert quantizer is not None, "an IVF shard needs the quantizer that all shards share"
        index = faiss.deserialize_index_binary(np.frombuffer(quantizer, np.uint8))
    with omp_threads(1):
        index.add(pad_width(codes, width // 8))
    return faiss.serialize_index_binary(index).tobytes()


class Shard:
    """An open shard. Searches from any number of threads; each uses the one thread that calls."""

    def __init__(self, index: Any, kind: str, num_bits: int, nprobe: int | None = None, gpu: bool = False) -> None:
        self._index, self.kind, self.num_bits = index, kind, num_bits
        self._gpu = GpuCodes(index) if gpu else None
        self.rows = int(index.ntotal)
        self._few: WeakKeyDictionary[Bitmap, Any] = WeakKeyDictionary()  # the codes of few allowed rows, as an index
        self._lists = Lists(index, nprobe) if kind == "ivf" else None

    def search(
        self, codes: Codes, k: int, allowed: Bitmap | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the k nearest rows of each query, in ascending (distance, position).

        Args:
            codes: packed codes uint8 [n, num_bits // 8].
            allowed: the rows to search among; unset: all.

        Returns:
            distances int32 [n, k] and positions int64 [n, k]; where there are fewer rows, distance 2**31 - 1 and
            position -1. Exact, ties at the end too: of all rows for flat, of those in the lists probed for ivf.
        """
        queries = self._padded(codes)
        with omp_threads(1):
            if allowed is not None and allowed.count == 0:
                return np.full((len(queries), k), INT_MAX, np.int32), np.full((len(queries), k), -1, np.int64)
            if self._lists is not None:
                return self._lists.search(queries, k, allowed)
            if allowed is None:
                return self._nearest(queries, k)
            if allowed.count <= self.rows * FEW:
                return self._search_few(queries, k, allowed)
            return self._search_most(queries, k, allowed)

    def within(
        self, codes: Codes, distance: int, allowed: Bitmap | None = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Return all rows at most `distance` bits away from each query: distances and positions, in this order.

        Of an ivf shard, all of them in the lists probed.
        """
        queries, answers = self._padded(codes), []
        with omp_threads(1):
            if self._lists is not None:
                ranges = self._lists.within(queries, distance)
            else:
                ranges = self._index.range_search(queries, distance + 1)
        limits, distances, positions = ranges
        for start, end in pairwise(limits.tolist()):
            near, places = distances[start:end].astype(np.int32), positions[start:end]
            if allowed is not None:
                kept = allowed.contains(places)
                near, places = near[kept], places[kept]
            order = np.lexsort((places, near))
            answers.append((near[order], places[order]))
        return answers

    def codes(self) -> Codes:
        """The packed codes uint8 [rows, num_bits // 8] of all rows; of a flat shard a view of its file."""
        return stored_codes(self._index, self.kind)[:, : self.num_bits // 8]

    def codes_at(self, positions: NDArray[np.int64], near: Codes | None = None) -> Codes:
        """The packed codes uint8 [n, num_bits // 8] of rows int64 [n].

        Args:
            near: packed codes uint8 [m, num_bits // 8] of the queries that these rows answer. An ivf shard looks into
                the lists they probe; unset, into all lists.
        """
        lists = None
        if self._lists is not None and near is not None:
            lists = np.unique(self._lists.probed(self._padded(near))[1])
        return codes_at(self._index, self.kind, positions, lists)[:, : self.num_bits // 8]

    def _padded(self, codes: Codes) -> Codes:
        width = self._index.d // 8
        return np.ascontiguousarray(codes if codes.shape[1] == width else pad_width(codes, width))

    def _nearest(self, queries: Codes, k: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The k nearest of all rows of a flat shard: from the GPU, where its answer is sure."""
        if self._gpu is None:
            return _nearest(self._index, queries, k)
        distances, positions, sure = self._gpu.search(queries, k)
        if not sure.all():
            distances[~sure], positions[~sure] = _nearest(self._index, queries[~sure], k)
        return distances, positions

    def _search_few(self, queries: Codes, k: int, allowed: Bitmap) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Search the codes of the allowed rows alone, copied out of the shard once."""
        if (kept := self._few.get(allowed)) is None:
            few, places = faiss.IndexBinaryFlat(self._index.d), allowed.positions()
            few.add(np.ascontiguousarray(codes_at(self._index, "flat", places)))
            kept = self._few[allowed] = (few, places)
        distances, positions = _nearest(kept[0], queries, k)
        return distances, np.where(positions < 0, -1, kept[1][positions])

    def _search_most(self, queries: Codes, k: int, allowed: Bitmap) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Search all rows for more than k, and again for the queries with fewer than k allowed ones among them."""
        distances = np.full((len(queries), k), INT_MAX, np.int32)
        positions = np.full((len(queries), k), -1, np.int64)
        left, number = np.arange(len(queries)), k + MORE + 2 * k * (self.rows - allowed.count) // allowed.count
        for _ in range(ROUNDS):
            number = min(number, self.rows)
            near, places = self._nearest(queries[left], number)
            kept = allowed.contains(places)
            enough = (kept.sum(1) >= k) | (number == self.rows)
            first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
            good = np.take_along_axis(kept, first, 1)
            rows = left[enough]
            width = first.shape[1]
            distances[rows, :width] = np.where(good, np.take_along_axis(near, first, 1), INT_MAX)[enough]
            positions[rows, :width] = np.where(good, np.take_along_axis(places, first, 1), -1)[enough]
            left, number = left[~enough], 4 * number
            if not len(left):
                return distances, positions
        # FAISS looks at a bit for each row: 2 to 8 times as slow, but once.
        selector = faiss.IDSelectorBitmap(len(allowed.bits), faiss.swig_ptr(allowed.bits))
        distances[left], positions[left] = self._index.search(
            queries[left],
            k,
            params=faiss.SearchParameters(sel=selector),  # type: ignore[call-arg]  # FAISS's own wrapper takes fields
        )
        return distances, positions


def _nearest(index: Any, queries: Codes, k: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The k nearest rows in a flat index."""
    # Counting beats the heap (54 ms against 74 at k = 100, 61 against 100 at 1,000) while its tables fit.
    # Both give the same answer, so it does not matter whose setting a search in another thread sees.
    table = (index.d + 1) * k * 8 * min(QUERIES_AT_ONCE, max(1, len(queries)))
    index.use_heap = table > COUNTING_BYTES
    return index.search(queries, k)


def open_shard(
    path: str | Path, kind: str, num_bits: int, rows: int, nprobe: int | None = None, gpu: bool = False
) -> Shard:
    """Open a shard's file, whose sha256 the caller has verified, mapped into memory: its pages load when used.

    Args:
        gpu: copy the codes of a flat shard to the GPU, and search there.

    Raises:
        CorruptArtifact: FAISS cannot read it, or it does not hold `rows` codes of this width.
    """
    check_kind(kind)
    try:
        # IFC maps both kinds; plain IO_FLAG_MMAP does not map Flat.
        index = faiss.read_index_binary(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise CorruptArtifact(f"{path} is no FAISS binary index: {error}") from error
    if index.d != shard_bits(num_bits) or index.ntotal != rows:
        raise CorruptArtifact(
            f"{path} holds {index.ntotal:,} codes of {index.d} bits, "
            f"its version says {rows:,} of {shard_bits(num_bits)}"
        )
    return Shard(index, kind, num_bits, nprobe if kind == "ivf" else None, gpu)


def write_shard(
    store: Store,
    ids: pa.Array,
    codes: Codes,
    kind: str,
    quantizer: bytes | None = None,
    attributes: pa.Table | None = None,
    generation: int = 0,
) -> ShardRecord:
    """Sort rows by id and write a shard's files under the names of their content.

    Args:
        ids: text [n], n >= 1, in any order, no null.
        codes: packed codes uint8 [n, num_bits // 8].
        attributes: columns [n].
        generation: of the version that the files are written for.

    Raises:
        InputError: an id stands in two rows.
    """
    order = pc.sort_indices(ids)
    attributes = None if attributes is None else attributes.take(order)
    return write_sorted(store, ids.take(order), codes[order.to_numpy()], kind, quantizer, attributes, generation)


def write_sorted(
    store: Store,
    ids: pa.Array,
    codes: Codes,
    kind: str,
    quantizer: bytes | None = None,
    attributes: pa.Table | None = None,
    generation: int = 0,
) -> ShardRecord:
    """Write a shard's files, of ids that ascend; as `write_shard`."""
    check_unique(ids)
    contents: dict[Folder, Any] = {"shards": build_shard(codes, kind, quantizer), "ids": ids_bytes(ids)}
    if attributes is not None:
        contents["attributes"] = attributes_bytes(attributes)
    files = {folder: write_content(store, folder, data, len(ids), generation) for folder, data in contents.items()}
    if attributes is not None:
        types = {"columns": {field.name: str(field.type) for field in attributes.schema}}
        files["attributes"] = files["attributes"].model_copy(update={"info": types})
    first, last = ids[0].as_py(), ids[-1].as_py()
    return ShardRecord(
        rows=len(ids), first=first, last=last,
        codes=files["shards"], ids=files["ids"], attributes=files.get("attributes"),
    )  # fmt: skip
