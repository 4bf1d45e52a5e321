"""The codes that a FAISS binary index holds, by the numbers of its rows. No Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes


def stored_codes(index: Any, kind: str) -> Codes:
    """The packed codes uint8 [rows, width] of all rows; of a flat index a view of its memory."""
    width = index.d // 8
    if kind == "flat":
        return _view(index.xb.data(), int(index.ntotal), width)
    whole, lists = np.empty((int(index.ntotal), width), np.uint8), index.invlists
    for number in range(index.nlist):
        if size := lists.list_size(number):
            whole[_numbers(lists, number, size)] = _view(lists.get_codes(number), size, width)
    return whole


def codes_at(index: Any, kind: str, positions: NDArray[np.int64], lists: Iterable[int] | None = None) -> Codes:
    """The packed codes uint8 [n, width] of rows int64 [n].

    Args:
        lists: of an "ivf" index the lists that hold these rows; unset: all lists are looked through.
    """
    width = index.d // 8
    if kind == "flat":
        return stored_codes(index, kind)[positions]
    codes = np.zeros((len(positions), width), np.uint8)
    for number in range(index.nlist) if lists is None else lists:
        if size := index.invlists.list_size(int(number)):
            numbers = _numbers(index.invlists, int(number), size)  # ascending: rows were added in order
            places = np.minimum(np.searchsorted(numbers, positions), size - 1)
            here = np.flatnonzero(numbers[places] == positions)
            if len(here):
                codes[here] = _view(index.invlists.get_codes(int(number)), size, width)[places[here]]
    return codes


def _numbers(lists: Any, number: int, size: int) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = faiss.rev_swig_ptr(lists.get_ids(number), size)
    return numbers


def _view(pointer: Any, rows: int, width: int) -> Codes:
    """Memory of FAISS as codes uint8 [rows, width], without a copy."""
    return faiss.rev_swig_ptr(pointer, rows * width).reshape(rows, width)
