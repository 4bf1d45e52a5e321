"""Figures of an evaluation. Each function takes data from metrics.json and returns a matplotlib Figure in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, PAPER, GRID = "#1d2433", "#ffffff", "#e4e7ee"
OURS = "#c2410c"
# Colours of the baselines: Okabe and Ito's palette, which stays distinct in grey and for colour-blind readers.
OTHERS = {
    "itq": "#0072b2",
    "itq-linear": "#e69f00",
    "pca-sign": "#56b4e9",
    "lsh": "#009e73",
    "class-code": "#cc79a7",
    "float-cosine": "#555b6e",
    "random": "#b5bac9",
}
LEARNED = (
    OURS,
    "#1d4ed8",
    "#15803d",
    "#7e22ce",
    "#b45309",
    "#0f766e",
    "#be185d",
    "#475569",
)  # of several runs, in order
COMMUNITIES = (*LEARNED, "#0072b2", "#cc79a7", "#e69f00", "#56b4e9")
SIZE_INCHES, DPI = (5.6, 3.8), 160


def color(name: str) -> str:
    """The colour of a baseline, or ours for any learned method."""
    return OTHERS.get(name, OURS)


def new_axes(title: str, x: str, y: str, tall: bool = False) -> tuple[Figure, Axes]:
    """An empty figure in the common style."""
    size = (SIZE_INCHES[0], SIZE_INCHES[0]) if tall else SIZE_INCHES
    figure = Figure(figsize=size, dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _line(axes: Axes, result: Mapping[str, Any], x: Sequence[float], y: Sequence[float]) -> None:
    ours = result["name"] not in OTHERS
    axes.plot(
        x, y, color=_tint(result), label=label(result),
        linewidth=2.4 if ours else 1.4, marker="o" if ours else None, markersize=3, zorder=3 if ours else 2,
    )  # fmt: skip


def _tint(result: Mapping[str, Any]) -> str:
    """The colour of a result. The learned method of each run has a different one, the same in every figure."""
    return color(result["name"]) if result["name"] in OTHERS else LEARNED[result.get("run", 0) % len(LEARNED)]


def label(result: Mapping[str, Any]) -> str:
    """The legend entry of a result: its `label` when several runs are compared, else its name."""
    return str(result.get("label", result["name"]))


def _legend_beside(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def precision_recall(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean precision over mean recall, one point for each Hamming radius."""
    figure, axes = new_axes("Precision and recall by Hamming radius", "recall", "precision")
    for result in results:
        if "pr_curve" in result:
            curve = result["pr_curve"]
            points = [(r, p) for r, p in zip(curve["recall"], curve["precision"], strict=True) if r > 0]
            _line(axes, result, [r for r, _ in points], [p for _, p in points])
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.02)
    _legend_beside(axes)
    return figure


