"""The living rows of one shard: their codes and their places. No Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hashray.artifact import FileRecord
from hashray.codes import Codes
from hashray.errors import CorruptArtifact
from hashray.index.ids import MappedIds
from hashray.index.shard import check_kind, shard_bits
from hashray.storage import Store
from hashray.storage.cache import verified_path


@dataclass(frozen=True)
class ShardFiles:
    """One shard of a version: the records of its two files, and what is needed to read them."""

    codes: FileRecord
    ids: FileRecord
    rows: int
    kind: str
    num_bits: int


@dataclass(frozen=True)
class ShardRows:
    """Living rows of a shard: positions int64 [n], ascending, and codes uint8 [n, num_bits // 8]."""

    positions: NDArray[np.int64]
    codes: Codes


def cache_folder() -> Path:
    """Where files from S3 are kept on this machine."""
    return Path(os.environ.get("HASHRAY_CACHE") or "~/.cache/hashray").expanduser()


def read_rows(store: Store, files: ShardFiles, living: NDArray[np.bool_] | None = None) -> ShardRows:
    """Read the codes of a shard, its bytes verified.

    Args:
        living: bool [rows], by position; unset: every row is living.

    Raises:
        CorruptArtifact: the file is missing, is not what was published, or does not hold its version's rows.
    """
    check_kind(files.kind)
    path = verified_path(store, files.codes.name, files.codes.bytes, files.codes.sha256, cache_folder())
    try:
        index = faiss.read_index_binary(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise CorruptArtifact(f"{path} is no FAISS binary index: {error}") from error
    if index.d != shard_bits(files.num_bits) or index.ntotal != files.rows:
        raise CorruptArtifact(f"{path} holds {index.ntotal:,} codes of {index.d} bits, its version says {files.rows:,}")
    codes = (_of_lists(index) if files.kind == "ivf" else _of_flat(index))[:, : files.num_bits // 8]
    positions = np.arange(files.rows) if living is None else np.flatnonzero(living)
    return ShardRows(positions, np.ascontiguousarray(codes) if living is None else codes[positions])


def open_ids(store: Store, files: ShardFiles) -> MappedIds:
    """Map the ids of a shard, its bytes verified."""
    return MappedIds(
        verified_path(store, files.ids.name, files.ids.bytes, files.ids.sha256, cache_folder()), files.rows
    )


def _of_flat(index: Any) -> Codes:
    flat: Any = faiss.downcast_IndexBinary(index)
    return faiss.rev_swig_ptr(flat.xb.data(), flat.ntotal * flat.code_size).reshape(flat.ntotal, -1).copy()


def _of_lists(index: Any) -> Codes:
    ivf: Any = faiss.downcast_IndexBinary(index)
    codes = np.empty((ivf.ntotal, ivf.code_size), np.uint8)
    for number in range(ivf.nlist):
        size = ivf.invlists.list_size(number)
        if size:
            places = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)
            some = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), size * ivf.code_size)
            codes[places] = some.reshape(size, -1)
    return codes
