"""Matrices as Arrow columns and back, and what the columns of a corpus mean. The one place that knows both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.errors import CorruptArtifact


def list_column(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    """A matrix [n, d] of numbers as a column of n lists of d.

    >>> list_column(np.float32([[1, 2], [3, 4]])).type
    FixedSizeListType(fixed_size_list<item: float>[2])
    """
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def list_matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of `list_column` back to the matrix [n, d], in the column's own number type.

    >>> list_matrix(pa.chunked_array([list_column(np.int8([[1, 2], [3, 4]]))]))
    array([[1, 2],
           [3, 4]], dtype=int8)
    """
    values = column.combine_chunks()
    return values.flatten().to_numpy().reshape(len(values), values.type.list_size)


def bytes_column(matrix: NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """A matrix [n, b] of one-byte numbers as a column of n binary values of b bytes.

    >>> bytes_column(np.uint8([[1, 2], [3, 4]])).type
    FixedSizeBinaryType(fixed_size_binary[2])
    """
    data = pa.py_buffer(np.ascontiguousarray(matrix).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(matrix.shape[1]), len(matrix), [None, data])


def bytes_matrix(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """A column of `bytes_column` without nulls back to the matrix uint8 [n, b].

    >>> bytes_matrix(pa.chunked_array([bytes_column(np.uint8([[1, 2], [3, 4]]))[1:]]))
    array([[3, 4]], dtype=uint8)
    """
    width = column.type.byte_width
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width).reshape(-1, width)
        for chunk in column.chunks
        if len(chunk) and width
    ]
    return np.concatenate([np.empty((0, width), np.uint8), *chunks]) if width else np.empty((len(column), 0), np.uint8)


def code_matrix(column: pa.ChunkedArray, num_bits: int) -> Codes:
    """A code column as packed codes uint8 [n, num_bits // 8].

    Raises:
        CorruptArtifact: another type, or a null.
    """
    if column.type != pa.binary(num_bits // 8) or column.null_count:
        raise CorruptArtifact(
            f"the code column is {column.type} with {column.null_count} nulls; "
            f"codes of {num_bits} bits are fixed_size_binary[{num_bits // 8}]"
        )
    return bytes_matrix(column)


def multi_hot(labels: pa.ChunkedArray | pa.Array, num_classes: int) -> NDArray[np.uint8]:
    """Label lists [n] -> multi-hot uint8 [n, num_classes].

    Raises:
        CorruptArtifact: an index outside 0 .. num_classes - 1.
    """
    values = labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels
    out = np.zeros((len(values), num_classes), dtype=np.uint8)
    rows, classes = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values).to_numpy()
    if len(classes) and (classes.min() < 0 or classes.max() >= num_classes):
        wrong = classes.min() if classes.min() < 0 else classes.max()
        raise CorruptArtifact(f"a label {int(wrong)} is outside 0 to {num_classes - 1}")
    out[rows, classes] = 1
    return out


def in_split(splits: pa.ChunkedArray | pa.Array, split: str) -> NDArray[np.bool_]:
    """Which rows [n] are in a split: "train" is in "database+train"."""
    values = splits.combine_chunks() if isinstance(splits, pa.ChunkedArray) else splits
    encoded = pc.dictionary_encode(values)
    if not len(encoded):
        return np.zeros(0, dtype=bool)
    member = np.array([split in str(word).split("+") for word in encoded.dictionary.to_pylist()], dtype=bool)
    return member[encoded.indices.to_numpy()]
