"""An index opened for searching in this process: `open_index(url).search(codes, k)`. No Ray.

A local index is read in place. Files of one on S3 are kept under $HASHRAY_CACHE (default ~/.cache/hashray) by their
sha256; nothing is ever evicted, and any file there may be deleted. Whatever their place, all bytes are verified
before they are used; a file that has not changed since is not read again (`storage/cache.py`). Codes and ids are
mapped, not read: a search touches all codes (of the lists probed), and the ids of its answer.
"""

from __future__ import annotations

import operator
import pickle
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray import artifact
from hashray.artifact import FileRecord, Manifest
from hashray.artifact.bitmap import Bitmap
from hashray.codes import Codes, as_codes
from hashray.errors import CorruptArtifact, InputError, MismatchError
from hashray.index.attributes import completed, joined_schema, open_attributes
from hashray.index.filters import Filter
from hashray.index.gpu import require_gpu
from hashray.index.ids import MappedIds
from hashray.index.log import Version, newest, read_version, require_kept
from hashray.index.shard import Shard, check_kind, open_shard
from hashray.progress import Bar
from hashray.search.merge import merge
from hashray.storage import Store, open_store
from hashray.storage.cache import cache_folder, recorded_path, verified_path

OPEN_THREADS = 8
# Candidates (a distance and a position: 12 bytes) that one round of a search holds before they are merged.
ROUND_CANDIDATES = 4 << 20
FEWEST_QUERIES = 32  # FAISS shares one scan of the codes among these
WITHIN_QUERIES = 64
MOST_ANSWERS = 1 << 30  # 12 GiB of ids and distances
FILTERS = 8  # filters whose rows are kept: a bit a row, and the codes of those that keep few rows


@dataclass(frozen=True)
class Piece:
    """An open shard: its codes, its ids, its living rows (None: all), and its attributes, if it has any."""

    shard: Shard
    ids: MappedIds
    living: Bitmap | None = None
    attributes: pa.Table | None = None


