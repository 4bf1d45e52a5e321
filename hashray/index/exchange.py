"""Codes from other programs, and for them: batches of ids, packed codes and attributes. No Ray.

*.faiss *.index *.bin   a FAISS binary index: Flat or IVF, its numbers as ids ("000000012"), or those of an IDMap
*.parquet               a column of ids and one of codes: binary, lists of bytes, or text of 0 and 1
*.npz                   arrays ids [n] and codes uint8 [n, num_bits // 8]; *.npy: the codes, beside *.ids.npy or none
*.csv *.tsv *.txt       id, then bits as text, as pgvector's `bit` is copied out: 17,0110…
*.lance                 a Lance dataset, with the columns of *.parquet (needs `pip install pylance`)
"""

from __future__ import annotations

import csv
import importlib
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.data.columns import bytes_matrix
from hashray.errors import InputError
from hashray.storage import open_store, split_url

ROWS_AT_ONCE = 1 << 18
# What the readers raise of files that hold something else, or half of it.
FAULTS = (
    pa.ArrowException, RuntimeError, ValueError, KeyError, TypeError, OverflowError, EOFError, csv.Error,
    zipfile.BadZipFile,
)  # fmt: skip
BitOrder = Literal["big", "little"]


@dataclass(frozen=True)
class Batch:
    """Some rows: ids text [n], packed codes uint8 [n, num_bits // 8], and attributes, if there are any."""

    ids: pa.Array
    codes: Codes
    attributes: pa.Table | None = None


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called, and the order of the bits in a byte."""

    id: str = "id"
    code: str = "code"
    bit_order: BitOrder = "big"


Reader = Callable[[str, Columns], Iterator[Batch]]


def read_batches(url: str, columns: Columns) -> Iterator[Batch]:
    """Read codes that another program wrote; the ending of the name says how.

    Raises:
        InputError: there is no such file, its ending is not known, or it does not hold what it should.
    """
    ending = url.rstrip("/").rpartition(".")[2].lower()
    if ending not in READERS:
        raise InputError(f"{url}: codes are read from files named {', '.join(f'*.{name}' for name in READERS)}")
    try:
        yield from READERS[ending](url, columns)
    except FAULTS as error:
        raise InputError(f"{url} cannot be read as codes: {error}") from error


def _whole(url: str) -> bytes:
    folder, name = split_url(url)
    return open_store(folder).read(name)


def _in_pieces(ids: Any, codes: Codes, columns: Columns, attributes: pa.Table | None = None) -> Iterator[Batch]:
    ids = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array([str(name) for name in ids], pa.string())
    if len(ids) != len(codes):
        raise ValueError(f"{len(ids):,} ids for {len(codes):,} codes")
    if columns.bit_order == "little":
        codes = np.packbits(np.unpackbits(codes, axis=1, bitorder="little"), axis=1)
    for start in range(0, len(codes), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        table = None if attributes is None else attributes[rows]
        some = ids[rows]
        whole = some.combine_chunks() if isinstance(some, pa.ChunkedArray) else some
        yield Batch(whole, np.ascontiguousarray(codes[rows]), table)


def numbered(count: int) -> list[str]:
    """Ids for rows that have numbers only: as text they ascend as the numbers do.

    >>> numbered(11)[-1]
    '0000000010'
    """
    return _in_digits(range(count))


def _in_digits(numbers: Iterable[int]) -> list[str]:
    return [f"{number:010d}" for number in numbers]


def _read_faiss(url: str, columns: Columns) -> Iterator[Batch]:
    whole: Any = faiss.deserialize_index_binary(np.frombuffer(_whole(url), np.uint8))  # owns what is inside it
    index = whole
    numbers: NDArray[np.int64] | None = None
    named: NDArray[np.int64] | None = None
    if isinstance(index, faiss.IndexBinaryIDMap | faiss.IndexBinaryIDMap2):
        named, index = faiss.vector_to_array(whole.id_map), faiss.downcast_IndexBinary(index.index)
    if isinstance(index, faiss.IndexBinaryIVF):
        lists, width = index.invlists, index.d // 8
        pieces = [
            (faiss.rev_swig_ptr(lists.get_ids(n), size).copy(),
             faiss.rev_swig_ptr(lists.get_codes(n), size * width).reshape(size, width).copy())
            for n in range(index.nlist) if (size := lists.list_size(n))
        ]  # fmt: skip
        places = np.concatenate([np.empty(0, np.int64), *(some for some, _ in pieces)])
        codes = np.concatenate([np.empty((0, width), np.uint8), *(some for _, some in pieces)])
        numbers, codes = np.sort(places), codes[np.argsort(places, kind="stable")]
    elif isinstance(index, faiss.IndexBinaryFlat):
        data: Any = index
        codes = faiss.vector_to_array(data.xb).reshape(index.ntotal, index.d // 8)
    else:
        raise ValueError(f"{type(index).__name__} is not read: write its codes as IndexBinaryFlat or IndexBinaryIVF")
    if named is not None:  # by the numbers inside
        numbers = named if numbers is None else named[numbers]
    ids = numbered(len(codes)) if numbers is None else _in_digits(numbers.tolist())
    yield from _in_pieces(ids, codes, columns)


def _read_npz(url: str, columns: Columns) -> Iterator[Batch]:
    with np.load(io.BytesIO(_whole(url)), allow_pickle=False) as arrays:
        codes = _as_matrix(arrays["codes"])
        ids = _as_names(arrays["ids"]) if "ids" in arrays else numbered(len(codes))
    yield from _in_pieces(ids, codes, columns)


def _read_npy(url: str, columns: Columns) -> Iterator[Batch]:
    codes = _as_matrix(np.load(io.BytesIO(_whole(url)), allow_pickle=False))
    beside = f"{url.rpartition('.')[0]}.ids.npy"
    folder, name = split_url(beside)
    there = open_store(folder).exists(name)
    ids = _as_names(np.load(io.BytesIO(_whole(beside)), allow_pickle=False)) if there else numbered(len(codes))
    yield from _in_pieces(ids, codes, columns)


def _as_names(ids: NDArray[Any]) -> list[str]:
    """Ids [n] as text: numbers get ten digits, bytes are UTF-8."""
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS":
        raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}; expected text or whole numbers [n]")
    if ids.dtype.kind in "iu":
        return _in_digits(ids.tolist())
    return [name.decode() if isinstance(name, bytes) else name for name in ids.tolist()]


def _as_matrix(codes: NDArray[Any]) -> Codes:
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; expected packed uint8 [n, num_bits // 8]")
    return codes


def _read_text(url: str, columns: Columns) -> Iterator[Batch]:
    text = _whole(url).decode("utf-8-sig")
    rows = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text[:10_000] else ",")
    ids, codes = list[str](), list[str]()
    for number, row in enumerate(rows, 1):
        if number == 1 and len(row) == 2 and row[1].isidentifier():
            continue  # a header
        if len(row) != 2 or not _is_bits(row[1]):
            raise ValueError(f"line {number} is not an id and bits of 0 and 1: {','.join(row)[:80]!r}")
        ids.append(row[0])
        codes.append(row[1])
    yield from _in_pieces(ids, _of_text(codes), columns)


def _is_bits(text: str) -> bool:
    return text != "" and not text.strip("01")


def _of_text(texts: list[str]) -> Codes:
    """Packed codes of texts of 0 and 1, the first bit first."""
    if wrong := next((text for text in texts if not _is_bits(text)), None):
        raise ValueError(f"{wrong[:80]!r} is no text of 0 and 1, the bits of a code")
    lengths = {len(text) for text in texts}
    if len(lengths) > 1 or any(length % 8 for length in lengths):
        raise ValueError(f"codes have {' and '.join(map(str, sorted(lengths)))} bits; expected one multiple of 8")
    if not texts:
        return np.empty((0, 1), np.uint8)
    bits = np.frombuffer("".join(texts).encode(), np.uint8).reshape(len(texts), -1) - ord("0")
    return np.packbits(bits, axis=1)


def _read_parquet(url: str, columns: Columns) -> Iterator[Batch]:
    folder, name = split_url(url)
    with open_store(folder).open(name, ranged=True) as file:
        for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, use_threads=False):
            yield from _of_table(pa.Table.from_batches([batch]), columns)


def _read_lance(url: str, columns: Columns) -> Iterator[Batch]:
    try:
        lance = importlib.import_module("lance")
    except ModuleNotFoundError as error:
        raise InputError(f"{url}: to read Lance datasets, pip install pylance") from error
    for batch in lance.dataset(url).to_batches(batch_size=ROWS_AT_ONCE):
        yield from _of_table(pa.Table.from_batches([batch]), columns)


def _of_table(table: pa.Table, columns: Columns) -> Iterator[Batch]:
    for name in (columns.id, columns.code):
        if name not in table.column_names:
            raise ValueError(f"no column {name!r}; columns: {', '.join(table.column_names)}")
    ids, codes = table.column(columns.id), table.column(columns.code)
    if ids.null_count or codes.null_count:
        raise ValueError(f"{ids.null_count:,} ids and {codes.null_count:,} codes are null")
    if pa.types.is_integer(ids.type):
        ids = pa.chunked_array([pa.array(_in_digits(ids.to_pylist()), pa.string())])
    attributes = table.drop_columns([columns.id, columns.code])
    chosen = attributes if attributes.num_columns else None
    yield from _in_pieces(ids.cast(pa.string()), _codes_of(codes), columns, chosen)


def _codes_of(column: pa.ChunkedArray) -> Codes:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _of_text(column.to_pylist())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        lengths = {len(code) for code in column.to_pylist()}
        if len(lengths) > 1:
            raise ValueError(f"codes have {' and '.join(map(str, sorted(lengths)))} bytes; expected one length")
        column = column.cast(pa.binary(lengths.pop() if lengths else 1))
    if pa.types.is_fixed_size_binary(column.type):
        return bytes_matrix(column)
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        if not pa.types.is_integer(kind.value_type):
            raise ValueError(f"a code column of {kind}; expected lists of bytes, 0 to 255")
        return _as_matrix(np.array(column.to_pylist(), np.uint8).reshape(len(column), -1))
    raise ValueError(f"a code column of {kind}; expected binary, lists of bytes, or text of 0 and 1")


READERS: dict[str, Reader] = {
    "faiss": _read_faiss, "index": _read_faiss, "bin": _read_faiss, "parquet": _read_parquet, "npz": _read_npz,
    "npy": _read_npy, "csv": _read_text, "tsv": _read_text, "txt": _read_text, "lance": _read_lance,
}  # fmt: skip
