"""Hamming distances as FAISS computes them where it is installed, else by NumPy's popcount: the same integers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes, as_codes, hamming, pad_width

# 1,000 x 59,000 pairs on one core of a Xeon with AVX-512, ns a pair: FAISS at widths of 8 and 16 bytes 0.3, of 32 bytes
# 0.9, of 4 bytes (padded here) 2.1.
_WORD_BYTES = 8


def prepare(codes: Codes) -> Codes:
    """Codes uint8 [n, b] as `distances` likes them: whole words of 8 bytes, zero-padded. Distances stay the same."""
    return np.ascontiguousarray(pad_width(codes, -(-codes.shape[1] // _WORD_BYTES) * _WORD_BYTES))


def distances(left: Codes, right: Codes) -> NDArray[np.int32]:
    """Hamming distances int32 [n, m], in bits, between codes uint8 [n, b] and uint8 [m, b]; as `codes.hamming`.

    Codes that are compared often are best given as `prepare` leaves them: others are copied here at each call.

    Raises:
        MismatchError: the two widths differ.

    >>> distances(np.uint8([[0], [255]]), np.uint8([[1], [255]]))
    array([[1, 8],
           [7, 0]], dtype=int32)
    """
    left, right = as_codes(left), as_codes(right)
    faiss = _faiss()
    if faiss is None or left.shape[1] != right.shape[1] or not len(left) or not len(right):
        return hamming(left, right)
    left, right = prepare(left), prepare(right)
    out = np.empty((len(left), len(right)), dtype=np.int32)
    ours, theirs, result = (faiss.swig_ptr(array) for array in (left, right, out))
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # of this thread alone; more only wait for each other where cores are busy
    try:
        faiss.hammings(ours, theirs, len(left), len(right), left.shape[1], result)
    finally:
        faiss.omp_set_num_threads(threads)
    return out


@cache
def _faiss() -> Any:
    """The module, or None: metrics need no FAISS, and importing it takes a tenth of a second."""
    try:
        import faiss
    except ModuleNotFoundError:
        return None
    return faiss
