"""The page of a sweep: leaderboard, learning curves, parallel coordinates, importance, winner beside default."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hashray.report.drawn import Drawn
from hashray.report.figures import INK, OURS, new_axes
from hashray.report.page import Table, render, score_text
from hashray.tune.leaderboard import Trial, ranked
from hashray.tune.live import short
from hashray.tune.space import look_up

SHOWN = 20


def draw(trials: Sequence[Trial], summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw every figure of a sweep, by name."""
    figures = {"learning_curves": learning_curves(trials, summary)}
    figures["parallel_coordinates"] = parallel_coordinates(trials)
    if summary["importance"]:
        figures["importance"] = importance_bars(summary["importance"])
    return figures


def learning_curves(trials: Sequence[Trial], summary: Mapping[str, Any]) -> Figure:
    """Validation over epochs. The best trial and the default stand out; a cross ends a trial that stopped early."""
    figure, axes = new_axes("Learning curves", "epochs", "validation")
    best = ranked(trials)[0].number
    shown = {best: (OURS, 2.4, f"trial {best}, the best")}
    if summary["default_score"] is not None:
        shown = {0: (INK, 1.8, "trial 0, the default"), **shown}
    for trial in trials:
        if not trial.lines:
            continue
        epochs = [line["epoch"] for line in trial.lines]
        scores = [line["validation_map"] for line in trial.lines]
        tint, width, label = shown.get(trial.number, ("#9aa3b5", 0.9, None))
        axes.plot(epochs, scores, color=tint, linewidth=width, label=label, zorder=2 + width)
        mark = {"finished": "o", "stopped": "x", "failed": "v"}[trial.state]
        axes.plot(epochs[-1:], scores[-1:], marker=mark, color=tint, markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def parallel_coordinates(trials: Sequence[Trial]) -> Figure:
    """One vertical axis for each dimension, from its lowest to its highest value; logarithmic if all are above 0."""
    scored = [trial for trial in reversed(ranked(trials)) if trial.score is not None]
    names = list(dict.fromkeys(name for trial in scored for name in trial.point))
    figure, axes = new_axes("Parallel coordinates", "", "")
    axes.set_yticks([])
    axes.grid(visible=False)
    columns = {name: _heights([trial.point.get(name) for trial in scored]) for name in names}
    columns["score"] = _heights([trial.score for trial in scored], log=False)
    for rank, _ in enumerate(scored):
        points = [(x, heights[rank]) for x, (heights, _) in enumerate(columns.values())]
        kept = [(x, y) for x, y in points if y is not None]
        share = (rank + 1) / len(scored)
        tint = OURS if rank == len(scored) - 1 else colormaps["Greys"](0.15 + 0.6 * share)
        axes.plot(
            [x for x, _ in kept], [y for _, y in kept], color=tint, linewidth=0.8 + 1.4 * share**4, zorder=1 + rank
        )
    for x, (_, ticks) in enumerate(columns.values()):
        axes.plot([x, x], [0, 1], color=INK, linewidth=0.8, zorder=0)
        for y, name in ticks.items():
            if y in (0, 1):
                axes.text(x, 1.08 * y - 0.04, name, ha="center", va="bottom" if y else "top", fontsize=7, color=INK)
            else:
                axes.text(x + 0.04, y, name, ha="left", va="center", fontsize=7, color=INK, zorder=2 * len(scored))
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], rotation=20)
    axes.set_ylim(-0.12, 1.14)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _heights(values: Sequence[Any], log: bool = True) -> tuple[list[float | None], dict[float, str]]:
    """Heights of the values between the lowest (0) and the highest (1); names of both ends, or of all choices."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        scale = math.log if log and min(present) > 0 else float
        low, high = scale(min(present)), scale(max(present))
        span = (high - low) or 1.0
        heights = [None if v is None else (scale(v) - low) / span for v in values]
        return heights, {0.0: short(min(present)), 1.0: short(max(present))}
    names = sorted({str(value) for value in present})
    span = max(1, len(names) - 1)
    heights = [None if v is None else names.index(str(v)) / span for v in values]
    return heights, {i / span: name for i, name in enumerate(names)}


def importance_bars(by_method: Mapping[str, Any]) -> Figure:
    """A bar for each dimension, and for each method if there are several."""
    bars = [
        (name if len(by_method) == 1 else f"{name} ({kind})", share)
        for kind, result in by_method.items()
        for name, share in result["shares"].items()
    ]
    bars.sort(key=lambda bar: bar[1])
    figure, axes = new_axes("Importance", "share of the score's variance", "")
    axes.barh([name for name, _ in bars], [share for _, share in bars], color=OURS, height=0.6)
    axes.set_xlim(0, 1)
    return figure


def sweep_page(trials: Sequence[Trial], summary: Mapping[str, Any], figures: Mapping[str, Drawn]) -> str:
    """The page of a sweep, one HTML file with everything inside."""
    order = ranked(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.point))
    rows = [
        [str(rank), str(t.number), score_text(t.score), f"{t.epochs}/{t.total}", t.state,
         *[short(t.point.get(name, "")) for name in names]]
        for rank, t in enumerate(order[:SHOWN], 1)
    ]  # fmt: skip
    columns = ["rank", "trial", "score", "epochs", "state", *[name.rpartition(".")[2] for name in names]]
    failed = [[str(t.number), t.reason] for t in trials if t.state == "failed"]
    return render(
        "sweep.html",
        summary=summary, trials=len(trials), figures=figures, leaderboard=Table(columns, rows, marked=0),
        schedule=_schedule(order[0]), compared=_compared(summary["compared"]),
        failed=Table(["trial", "reason"], failed),
    )  # fmt: skip


def _schedule(best: Trial) -> Table | None:
    """The values of a member of a population, one row for each change; None without changes."""
    if best.config is None or not best.config.changes:
        return None
    segments = [(after, config.model_dump(mode="json")) for after, config in best.config.segments()]
    rows = [[str(after), *[short(look_up(table, name)) for name in best.point]] for after, table in segments]
    return Table(["epochs", *[name.rpartition(".")[2] for name in best.point]], rows)


def _compared(sides: Mapping[str, Any]) -> Table | None:
    """Scores of winner and default over the report seeds; None without report seeds."""
    if not sides:
        return None
    names = list(dict.fromkeys(name for side in sides.values() for name in side["mean"]))
    rows = [
        [title, str(side["trial"]), ", ".join(str(line["seed"]) for line in side["seeds"]),
         *[f"{side['mean'][name]:.4f} ± {side['std'][name]:.4f}" if side["mean"] else "-" for name in names]]
        for title, side in sides.items()
    ]  # fmt: skip
    return Table(["config", "trial", "seeds", *[name.replace("_", " ") for name in names]], rows, marked=0)