class Index:
    """An open version of an index. Safe to search from several threads; open a new one in each process."""

    def __init__(
        self, manifest: Manifest, version: int, pieces: Sequence[Piece], ascending: bool, threads: int
    ) -> None:
        """Take the open shards; `ascending`: every id of each is below every one of the next."""
        self.manifest, self.version, self.threads = manifest, version, threads
        self.pieces = pieces
        self.schema: pa.Schema | None = None  # of attributes; unset: of the shards that are open here
        self._ascending = ascending
        self._filtered: OrderedDict[str | bytes, list[Bitmap]] = (
            OrderedDict()
        )  # the rows of the filters that were asked last
        self._pool = ThreadPoolExecutor(threads, "hashray-search") if threads > 1 else None

    @property
    def num_bits(self) -> int:
        """Width of the codes."""
        return int(self.manifest.info["num_bits"])

    @property
    def rows(self) -> int:
        """The number of rows, without deleted ones."""
        return sum(piece.shard.rows if piece.living is None else piece.living.count for piece in self.pieces)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the model that made the codes."""
        return self.manifest.fingerprint

    def __repr__(self) -> str:
        return f"Index(version={self.version}, rows={self.rows}, num_bits={self.num_bits}, shards={len(self.pieces)})"

    def search(
        self, codes: Codes, k: int, where: str | pc.Expression | None = None
    ) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
        """Return the k nearest rows of each query: ascending distance, ties by ascending id.

        Args:
            codes: packed codes uint8 [n, num_bits // 8]. Those of `model.encode` carry their model, and another
                model's are refused; a plain array is taken as it is.
            k: neighbours a query, at least 1.
            where: only rows for which this is true, an expression over their attributes (index/filters.py).

        Returns:
            ids object [n, k] of str, None where there are fewer than k rows (or an IVF index probed fewer), and
            distances int32 [n, k] in bits, -1 there. Of a flat index the answer is exact, of an IVF index it is among
            the rows of the lists probed.

        Raises:
            MismatchError: codes of another width or of another model. InputError: k is less than 1, or `where` cannot
                be answered.
        """
        self._check(codes)
        k = _whole(k, "k")
        if k < 1:
            raise InputError(f"k = {k}: ask for at least 1 neighbour")
        queries, allowed = as_codes(codes), self._allowed(where)
        if len(queries) * k > MOST_ANSWERS:
            raise InputError(
                f"{len(queries):,} queries and k = {k:,}: ask for {MOST_ANSWERS:,} answers or fewer at a time"
            )
        most = min(
            k, sum(piece.shard.rows if a is None else a.count for piece, a in zip(self.pieces, allowed, strict=True))
        )
        ids = np.full((len(queries), k), None, dtype=object)
        distances = np.full((len(queries), k), -1, dtype=np.int32)
        if not most:
            return ids, distances
        step = max(FEWEST_QUERIES * self.threads, ROUND_CANDIDATES // (len(self.pieces) * most))
        for start in range(0, len(queries), step):
            place = (slice(start, start + step), slice(0, most))
            ids[place], distances[place] = self._nearest(queries[start : start + step], most, allowed)
        return ids, distances

    def within(
        self, codes: Codes, distance: int, where: str | pc.Expression | None = None
    ) -> tuple[list[NDArray[np.object_]], list[NDArray[np.int32]]]:
        """Return all rows at most `distance` bits away from each query: ascending distance, ties by ascending id.

        Args:
            codes: packed codes uint8 [n, num_bits // 8], as for `search`.
            distance: bits, 0 or more. The answers of a large one are the whole index: memory is theirs.
            where: as for `search`.

        Returns:
            For each query, ids object [m] of str and distances int32 [m]. Of a flat index exact, of an IVF index all
            such rows in the lists probed.

        Raises:
            As `search`; InputError: `distance` is negative.
        """
        self._check(codes)
        distance = _whole(distance, "distance")
        if distance < 0:
            raise InputError(f"distance = {distance}: ask for 0 bits or more")
        queries, allowed = as_codes(codes), self._allowed(where)
        ids, distances = list[NDArray[np.object_]](), list[NDArray[np.int32]]()
        for start in range(0, len(queries), WITHIN_QUERIES):
            some = queries[start : start + WITHIN_QUERIES]
            run = lambda n: self.pieces[n].shard.within(some, min(distance, self.num_bits), allowed[n])  # noqa: E731, B023
            numbers = range(len(self.pieces))
            answers = [*(map(run, numbers) if self._pool is None else self._pool.map(run, numbers))]
            for query in range(len(some)):
                rows = [(piece.ids.take(answer[query][1]), answer[query][0])
                        for piece, answer in zip(self.pieces, answers, strict=True)]  # fmt: skip
                pairs = sorted(pair for names, near in rows for pair in zip(near.tolist(), names, strict=True))
                ids.append(np.array([name for _, name in pairs], object))
                distances.append(np.array([near for near, _ in pairs], np.int32))
            self._release()
        return ids, distances

    def _allowed(self, where: str | pc.Expression | None) -> Sequence[Bitmap | None]:
        """The rows of each shard to search among."""
        if where is None:
            return [piece.living for piece in self.pieces]
        # Not the text of an expression: Arrow leaves out the middle of long lists.
        key = where if isinstance(where, str) else pickle.dumps(where)
        if (rows := self._filtered.get(key)) is None:
            chosen = Filter(where)
            schema = self.schema or joined_schema([piece.attributes for piece in self.pieces])
            rows = [chosen.rows(completed(piece.attributes, piece.shard.rows, schema)) for piece in self.pieces]
            rows = [r if p.living is None else r & p.living for r, p in zip(rows, self.pieces, strict=True)]
            self._filtered[key] = rows
            while len(self._filtered) > FILTERS:
                self._filtered.popitem(last=False)
        return rows

    def _check(self, codes: Any) -> None:
        width = as_codes(codes).shape[1] * 8
        if width != self.num_bits:
            raise MismatchError(
                f"codes of {width} bits cannot be searched in an index of {self.num_bits} bits; "
                "encode the queries with the model the index was made with"
            )
        stamp = getattr(codes, "fingerprint", None)
        if stamp is not None and self.fingerprint is not None and stamp != self.fingerprint:
            raise MismatchError(
                f"codes of model {stamp[:12]}… cannot be searched in an index of model {self.fingerprint[:12]}…: their "
                "bits mean different things; encode the queries with the model the index was made with"
            )

    def _nearest(
        self, queries: Codes, k: int, allowed: Sequence[Bitmap | None]
    ) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
        """Ids and distances [n, k] over all shards."""
        # Python threads over shards, FAISS in each with one: OpenMP's own threads spin when the machine is busy
        # (2 of them were 6 times slower than 1). With fewer shards than threads the queries are shared out too.
        shares = 1 if self._pool is None else min(len(queries), -(-self.threads // len(self.pieces)))
        cuts = [len(queries) * i // shares for i in range(shares + 1)]
        jobs = [(n, slice(a, b)) for n in range(len(self.pieces)) for a, b in pairwise(cuts)]
        distances = np.empty((len(self.pieces), len(queries), k), np.int32)
        positions = np.empty(distances.shape, np.int64)

        def run(job: tuple[int, slice]) -> None:
            number, rows = job
            shard = self.pieces[number].shard
            distances[number, rows], positions[number, rows] = shard.search(queries[rows], k, allowed[number])

        for _ in map(run, jobs) if self._pool is None else self._pool.map(run, jobs):
            pass
        merged = merge(distances, positions, self._lookup, self._ascending)
        self._release()
        return merged

    def _release(self) -> None:
        for piece in self.pieces:
            piece.ids.release()

    def _lookup(self, shards: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.object_]:
        """The ids object [m] of rows, given the shard int64 [m] and the position int64 [m] of each."""
        out = np.empty(len(shards), dtype=object)
        order = np.argsort(shards, kind="stable")
        starts = np.searchsorted(shards[order], np.arange(len(self.pieces) + 1))
        for piece, (start, end) in zip(self.pieces, pairwise(starts.tolist()), strict=True):
            if end > start:
                out[order[start:end]] = np.array(piece.ids.take(positions[order[start:end]]), dtype=object)
        return out


def _whole(number: Any, name: str) -> int:
    """A number of any integer type, NumPy's too, as an int."""
    try:
        return operator.index(number)
    except TypeError as error:
        raise InputError(f"{name} = {number!r}: expected a whole number") from error


def open_index(
    url: str | Path,
    endpoint_url: str | None = None,
    version: int | None = None,
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    gpu: bool = False,
) -> Index:
    """Open an index at its newest version, or at `version`; every byte is verified first.

    Args:
        url: a local folder or s3://bucket/prefix.
        endpoint_url: of an S3 server other than AWS; unset: AWS_ENDPOINT_URL.
        version: unset: the newest there is now.
        cache_dir: where files from S3 are kept; unset: $HASHRAY_CACHE, else ~/.cache/hashray.
        threads: that share a search; unset: as many as OpenMP would take (OMP_NUM_THREADS, which Ray sets to a
            worker's CPUs, else the cores).
        gpu: search flat shards on the first GPU, with the same answers; each process copies the codes there.

    Raises:
        InputError: no index, or no such version, is there. MismatchError: another artifact, or a newer hashray's.
        CorruptArtifact: a file is missing, or is not what was published.
    """
    return open_version(open_store(url, endpoint_url), version, cache_folder(cache_dir), threads, gpu)


def open_version(
    store: Store,
    version: int | None,
    cache: Path,
    threads: int | None = None,
    gpu: bool = False,
    only: Collection[str] | None = None,
) -> Index:
    """Open a version of the index in a store, the newest if None; as `open_index`.

    Args:
        only: names of files of ids: just the shards that have one of them are opened.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads = {threads}: a search needs at least 1")
    head = _read_version(store, version)
    if only is not None:
        head = replace(head, shards=[shard for shard in head.shards if shard.ids.name in only])
    if gpu:
        require_gpu()
        if head.manifest.info["kind"] != "flat":
            raise InputError(f"{store.url} is an index of kind {head.manifest.info['kind']}: a GPU searches flat ones")
    while True:
        try:
            return _open(store, head, cache, threads or faiss.omp_get_max_threads(), gpu)
        except CorruptArtifact:
            last = newest(store)
            if version is None and last.number > head.number:  # garbage collection was faster than this reader
                head = last
                continue
            require_kept(store, head.number, last)
            raise


def _open(store: Store, head: Version, cache: Path, threads: int, gpu: bool) -> Index:
    info = head.manifest.info
    kind, num_bits, nprobe = check_kind(info["kind"]), int(info["num_bits"]), info["nprobe"]
    files = (*head.manifest.tables, *(file for shard in head.shards for file in shard.files))
    paths = _verified(store, {file.name: file for file in files}, cache)
    pieces = []
    for record in head.shards:
        shard = open_shard(paths[record.codes.name], kind, num_bits, record.rows, nprobe, gpu)
        dead = record.deleted and Bitmap.from_bytes(
            paths[record.deleted.name].read_bytes(), record.rows, record.deleted.rows or 0, record.deleted.name
        )
        table = record.attributes and open_attributes(paths[record.attributes.name], record.rows)
        pieces.append(Piece(shard, MappedIds(paths[record.ids.name], record.rows), ~dead if dead else None, table))
    ascending = all(before.last < after.first for before, after in pairwise(head.shards))
    return Index(head.manifest, head.number, pieces, ascending, threads)


def _read_version(store: Store, version: int | None) -> Version:
    """A version; where there is no index at all, the error says what is there."""
    if not store.exists(artifact.version_key(1)):
        artifact.load_manifest(store, "index")
    return newest(store) if version is None else read_version(store, version)


def _verified(store: Store, records: Mapping[str, FileRecord], cache: Path) -> dict[str, Path]:
    """Local paths of the files; a bar shows the bytes that have to be fetched or verified first."""
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        look = lambda r: recorded_path(store, r.name, r.bytes, r.sha256, cache)  # noqa: E731
        paths = dict(zip(records, pool.map(look, records.values()), strict=True))
        left = [record for name, record in records.items() if paths[name] is None]
        if left:
            with Bar("verify index", sum(r.bytes for r in left), "bytes") as bar:
                read = lambda r: verified_path(store, r.name, r.bytes, r.sha256, cache, bar.add)  # noqa: E731
                paths |= {r.name: path for r, path in zip(left, pool.map(read, left), strict=True)}
        return {name: path for name, path in paths.items() if path is not None}
