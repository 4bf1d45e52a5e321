"""The page of a sweep: leaderboard, learning curves, parallel coordinates, importance, winner beside default."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hashray.report.figures import INK, OURS, new_axes
from hashray.report.page import document, grid, pictures
from hashray.tune.leaderboard import Trial, ranked
from hashray.tune.live import short
from hashray.tune.space import look_up

SHOWN = 20
UNEXPLAINED = "No importance: too few trials reported after the same epochs with values of their own."


def draw(trials: Sequence[Trial], summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of a sweep, by name."""
    found = {"learning_curves": learning_curves(trials, summary), "parallel_coordinates": parallel_coordinates(trials)}
    if summary["importance"]:
        found["importance"] = importance_bars(summary["importance"])
    return found


def learning_curves(trials: Sequence[Trial], summary: Mapping[str, Any]) -> Figure:
    """Validation over epochs; the best trial and the default stand out, crosses where the scheduler stopped one."""
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
    """One vertical axis a dimension, each from its lowest to its highest value tried (log where all lie above 0)."""
    scored = [trial for trial in reversed(ranked(trials)) if trial.score is not None]
    names = list(dict.fromkeys(name for trial in scored for name in trial.point))
    figure, axes = new_axes("Parallel coordinates", "", "")
    axes.set_yticks([])
    axes.grid(visible=False)
    columns = {name: _places([trial.point.get(name) for trial in scored]) for name in names}
    columns["score"] = _places([trial.score for trial in scored], log=False)
    for rank, _ in enumerate(scored):
        points = [(x, places[0][rank]) for x, places in enumerate(columns.values())]
        kept = [(x, y) for x, y in points if y is not None]
        share = (rank + 1) / len(scored)
        tint = OURS if rank == len(scored) - 1 else colormaps["Greys"](0.15 + 0.6 * share)
        axes.plot(
            [x for x, _ in kept], [y for _, y in kept], color=tint, linewidth=0.8 + 1.4 * share**4, zorder=1 + rank
        )
    for x, (_, told) in enumerate(columns.values()):
        axes.plot([x, x], [0, 1], color=INK, linewidth=0.8, zorder=0)
        for y, name in told.items():
            if y in (0, 1):
                axes.text(x, 1.08 * y - 0.04, name, ha="center", va="bottom" if y else "top", fontsize=7, color=INK)
            else:
                axes.text(x + 0.04, y, name, ha="left", va="center", fontsize=7, color=INK, zorder=2 * len(scored))
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], rotation=20)
    axes.set_ylim(-0.12, 1.14)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _places(values: Sequence[Any], log: bool = True) -> tuple[list[float | None], dict[float, str]]:
    """Where each value stands between the lowest (0) and the highest (1), and what the ends, or choices, are called."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        scale = math.log if log and min(present) > 0 else float
        low, high = scale(min(present)), scale(max(present))
        span = (high - low) or 1.0
        places = [None if v is None else (scale(v) - low) / span for v in values]
        return places, {0.0: short(min(present)), 1.0: short(max(present))}
    names = sorted({str(value) for value in present})
    span = max(1, len(names) - 1)
    places = [None if v is None else names.index(str(v)) / span for v in values]
    return places, {i / span: name for i, name in enumerate(names)}


def importance_bars(found: Mapping[str, Any]) -> Figure:
    """A bar for each dimension, by method where there are several."""
    bars = [
        (name if len(found) == 1 else f"{name} ({kind})", share)
        for kind, own in found.items()
        for name, share in own["shares"].items()
    ]
    bars.sort(key=lambda bar: bar[1])
    figure, axes = new_axes("Importance", "share of the score's variance", "")
    axes.barh([name for name, _ in bars], [share for _, share in bars], color=OURS, height=0.6)
    axes.set_xlim(0, 1)
    return figure


def sweep_page(trials: Sequence[Trial], summary: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """The page, one HTML file with everything inside."""
    order = ranked(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.point))
    rows = [
        [str(rank), str(t.number), _score(t.score), f"{t.epochs}/{t.total}", t.state,
         *[short(t.point.get(name, "")) for name in names]]
        for rank, t in enumerate(order[:SHOWN], 1)
    ]  # fmt: skip
    share = summary["epochs"] / summary["epochs_of_full_grid"]
    lead = (
        f"{summary['trials']} trials, {summary['stopped']} stopped early, {len(summary['failed'])} failed; "
        f"{summary['epochs']:,} of {summary['epochs_of_full_grid']:,} epochs trained ({share:.0%})"
    )
    columns = ["rank", "trial", "score", "epochs", "state", *[name.rpartition(".")[2] for name in names]]
    failed = [[str(t.number), t.reason] for t in trials if t.state == "failed"]
    body = (
        f"<h2>Leaderboard{f': the best {SHOWN} of {len(order)}' if len(order) > SHOWN else ''}</h2>"
        f"{grid(columns, rows, ours=0)}"
        f"{_changes(order[0])}{_compared(summary['compared'], summary['verdict'])}"
        f'<h2>Trials</h2><div class="figures">{pictures(figures)}</div>'
        + ("" if summary["importance"] else f"<p>{UNEXPLAINED}</p>")
        + (f"<h2>Failed trials</h2>{grid(['trial', 'reason'], failed)}" if failed else "")
    )
    return document("Sweep", lead, body)


def _changes(best: Trial) -> str:
    if best.config is None or not best.config.changes:
        return ""
    names = list(best.point)
    tables = [(after, own.model_dump(mode="json")) for after, own in best.config.segments()]
    rows = [[str(after), *[short(look_up(table, name)) for name in names]] for after, table in tables]
    title = "<h2>The schedule of the best</h2><p>Values from so many epochs on, as best.toml has them.</p>"
    return title + grid(["epochs", *[name.rpartition(".")[2] for name in names]], rows)


def _compared(found: Mapping[str, Any], verdict: str) -> str:
    if not found:
        return ""
    names = list(dict.fromkeys(name for own in found.values() for name in own["mean"]))
    rows = [
        [who, str(own["trial"]), ", ".join(str(line["seed"]) for line in own["seeds"]),
         *[f"{own['mean'][name]:.4f} ± {own['std'][name]:.4f}" if own["mean"] else "-" for name in names]]
        for who, own in found.items()
    ]  # fmt: skip
    title = "The winner beside the default" if len(rows) > 1 else "The winner"
    note = f"<p>{verdict} Trained anew with each seed; the queries were read here for the first time.</p>"
    return f"<h2>{title}</h2>{note}{grid(['config', 'trial', 'seeds', *[n.replace('_', ' ') for n in names]], rows, 0)}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
