"""Codes: the one bit order, against loops over single bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hashray.codes import (
    StampedCodes,
    as_codes,
    as_words,
    binarize,
    check_num_bits,
    hamming,
    pad_width,
    unpack,
)
from hashray.errors import ConfigError, MismatchError, RunError

WIDTHS = st.integers(1, 17)


@st.composite
def code_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    width = draw(WIDTHS)
    rows = st.integers(0, 6)
    return tuple(draw(hnp.arrays(np.uint8, (draw(rows), width))) for _ in range(2))  # type: ignore[return-value]


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 5), WIDTHS.map(lambda w: 8 * w)), elements=st.floats(-2, 2, width=32)
    )
)
def test_bit_j_is_one_where_logit_j_is_at_least_zero(logits: np.ndarray) -> None:
    codes = binarize(logits)
    assert codes.dtype == np.uint8
    assert codes.shape == (len(logits), logits.shape[1] // 8)
    for i, row in enumerate(logits):
        for j, value in enumerate(row):
            bit = codes[i, j // 8] >> (7 - j % 8) & 1
            assert bit == (value >= 0)
    assert np.array_equal(unpack(codes), np.where(logits >= 0, 1, -1))
    assert unpack(codes).dtype == np.int8
    assert np.array_equal(binarize(torch.tensor(logits)), codes)
    assert np.array_equal(binarize(unpack(codes)), codes)


@given(code_pairs())
def test_hamming_counts_differing_bits(pair: tuple[np.ndarray, np.ndarray]) -> None:
    left, right = pair
    distances = hamming(left, right)
    assert distances.dtype == np.int32
    assert distances.shape == (len(left), len(right))
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            assert distances[i, j] == sum(bin(int(x) ^ int(y)).count("1") for x, y in zip(a, b, strict=True))
    assert np.array_equal(distances, hamming(right, left).T)
    # METHODS 0: d = (K - <b, b'>) / 2
    inner = unpack(left).astype(int) @ unpack(right).astype(int).T
    assert np.array_equal(distances, (8 * left.shape[1] - inner) // 2)


@given(code_pairs(), st.integers(0, 9))
def test_padding_changes_no_distance(pair: tuple[np.ndarray, np.ndarray], more: int) -> None:
    left, right = pair
    width = left.shape[1] + more
    assert pad_width(left, width).shape == (len(left), width)
    assert np.array_equal(hamming(pad_width(left, width), pad_width(right, width)), hamming(left, right))


def test_zero_is_bit_one_never_a_third_value() -> None:
    logits = np.array([[0.0, -0.0, 1e-30, -1e-30, np.inf, -np.inf, 0.0, -1.0]])
    assert binarize(logits).tolist() == [[0b11101010]]
    assert set(unpack(binarize(logits)).flatten().tolist()) == {-1, 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_every_tensor_dtype_gives_the_same_codes(dtype: torch.dtype) -> None:
    signs = torch.tensor([[1, -1, 0, -3, 4, -5, 0, 7]])
    assert binarize(signs.to(dtype)).tolist() == [[0b10101011]]
    assert binarize(signs.to(torch.float32).requires_grad_()).tolist() == [[0b10101011]]


def test_a_tiny_negative_float64_stays_negative_in_a_tensor() -> None:
    tiny = np.full((1, 8), -1e-60)
    assert binarize(tiny).tolist() == binarize(torch.tensor(tiny)).tolist() == [[0]]


def test_strided_codes_and_lists_are_taken() -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(4, 16)
    assert np.array_equal(
        hamming(codes[::2, ::2], codes[::2, ::2]), hamming(codes[::2, ::2].copy(), codes[::2, ::2].copy())
    )
    assert as_words(codes[:, ::2]).shape == (4, 1)
    assert as_words(codes[:, :12]).dtype == np.uint32
    assert as_words(codes[:, :7]).dtype == np.uint8


@pytest.mark.parametrize(
    ("num_bits", "near"), [(0, "use 8"), (-8, "use 8"), (4, "use 8"), (12, "use 8 or 16"), (63, "use 56 or 64")]
)
def test_widths_that_are_no_whole_bytes_name_the_nearest(num_bits: int, near: str) -> None:
    with pytest.raises(ConfigError, match=f"num_bits = {num_bits} is not a positive multiple of 8; {near}$"):
        check_num_bits(num_bits)
    if num_bits > 0:
        with pytest.raises(ConfigError, match="multiple of 8"):
            binarize(np.zeros((2, num_bits)))


def test_bad_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(8,\); expected \[n, num_bits\]"):
        binarize(np.zeros(8))
    with pytest.raises(RunError, match=r"logits of 1 of 3 rows are NaN, first of row 1.*lower optim\.lr"):
        binarize(np.array([[1.0] * 8, [np.nan] + [1.0] * 7, [-1.0] * 8]))
    with pytest.raises(ValueError, match=r"int64 \(1, 2\); expected packed uint8"):
        as_codes(np.zeros((1, 2), np.int64))
    with pytest.raises(ValueError, match="expected packed uint8"):
        hamming(np.zeros((1, 0), np.uint8), np.zeros((1, 0), np.uint8))
    with pytest.raises(ValueError, match="do not fit into a width of 2"):
        pad_width(np.zeros((1, 3), np.uint8), 2)


def test_codes_of_two_widths_do_not_compare() -> None:
    with pytest.raises(MismatchError, match="codes of 24 bits cannot be compared with codes of 64 bits"):
        hamming(np.zeros((1, 3), np.uint8), np.zeros((1, 8), np.uint8))


def test_stamped_codes_keep_their_model_through_slices() -> None:
    stamped = StampedCodes.stamp(np.arange(8, dtype=np.uint8).reshape(4, 2), "model-a")
    assert stamped[1:3].fingerprint == "model-a"
    assert hamming(stamped, stamped).tolist()[0][0] == 0
