"""Codes as pictures: how even each bit is, how bits move together, and a map of the codes by t-SNE. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from hashray.codes import unpack
from hashray.report.figures import INK, OURS, new_axes

MAP_CODES = 1000  # most codes of a map: 1,000 take about 3 s


def bits_of(codes: Sequence[str]) -> NDArray[np.float32]:
    """Bits float32 [n, K] in {-1, +1} of codes written in hexadecimal."""
    return unpack(np.stack([np.frombuffer(bytes.fromhex(code), np.uint8) for code in codes])).astype(np.float32)


def bit_balance(codes: Sequence[str]) -> Figure:
    """For each bit the share of codes that have it set; a useful bit is near a half."""
    shares = (bits_of(codes).mean(0) + 1) / 2
    figure, axes = new_axes(f"Balance of the bits, {len(codes):,} query codes", "bit", "share of codes with a 1")
    axes.bar(range(len(shares)), shares, width=0.9, color=OURS)
    axes.axhline(0.5, color=INK, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    return figure


def bit_correlations(codes: Sequence[str]) -> Figure:
    """Matrix of the correlation between any two bits; one that never changes has none and is 0."""
    bits = bits_of(codes)
    bits -= bits.mean(0)
    deviations = np.sqrt((bits**2).mean(0))
    scaled = bits / np.where(deviations > 0, deviations, 1)
    matrix = scaled.T @ scaled / len(bits)
    title = f"Correlation between bits, {len(codes):,} query codes"
    figure, axes = new_axes(title, "bit", "bit", tall=True)
    picture = axes.imshow(matrix, cmap="PuOr", vmin=-1, vmax=1)
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, shrink=0.8).set_label("correlation", color=INK, fontsize=9)
    return figure


def embed(codes: Sequence[str], seed: int) -> NDArray[np.floating]:
    """t-SNE map, float [n, 2], of codes written in hexadecimal; it follows the Hamming distances between them."""
    from sklearn.manifold import TSNE  # half a second of imports

    bits = bits_of(codes)
    if len(bits) < 3:
        return np.zeros((len(bits), 2))
    # Squared Euclidean distance of bits in {-1, +1} is four times Hamming distance. Noise separates equal codes.
    bits += np.random.default_rng(seed).normal(0, 1e-3, bits.shape).astype(np.float32)
    perplexity = min(30.0, (len(bits) - 1) / 3)
    with threadpool_limits(1):  # threads add in any order, and t-SNE makes another map of the last digit
        return np.asarray(TSNE(init="random", perplexity=perplexity, random_state=seed).fit_transform(bits))
