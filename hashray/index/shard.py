"""One FAISS binary shard: build, serialise, open, search. No Ray.

A shard is two files named by their content: shards/<sha256>.faiss and ids/<sha256>.arrow. Rows ascend
by id (by UTF-8 bytes, as Python compares text), and a row's place is its number inside FAISS, so the ids stay
outside. FAISS loads a flipped bit silently, so a shard's sha256 is verified before it is opened.
FAISS hangs in a forked child: start processes by spawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hashray import __version__, artifact
from hashray.artifact import FileRecord, Manifest, sha256_hex
from hashray.codes import BIT_ORDER, Codes, as_codes, check_num_bits, pad_width
from hashray.errors import ConfigError, CorruptArtifact, InputError, perhaps
from hashray.index.ids import check_unique, ids_bytes
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
POINTS_PER_LIST = 39  # FAISS's own minimum for k-means; below it warns
SAMPLE_PER_LIST = 64
# 1M clustered 64-bit codes, 1,000 lists: distance-recall at 100 with nprobe 4 .990-.997, 8 .994-.9995, 16 1.0, at
# .035 ms a query against .87 for flat. With 4,000 lists nprobe 16 gives .992 and training takes 12 times as long.
NPROBE = 16
COUNTING_BYTES = 64 << 20
QUERIES_AT_ONCE = 32  # IndexBinaryFlat's own batch
BOUND_LISTS = 8  # one in eight of the probed lists says how far the k-th row is at most
POSITION_BITS = 44
INT_MAX = np.iinfo(np.int32).max


class ShardInfo(BaseModel):
    """One shard of a version: its two files, its rows, its first and last id."""

    model_config = ConfigDict(frozen=True)

    shard: str
    ids: str
    rows: int
    first: str
    last: str


class WrittenShard(BaseModel):
    """A shard that was written: its info and the records of its two files."""

    model_config = ConfigDict(frozen=True)

    info: ShardInfo
    files: tuple[FileRecord, FileRecord]


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

    def __init__(self, index: Any, kind: str, num_bits: int, nprobe: int | None = None) -> None:
        self._index, self.kind, self.num_bits = index, kind, num_bits
        self.rows = int(index.ntotal)
        if kind == "ivf":
            self._lists = faiss.downcast_IndexBinary(index.quantizer)
            # FAISS takes it from here, and from nowhere else.
            index.nprobe = min(nprobe or index.nprobe, index.nlist)

    def search(self, codes: Codes, k: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the k nearest rows of each query, in ascending (distance, position).

        Args:
            codes: packed codes uint8 [n, num_bits // 8].

        Returns:
            distances int32 [n, k] and positions int64 [n, k]; where there are fewer rows, distance 2**31 - 1 and
            position -1. Exact, ties at the end too: of all rows for flat, of those in the lists probed for ivf.
        """
        width = self._index.d // 8
        queries = np.ascontiguousarray(codes if codes.shape[1] == width else pad_width(codes, width))
        with omp_threads(1):
            if self.kind == "ivf":
                return self._search_lists(queries, k)
            # Counting beats the heap (54 ms against 74 at k = 100, 61 against 100 at 1,000) while its tables fit.
            # Both give the same answer, so it does not matter whose setting a search in another thread sees.
            table = (self._index.d + 1) * k * 8 * min(QUERIES_AT_ONCE, max(1, len(queries)))
            self._index.use_heap = table > COUNTING_BYTES
            return self._index.search(queries, k)

    def _search_lists(self, queries: Codes, k: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Search the probed lists of an IVF index.

        FAISS's own search keeps any of the rows at the k-th distance. Its range search gives all rows up to a distance:
        the k-th in the nearest of the lists is never below the k-th in all of them.
        """
        distances = np.full((len(queries), k), INT_MAX, np.int32)
        positions = np.full((len(queries), k), -1, np.int64)
        if not len(queries):
            return distances, positions
        away, lists = self._lists.search(queries, self._index.nprobe)
        nearest = lists.copy()
        nearest[:, max(1, lists.shape[1] // BOUND_LISTS) :] = -1
        bounds, _ = self._index.search_preassigned(queries, k, nearest, away)
        for query, bound in enumerate(np.minimum(bounds[:, -1], self._index.d)):
            rows = slice(query, query + 1)
            _, near, places = self._index.range_search_preassigned(
                queries[rows], int(bound) + 1, lists[rows], away[rows]
            )
            keys = (near.astype(np.int64) << POSITION_BITS) | places
            if len(keys) > k:
                keys = np.partition(keys, k - 1)[:k]
            keys.sort()
            distances[query, : len(keys)] = keys >> POSITION_BITS
            positions[query, : len(keys)] = keys & ((1 << POSITION_BITS) - 1)
        return distances, positions


def open_shard(path: str | Path, kind: str, num_bits: int, rows: int, nprobe: int | None = None) -> Shard:
    """Open a shard's file, whose sha256 the caller has verified, mapped into memory: its pages load when used.

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
    return Shard(index, kind, num_bits, nprobe if kind == "ivf" else None)


def write_shard(store: Store, ids: pa.Array, codes: Codes, kind: str, quantizer: bytes | None = None) -> WrittenShard:
    """Sort rows by id and write a shard's two files under the names of their content.

    Args:
        ids: text [n], n >= 1, in any order, no null.
        codes: packed codes uint8 [n, num_bits // 8].

    Raises:
        InputError: an id stands in two rows.
    """
    order = pc.sort_indices(ids)
    return write_sorted(store, ids.take(order), codes[order.to_numpy()], kind, quantizer)


def write_sorted(store: Store, ids: pa.Array, codes: Codes, kind: str, quantizer: bytes | None = None) -> WrittenShard:
    """Write a shard's two files, of ids that ascend; as `write_shard`."""
    check_unique(ids)
    codes_file = _write(store, "shards/{}.faiss", build_shard(codes, kind, quantizer), len(ids))
    ids_file = _write(store, "ids/{}.arrow", ids_bytes(ids), len(ids))
    info = ShardInfo(
        shard=codes_file.name, ids=ids_file.name, rows=len(ids), first=ids[0].as_py(), last=ids[-1].as_py()
    )  # fmt: skip
    return WrittenShard(info=info, files=(codes_file, ids_file))


def _write(store: Store, name: str, data: Any, rows: int) -> FileRecord:
    return artifact.write_file(store, name.format(sha256_hex(data)), data, rows=rows)


def index_manifest(
    codes: Manifest,
    shards: Sequence[WrittenShard],
    kind: str,
    config: Mapping[str, Any],
    quantizer: FileRecord | None = None,
    info: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of an index of these codes: shards in ascending order of their first id.

    Args:
        quantizer: the file of the quantizer all shards share, for "ivf".
        info: more to say in `info`, nprobe for one.
    """
    ordered = sorted(shards, key=lambda shard: shard.info.first)
    # Two shards whose codes are equal, row by row, are one file.
    files = {record.name: record for shard in ordered for record in shard.files}
    num_bits = int(codes.info["num_bits"])
    facts = {"num_bits": num_bits, "kind": kind, "nprobe": None, "quantizer": quantizer and quantizer.name}
    return Manifest(
        kind="index",
        project_version=__version__,
        config=dict(config),
        parents={"codes": codes.id} | {name: value for name, value in codes.parents.items() if name == "model"},
        columns={"id": "string", "code": f"fixed_size_binary[{num_bits // 8}]"},
        bit_order=BIT_ORDER,
        fingerprint=codes.fingerprint,
        rows_in=codes.rows_out,
        rows_out=sum(shard.info.rows for shard in ordered),
        rows_quarantined=0,
        files=(*files.values(), *([quantizer] if quantizer else [])),
        info={**facts, **dict(info or {}), "shards": [shard.info.model_dump() for shard in ordered]},
    )
