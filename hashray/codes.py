"""Binary codes: binarise, pack, unpack, Hamming. The only file that knows the bit order.

Bit j of a code is 1 where logit j is >= 0 (never `sign`, whose 0 would make a three-valued code).
Bits are packed eight to a byte, the first bit of a byte the most significant (`numpy.packbits`,
big-endian), so a code of `num_bits` bits is `num_bits // 8` bytes of uint8.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hashray.errors import ConfigError, MismatchError, RunError

BIT_ORDER: Literal["big"] = "big"
Codes = NDArray[np.uint8]


def check_num_bits(num_bits: int) -> int:
    """Return `num_bits` when it is a positive multiple of 8.

    Raises:
        ConfigError: it is not; the text names the nearest allowed widths.
    """
    if num_bits < 8 or num_bits % 8:
        low = max(8, num_bits // 8 * 8)
        near = f"{low}" if num_bits < 8 else f"{low} or {low + 8}"
        raise ConfigError(f"num_bits = {num_bits} is not a positive multiple of 8; use {near}")
    return num_bits


def binarize(logits: Any) -> Codes:
    """Pack logits [n, num_bits] (array or tensor, any float dtype) into codes uint8 [n, num_bits // 8].

    Raises:
        ConfigError: the width is not a multiple of 8.
        RunError: a logit is NaN.
        ValueError: the input is not two-dimensional.

    >>> binarize(np.array([[0.0, -1, 2, -3, 4, -5, 6, -7]]))
    array([[170]], dtype=uint8)
    >>> binarize(np.array([[-0.0, -1, -1, -1, -1, -1, -1, -1]]))  # -0.0 >= 0
    array([[128]], dtype=uint8)
    >>> binarize(np.full((1, 16), -1e-9)).shape
    (1, 2)
    """
    if hasattr(logits, "detach"):
        logits = logits.detach().cpu()
        # NumPy knows no bfloat16; a float64 stays what it is: as float32 -1e-60 would become -0.0, bit 1.
        logits = (logits.float() if logits.element_size() < 4 else logits).numpy()
    values = np.asarray(logits)
    if values.ndim != 2:
        raise ValueError(f"logits have shape {values.shape}; expected [n, num_bits]")
    check_num_bits(values.shape[1])
    bad = np.flatnonzero(np.isnan(values).any(1))
    if len(bad):
        raise RunError(
            f"the logits of {len(bad):,} of {len(values):,} rows are NaN, first of row {bad[0]}, and NaN has no bit: "
            "the network's weights or its inputs are not finite. Train it again with a lower optim.lr, or mend the "
            "inputs"
        )
    return np.packbits(values >= 0, axis=1, bitorder=BIT_ORDER)


def unpack(codes: Codes) -> NDArray[np.int8]:
    """Unpack codes uint8 [n, num_bits // 8] into {-1, +1} int8 [n, num_bits].

    >>> unpack(np.array([[170]], dtype=np.uint8))
    array([[ 1, -1,  1, -1,  1, -1,  1, -1]], dtype=int8)
    """
    bits = np.unpackbits(as_codes(codes), axis=1, bitorder=BIT_ORDER).astype(np.int8)
    return bits * np.int8(2) - np.int8(1)


def hamming(left: Codes, right: Codes) -> NDArray[np.int32]:
    """Hamming distances int32 [n, m], in bits, between codes uint8 [n, b] and uint8 [m, b].

    Raises:
        MismatchError: the two widths differ.

    >>> hamming(np.array([[0], [255]], np.uint8), np.array([[1], [255]], np.uint8))
    array([[1, 8],
           [7, 0]], dtype=int32)
    """
    left, right = as_codes(left), as_codes(right)
    left_words, right_words = as_words(left), as_words(right)
    if left.shape[1] != right.shape[1]:
        raise MismatchError(
            f"codes of {left.shape[1] * 8} bits cannot be compared with codes of {right.shape[1] * 8} bits"
        )
    distances = np.zeros((len(left), len(right)), dtype=np.int32)
    for word in range(left_words.shape[1]):
        distances += np.bitwise_count(left_words[:, word, None] ^ right_words[None, :, word])
    return distances


def as_codes(codes: Any) -> Codes:
    """Return `codes` as a C-contiguous uint8 [n, b] array, or raise ValueError saying what it is instead."""
    array = np.asarray(codes)
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"codes are {array.dtype} {array.shape}; expected packed uint8 [n, num_bits // 8]")
    return np.ascontiguousarray(array)


def as_words(codes: Codes) -> NDArray[Any]:
    """View codes uint8 [n, b] as the widest unsigned words that divide b, [n, b // word bytes].

    The value of a word depends on the machine's byte order; only XOR and popcount may look at it.
    """
    array = as_codes(codes)
    size = next(size for size in (8, 4, 2, 1) if array.shape[1] % size == 0)
    return array.view(np.dtype(f"u{size}"))


def pad_width(codes: Codes, width_bytes: int) -> Codes:
    """Append zero bytes up to `width_bytes`: distances stay what they were.

    >>> pad_width(np.array([[7, 8]], np.uint8), 4)
    array([[7, 8, 0, 0]], dtype=uint8)
    """
    array = as_codes(codes)
    if array.shape[1] > width_bytes:
        raise ValueError(f"codes of {array.shape[1]} bytes do not fit into a width of {width_bytes}")
    return np.pad(array, ((0, 0), (0, width_bytes - array.shape[1])))


class StampedCodes(np.ndarray[Any, np.dtype[np.uint8]]):
    """Codes uint8 [n, b] that remember the fingerprint of the model that made them, through slices and pickles."""

    fingerprint: str | None = None

    @classmethod
    def stamp(cls, codes: Codes, fingerprint: str | None) -> StampedCodes:
        """A view of `codes` with a fingerprint."""
        stamped = as_codes(codes).view(cls)
        stamped.fingerprint = fingerprint
        return stamped

    def __array_finalize__(self, source: Any) -> None:
        self.fingerprint = getattr(source, "fingerprint", None)

    def __reduce__(self) -> Any:
        return StampedCodes.stamp, (np.asarray(self), self.fingerprint)
