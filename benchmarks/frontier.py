"""A figure of a class split's table, mAP within seen classes against mAP across unseen ones, and its target."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hashray.report.figures import DPI, GRID, INK, LEARNED, OTHERS, PAPER

LEFT_OUT = ("random",)  # far below all others
MARK = "hashray-data"  # a PNG text entry: the hash of what the figure shows
Seeds = tuple[int, int]
Points = dict[str, dict[str, dict[Seeds, tuple[float, float]]]]
"""(within, cross) by code length, row and seeds."""


def points_of(entries: Sequence[Mapping[str, Any]]) -> Points:
    """The two scores of every row and baseline of a table's evaluations."""
    points: Points = {}
    for entry in entries:
        seeds = entry["protocol"]["split_seed"], entry["protocol"]["train_seed"]
        bits, ours = entry["results"][0]["num_bits"], entry["results"][0]["name"]
        scores: dict[str, dict[str, float]] = {}
        for result in entry["results"]:
            scores.setdefault(result["name"], {})[result["scenario"]] = result["mAP"]
        for name, both in scores.items():
            row = entry["row"] if name == ours else name
            key = seeds if name == ours else (seeds[0], 0)  # no training seed changes a baseline
            points.setdefault(str(bits), {}).setdefault(row, {})[key] = both["within"], both["cross"]
    return points


def verdict(about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Whether the first row of `compare` keeps the table's `target` against the second one and the baselines."""
    target, (ours, plain) = about["target"], about["compare"]
    texts = []
    for bits, rows in sorted(points_of(entries).items(), key=lambda item: int(item[0])):
        if ours not in rows or plain not in rows:
            continue
        pairs = [(rows[ours][seeds], rows[plain][seeds]) for seeds in rows[ours] if seeds in rows[plain]]
        within, cross = (100 * statistics.fmean(a[i] - b[i] for a, b in pairs) for i in (0, 1))
        parts = [(f"{cross:+.1f} points across", cross >= target["cross"])]
        for name in target["above"]:
            leads: dict[int, list[float]] = {}
            for (split, _), score in rows[ours].items():
                leads.setdefault(split, []).append(100 * (score[1] - rows[name][split, 0][1]))
            lead = statistics.fmean(value for values in leads.values() for value in values)
            below = [str(split) for split, values in sorted(leads.items()) if statistics.fmean(values) <= 0]
            beside = f", but not on split {' and '.join(below)}" if below else ""
            parts.append((f"{lead:+.1f} over {name} across{beside}", lead > 0))
        parts.append((f"{within:+.1f} within", within >= -target["within"]))
        texts.append(
            f"At {bits} bits: " + ", ".join(f"{text} ({'kept' if kept else 'missed'})" for text, kept in parts)
        )
    return f"{target['text']} {'. '.join(texts)}."


def frontier(about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Figure:
    """One dot a row: means over splits and seeds. A cross shows the standard deviation of both, splits included."""
    points = points_of(entries)
    lengths = sorted(points, key=int)
    figure = Figure(figsize=(4.6 * len(lengths), 4.4), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, len(lengths), sharex=True, sharey=True, squeeze=False)[0]
    for axes, bits in zip(panels, lengths, strict=True):
        _panel(axes, f"{bits} bits", points[bits], about["rows"])
    panels[0].set_ylabel("mAP across unseen classes", color=INK, fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, title: str, rows: Mapping[str, Mapping[Seeds, tuple[float, float]]], names: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel("mAP within seen classes", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    order = [*(name for name in names if name in rows), *(name for name in OTHERS if name in rows)]
    for row in order:
        if row in LEFT_OUT:
            continue
        ours, scores = row in names, [*rows[row].values()]
        within, cross = ([score[i] for score in scores] for i in (0, 1))
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (within, cross)]
        axes.errorbar(
            statistics.fmean(within), statistics.fmean(cross), xerr=spread[0], yerr=spread[1],
            color=LEARNED[list(names).index(row)] if ours else OTHERS[row], label=names.get(row, row),
            marker="o" if ours else "s", markersize=8 if ours else 6, linewidth=1, alpha=0.95, linestyle="none",
        )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def fingerprint(about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The hash of everything that the figure shows."""
    shown = [
        [bits, row, sorted(scores.items())] for bits, of in points_of(entries).items() for row, scores in of.items()
    ]
    return hashlib.sha256(json.dumps([sorted(shown), about["rows"]], sort_keys=True).encode()).hexdigest()


def draw(path: Path, about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> None:
    """Write the figure as a PNG that carries `fingerprint`."""
    buffer = BytesIO()
    frontier(about, entries).savefig(buffer, format="png", metadata={MARK: fingerprint(about, entries)})
    path.write_bytes(buffer.getvalue())


def is_stale(path: Path, about: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the file is missing, or shows other numbers. Its pixels are matplotlib's and not compared."""
    if not path.exists():
        return True
    with Image.open(path) as image:
        return image.info.get(MARK) != fingerprint(about, entries)