def precision_at(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Precision among the N nearest rows, with N on a logarithmic axis."""
    figure, axes = new_axes("Precision among the nearest N", "N", "precision@N")
    for result in results:
        if "precision_at" in result:
            pairs = sorted((int(n), value) for n, value in result["precision_at"].items())
            _line(axes, result, [n for n, _ in pairs], [value for _, value in pairs])
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    _legend_beside(axes)
    return figure


def scores(results: Sequence[Mapping[str, Any]]) -> Figure:
    """mAP of every method as bars, the best at the top."""
    ordered = sorted(results, key=lambda result: result["mAP"])
    top_k = ordered[-1].get("top_k")
    figure, axes = new_axes("mean average precision" + (f" @{top_k}" if top_k else ""), "mAP", "")
    names = [f"{label(r)} ({r['num_bits']} bits)" if r["num_bits"] else r["name"] for r in ordered]
    values = [result["mAP"] for result in ordered]
    axes.barh(names, values, color=[_tint(result) for result in ordered], height=0.66)
    for row, value in enumerate(values):
        axes.text(value + 0.01, row, f"{value:.3f}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.1)
    axes.grid(visible=False, axis="y")
    return figure


def distances(shares: Mapping[str, Sequence[float]], name: str) -> Figure:
    """Histograms of Hamming distance: pairs that share a class, and all other pairs."""
    figure, axes = new_axes(f"Hamming distances of {name} codes", "distance in bits", "share of pairs")
    bits = range(len(shares["relevant"]))
    axes.bar(bits, shares["other"], width=1.0, color=OTHERS["random"], label="no class in common")
    axes.bar(bits, shares["relevant"], width=1.0, color=OURS, alpha=0.75, label="a class in common")
    axes.legend(fontsize=8, frameon=False)
    return figure


def codeword_distances(analysis: Mapping[str, Any]) -> Figure:
    """Matrix of Hamming distances between the codewords of the classes, ordered by community."""
    names = [name for group in analysis["communities"] for name in group]
    order = [analysis["classes"].index(name) for name in names]
    matrix = np.array(analysis["distances"])[np.ix_(order, order)]
    figure, axes = new_axes(f"Distances between codewords of {analysis['num_bits']} bits", "", "", tall=True)
    picture = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=max(1, int(matrix.max())))
    few = len(names) <= 40
    axes.set_xticks(range(len(names)) if few else [], names if few else [], rotation=90)
    axes.set_yticks(range(len(names)) if few else [], names if few else [])
    if len(names) <= 12:
        for i, j in np.ndindex(matrix.shape):
            dark = matrix[i, j] < matrix.max() / 2
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7, color=PAPER if dark else INK)
    axes.grid(visible=False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8)
    bar.set_label("bits", color=INK, fontsize=9)
    return figure


def codeword_graph(analysis: Mapping[str, Any]) -> Figure:
    """Graph that joins each class to the nearest codewords. Thicker lines are nearer, colours are communities."""
    none = "" if analysis["edges"] else ": none, all are equally far apart"
    figure, axes = new_axes(f"Relations between codewords{none}", "", "", tall=True)
    points = layout(analysis)
    group = {name: i for i, names in enumerate(analysis["communities"]) for name in names}
    widest = max((weight for _, _, weight in analysis["edges"]), default=1) or 1
    narrowest = min((weight for _, _, weight in analysis["edges"]), default=0)
    for i, j, weight in analysis["edges"]:
        share = (weight - narrowest) / max(widest - narrowest, 1e-9)
        axes.plot(
            points[[i, j], 0],
            points[[i, j], 1],
            color="#94a3b8",
            linewidth=0.5 + 3.5 * share,
            alpha=0.35 + 0.45 * share,
            zorder=1,
        )
    colors = [COMMUNITIES[group[name] % len(COMMUNITIES)] for name in analysis["classes"]]
    axes.scatter(
        points[:, 0],
        points[:, 1],
        s=70 if len(colors) <= 40 else 30,
        c=colors,
        edgecolors=PAPER,
        linewidths=1.2,
        zorder=2,
    )
    for (x, y), name in zip(points, analysis["classes"], strict=True):
        axes.annotate(name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7, color=INK)
    axes.margins(0.12)
    axes.set_axis_off()
    return figure


def layout(analysis: Mapping[str, Any], seed: int = 0) -> NDArray[np.floating]:
    """Positions of the classes in the graph, float [c, 2]; joined classes are near each other."""
    import networkx as nx  # half a second of imports, for pages with codewords only

    graph = nx.Graph()
    graph.add_nodes_from(range(len(analysis["classes"])))
    graph.add_weighted_edges_from(analysis["edges"])
    points = nx.spring_layout(graph, weight="weight", seed=seed, k=2.2 / max(1, len(graph)) ** 0.5, iterations=200)
    return np.array([points[i] for i in range(len(graph))])


def code_map(points: NDArray[np.floating], labels: Sequence[int], classes: Sequence[str], title: str) -> Figure:
    """Map of codes: t-SNE points [n, 2], coloured by class (-1 is no class)."""
    figure, axes = new_axes(title, "", "", tall=True)
    present = sorted(set(labels))
    shades = colormaps["tab20"] if len(present) <= 20 else colormaps["gist_ncar"]
    for number, index in enumerate(present):
        rows = np.array(labels) == index
        shade = shades(number / max(1, len(present) - 1)) if len(present) > 20 else shades(number % 20)
        name = "no class" if index < 0 else classes[index]
        axes.scatter(points[rows, 0], points[rows, 1], s=14, color=[shade], label=name, linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    if len(present) <= 20:
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=2)
    return figure


def confusions(counted: Mapping[str, Any]) -> Figure:
    """Matrix of classes: the share of each class (column) among the nearest rows of a class's queries (row)."""
    names, shares = counted["classes"], np.array(counted["shares"])
    title = f"Classes of the {counted['neighbours']} nearest rows of {counted['queries']:,} queries"
    figure, axes = new_axes(title, "class of the neighbours", "class of the query", tall=True)
    picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    few = len(names) <= 40
    axes.set_xticks(range(len(names)) if few else [], names if few else [], rotation=90)
    axes.set_yticks(range(len(names)) if few else [], names if few else [])
    if len(names) <= 12:
        for i, j in np.ndindex(shares.shape):
            text = f"{shares[i, j]:.2f}".replace("0.", ".", 1) if shares[i, j] >= 0.005 else ""
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=PAPER if shares[i, j] < 0.5 else INK)
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, shrink=0.8).set_label("share", color=INK, fontsize=9)
    return figure
