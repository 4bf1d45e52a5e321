"""Search on a GPU: which of its answers are sure, and what is said where there is none."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from hashray import create_index, open_index
from hashray.cli import main
from hashray.codes import hamming
from hashray.errors import InputError
from hashray.index.gpu import in_order

HAS_GPU = getattr(faiss, "get_num_gpus", lambda: 0)() > 0


@pytest.mark.parametrize("rows", [1, 5, 40, 300])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_what_is_sure_is_exact(rows, k):
    """A search that keeps any ties, in any order, as FAISS's on a GPU: what is called sure is the sorted answer."""
    rng = np.random.default_rng(rows * k)
    codes, queries = rng.integers(0, 4, (rows, 4), dtype=np.uint8), rng.integers(0, 4, (30, 4), dtype=np.uint8)
    away, asked = hamming(queries, codes), min(2 * k + 3, rows)
    mixed = np.argsort(away + rng.random(away.shape) / 2, axis=1)[:, :asked]  # ties in a random order
    distances, positions, exact = in_order(np.take_along_axis(away, mixed, 1), mixed, k, whole=asked == rows)
    assert distances.shape == positions.shape == (30, k)
    assert exact.any() and (asked < rows or exact.all())
    for row in np.flatnonzero(exact):
        nearest = sorted(zip(away[row].tolist(), range(rows), strict=True))[:k]
        there = [pair for pair in zip(distances[row].tolist(), positions[row].tolist(), strict=True) if pair[1] >= 0]
        assert there == nearest


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    create_index(tmp_path, 32).append(["a"], np.zeros((1, 4), np.uint8))
    with pytest.raises(InputError, match="FAISS sees no GPU on this machine; search without --gpu"):
        open_index(tmp_path, gpu=True)
    assert main(["search", str(tmp_path), "--model", str(tmp_path), "--image", "x.png", "--gpu"]) == 2


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (5000, 4), dtype=np.uint8)
    create_index(tmp_path, 32).append([f"{row:05d}" for row in range(5000)], codes)
    for k in (1, 100, 3000):
        ours, theirs = (open_index(tmp_path, gpu=gpu).search(codes[:50], k) for gpu in (True, False))
        assert ours[0].tolist() == theirs[0].tolist() and ours[1].tolist() == theirs[1].tolist()
