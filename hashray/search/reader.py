"""An index opened for searching in this process: `open_index(url).search(codes, k)`. No Ray.

A local index is read in place. Files of one on S3 are kept under $HASHRAY_CACHE (default ~/.cache/hashray) by their
sha256; nothing is ever evicted, and any file there may be deleted. Whatever their place, all bytes are verified
before they are used; a file that has not changed since is not read again (`storage/cache.py`). Codes and ids are
mapped, not read: a search touches all codes (of the lists probed), and the ids of its answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hashray import artifact
from hashray.artifact import FileRecord, Manifest
from hashray.codes import Codes, as_codes
from hashray.errors import InputError, MismatchError
from hashray.index.ids import MappedIds
from hashray.index.shard import Shard, ShardInfo, check_kind, open_shard
from hashray.progress import Bar
from hashray.search.merge import merge
from hashray.storage import Store, join, open_store
from hashray.storage.cache import recorded_path, verified_path

OPEN_THREADS = 8
# Candidates (a distance and a position: 12 bytes) that one round of a search holds before they are merged.
ROUND_CANDIDATES = 4 << 20
FEWEST_QUERIES = 32  # FAISS shares one scan of the codes among these


class Index:
    """An open version of an index. Safe to search from several threads; open a new one in each process."""

    def __init__(
        self, manifest: Manifest, version: int, shards: Sequence[tuple[Shard, MappedIds]], ascending: bool, threads: int
    ) -> None:
        """Take the open shards; `ascending`: every id of each is below every one of the next."""
        self.manifest, self.version, self.threads = manifest, version, threads
        self._shards, self._ids = [shard for shard, _ in shards], [ids for _, ids in shards]
        self._ascending = ascending
        self._pool = ThreadPoolExecutor(threads, "hashray-search") if threads > 1 else None

    @property
    def num_bits(self) -> int:
        """Width of the codes."""
        return int(self.manifest.info["num_bits"])

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(shard.rows for shard in self._shards)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the model that made the codes."""
        return self.manifest.fingerprint

    def __repr__(self) -> str:
        return f"Index(version={self.version}, rows={self.rows}, num_bits={self.num_bits}, shards={len(self._shards)})"

    def search(self, codes: Codes, k: int) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
        """Return the k nearest rows of each query: ascending distance, ties by ascending id.

        Args:
            codes: packed codes uint8 [n, num_bits // 8]. Those of `model.encode` carry their model, and another
                model's are refused; a plain array is taken as it is.
            k: neighbours a query, at least 1.

        Returns:
            ids object [n, k] of str, None where there are fewer than k rows (or an IVF index probed fewer), and
            distances int32 [n, k] in bits, -1 there. Of a flat index the answer is exact, of an IVF index it is among
            the rows of the lists probed.

        Raises:
            MismatchError: codes of another width or of another model. InputError: k is less than 1.
        """
        self._check(codes, k)
        queries, most = as_codes(codes), min(k, self.rows)
        ids = np.full((len(queries), k), None, dtype=object)
        distances = np.full((len(queries), k), -1, dtype=np.int32)
        if not most:
            return ids, distances
        step = max(FEWEST_QUERIES * self.threads, ROUND_CANDIDATES // (len(self._shards) * most))
        for start in range(0, len(queries), step):
            place = (slice(start, start + step), slice(0, most))
            ids[place], distances[place] = self._nearest(queries[start : start + step], most)
        return ids, distances

    def _check(self, codes: Any, k: int) -> None:
        if k < 1:
            raise InputError(f"k = {k}: ask for at least 1 neighbour")
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

    def _nearest(self, queries: Codes, k: int) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
        """Ids and distances [n, k] over all shards."""
        # Python threads over shards, FAISS in each with one: OpenMP's own threads spin when the machine is busy
        # (2 of them were 6 times slower than 1). With fewer shards than threads the queries are shared out too.
        shares = 1 if self._pool is None else min(len(queries), -(-self.threads // len(self._shards)))
        cuts = [len(queries) * i // shares for i in range(shares + 1)]
        jobs = [(n, slice(a, b)) for n in range(len(self._shards)) for a, b in pairwise(cuts)]
        distances = np.empty((len(self._shards), len(queries), k), np.int32)
        positions = np.empty(distances.shape, np.int64)

        def run(job: tuple[int, slice]) -> None:
            number, rows = job
            distances[number, rows], positions[number, rows] = self._shards[number].search(queries[rows], k)

        for _ in map(run, jobs) if self._pool is None else self._pool.map(run, jobs):
            pass
        merged = merge(distances, positions, self._lookup, self._ascending)
        for ids in self._ids:
            ids.release()
        return merged

    def _lookup(self, shards: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.object_]:
        """The ids object [m] of rows, given the shard int64 [m] and the position int64 [m] of each."""
        out = np.empty(len(shards), dtype=object)
        order = np.argsort(shards, kind="stable")
        starts = np.searchsorted(shards[order], np.arange(len(self._ids) + 1))
        for ids, (start, end) in zip(self._ids, pairwise(starts.tolist()), strict=True):
            if end > start:
                out[order[start:end]] = np.array(ids.take(positions[order[start:end]]), dtype=object)
        return out


def open_index(
    url: str | Path,
    endpoint_url: str | None = None,
    version: int | None = None,
    cache_dir: str | Path | None = None,
    threads: int | None = None,
) -> Index:
    """Open an index at its newest version, or at `version`; every byte is verified first.

    Args:
        url: a local folder or s3://bucket/prefix.
        endpoint_url: of an S3 server other than AWS; unset: AWS_ENDPOINT_URL.
        version: unset: the newest there is now.
        cache_dir: where files from S3 are kept; unset: $HASHRAY_CACHE, else ~/.cache/hashray.
        threads: that share a search; unset: as many as OpenMP would take (OMP_NUM_THREADS, which Ray sets to a
            worker's CPUs, else the cores).

    Raises:
        InputError: no index, or no such version, is there. MismatchError: another artifact, or a newer hashray's.
        CorruptArtifact: a file is missing, or is not what was published.
    """
    store = open_store(url, endpoint_url)
    number, manifest = _load(store, version)
    if threads is not None and threads < 1:
        raise InputError(f"threads = {threads}: a search needs at least 1")
    kind = check_kind(manifest.info["kind"])
    infos = sorted((ShardInfo.model_validate(info) for info in manifest.info["shards"]), key=lambda info: info.first)
    if any(info.ids.endswith(".parquet") for info in infos):
        raise MismatchError(f"{store.url} was built by an older hashray; run `hashray index build` again, elsewhere")
    cache = Path(cache_dir or os.environ.get("HASHRAY_CACHE") or "~/.cache/hashray").expanduser()
    records = [manifest.record(name) for info in infos for name in (info.shard, info.ids)]
    paths = _verified(store, records, cache)
    num_bits, nprobe = int(manifest.info["num_bits"]), manifest.info["nprobe"]
    shards = [
        (open_shard(codes, kind, num_bits, info.rows, nprobe), MappedIds(ids, info.rows))
        for codes, ids, info in zip(paths[::2], paths[1::2], infos, strict=True)
    ]
    ascending = all(before.last < info.first for before, info in pairwise(infos))
    return Index(manifest, number, shards, ascending, threads or faiss.omp_get_max_threads())


def _verified(store: Store, records: Sequence[FileRecord], cache: Path) -> list[Path]:
    """Local paths of the files; a bar shows the bytes that have to be fetched or verified first."""
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        paths = list(pool.map(lambda r: recorded_path(store, r.name, r.bytes, r.sha256, cache), records))
        left = {r.name: r for r, path in zip(records, paths, strict=True) if path is None}
        verified: dict[str, Path] = {}
        if left:
            with Bar("verify index", sum(r.bytes for r in left.values()), "bytes") as bar:
                read = lambda r: verified_path(store, r.name, r.bytes, r.sha256, cache, bar.add)  # noqa: E731
                verified = dict(zip(left, pool.map(read, left.values()), strict=True))
        return [path or verified[r.name] for r, path in zip(records, paths, strict=True)]


def _load(store: Store, version: int | None) -> tuple[int, Manifest]:
    if version is None:
        number, manifest = _newest(store)
    else:
        key = artifact.version_key(version)
        if version < 1 or not store.exists(key):
            newest = _newest(store)[0]
            raise InputError(f"{join(store.url, key)} is not there: the newest version is {newest}")
        number, manifest = version, artifact.load_manifest(store, "index", key)
    return number, manifest


def _newest(store: Store) -> tuple[int, Manifest]:
    if not store.exists(artifact.version_key(1)):
        artifact.load_manifest(store, "index")  # another artifact, or nothing: says which
    return artifact.newest_version(store)
