"""Figures of an evaluation: what metrics.json holds in, matplotlib Figures out. One style; no state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, PAPER, GRID = "#1d2433", "#ffffff", "#e4e7ee"
OURS = "#c2410c"
# Baselines: one hue family that stays apart in grey and for colour-blind readers (Okabe and Ito's palette).
OTHERS = {
    "itq": "#0072b2",
    "pca-sign": "#56b4e9",
    "lsh": "#009e73",
    "class-code": "#cc79a7",
    "float-cosine": "#555b6e",
    "random": "#b5bac9",
}
SIZE_INCHES, DPI = (5.6, 3.8), 160


def color(name: str) -> str:
    """The colour of a method: a baseline's own, or ours."""
    return OTHERS.get(name, OURS)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor=PAPER, layout="constrained")
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
        x, y, color=color(result["name"]), label=result["name"], linewidth=2.4 if ours else 1.4,
        marker="o" if ours else None, markersize=3, zorder=3 if ours else 2,
    )  # fmt: skip


def _legend_beside(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def precision_recall(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean precision over mean recall, a point for each Hamming radius."""
    figure, axes = _axes("Precision and recall by Hamming radius", "recall", "precision")
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
    """Precision among the N nearest, N on a logarithmic axis."""
    figure, axes = _axes("Precision among the nearest N", "N", "precision@N")
    for result in results:
        if "precision_at" in result:
            pairs = sorted((int(n), value) for n, value in result["precision_at"].items())
            _line(axes, result, [n for n, _ in pairs], [value for _, value in pairs])
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    _legend_beside(axes)
    return figure


def scores(results: Sequence[Mapping[str, Any]]) -> Figure:
    """mAP of every method as bars, best at the top."""
    ordered = sorted(results, key=lambda result: result["mAP"])
    top_k = ordered[-1].get("top_k")
    figure, axes = _axes("mean average precision" + (f" @{top_k}" if top_k else ""), "mAP", "")
    names = [f"{r['name']} ({r['num_bits']} bits)" if r["num_bits"] else r["name"] for r in ordered]
    values = [result["mAP"] for result in ordered]
    axes.barh(names, values, color=[color(result["name"]) for result in ordered], height=0.66)
    for place, value in enumerate(values):
        axes.text(value + 0.01, place, f"{value:.3f}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.1)
    axes.grid(visible=False, axis="y")
    return figure


def distances(shares: Mapping[str, Sequence[float]], name: str) -> Figure:
    """How Hamming distances of relevant pairs lie apart from those of the others."""
    figure, axes = _axes(f"Hamming distances of {name} codes", "distance in bits", "share of pairs")
    places = range(len(shares["relevant"]))
    axes.bar(places, shares["other"], width=1.0, color=OTHERS["random"], label="no class in common")
    axes.bar(places, shares["relevant"], width=1.0, color=OURS, alpha=0.75, label="a class in common")
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_all(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure of an evaluation as PNG bytes, by file stem."""
    results = metrics["results"]
    figures = {
        "scores": scores(results),
        "precision_recall": precision_recall(results),
        "precision_at": precision_at(results),
        "distances": distances(metrics["distances"], results[0]["name"]),
    }
    return {name: png(figure) for name, figure in figures.items()}


def png(figure: Figure) -> bytes:
    """A figure as PNG, the same bytes for the same data: no date, no version in it."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
