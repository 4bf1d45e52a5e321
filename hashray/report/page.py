"""The page of an evaluation: one HTML file with everything inside, no script, no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from hashray.data.images import BadImage, decode
from hashray.report.calibration import baselines_not_beaten

THUMB_PIXELS = 72
CAPTIONS = {
    "scores": "Every method on the same features, rows and queries.",
    "precision_recall": "One point for each Hamming radius; further right is a larger radius.",
    "precision_at": "Averaged over all orders of rows at the same distance.",
    "codeword_distances": "Each class has a codeword; the rows are ordered by community.",
    "codeword_graph": "Each class and its three nearest; thicker lines are nearer, colours are communities.",
    "learning_curves": "Validation after every pass; a cross ends a trial that was stopped early.",
    "parallel_coordinates": "A line for each trial through its values; the darker, the better its score.",
    "importance": "Share of the score's variance, at the first report that all trials made.",
    "distances": "The further the two hills lie apart, the better the codes separate.",
}
STYLE = """
:root { color-scheme: light; --ink: #1d2433; --soft: #5b6478; --line: #e4e7ee; --ours: #c2410c;
        --right: #15803d; --wrong: #b91c1c; }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 40px 24px 80px; color: var(--ink); background: #fff;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px } h2 { font-size: 19px; margin: 44px 0 12px }
h3 { font-size: 15px; margin: 28px 0 4px }
p.lead { color: var(--soft); margin: 0 0 24px }
.tiles { display: flex; flex-wrap: wrap; gap: 12px }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; min-width: 132px }
.tile b { display: block; font-size: 24px } .tile span { color: var(--soft); font-size: 13px }
.tile.ours b { color: var(--ours) }
table { border-collapse: collapse; width: 100% } th, td { padding: 7px 10px; border-bottom: 1px solid var(--line) }
th { text-align: right; font-weight: 600; font-size: 13px; color: var(--soft) } td { text-align: right }
th:first-child, td:first-child { text-align: left } tr.ours td { font-weight: 650; color: var(--ours) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 22px }
figure { margin: 0 } figure img { width: 100%; border: 1px solid var(--line); border-radius: 10px }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px }
.row { display: flex; align-items: flex-start; gap: 10px; padding: 10px 0; border-bottom: 1px solid var(--line);
       overflow-x: auto }
.card { width: 84px; flex: none; text-align: center; font-size: 12px; color: var(--soft) }
.card img { width: 72px; height: 72px; object-fit: contain; background: #f4f5f8; border-radius: 8px; display: block;
            margin: 0 auto 3px; border: 3px solid transparent; image-rendering: auto }
.card.query { margin-right: 14px } .card.query img { border-color: var(--ink) }
.card.right img { border-color: var(--right) } .card.wrong img { border-color: var(--wrong) }
.mark { font-weight: 700 } .right .mark { color: var(--right) } .wrong .mark { color: var(--wrong) }
.none { width: 72px; height: 72px; background: #f4f5f8; border-radius: 8px; margin: 0 auto 3px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; font-size: 13px } dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace }
"""


def page(metrics: Mapping[str, Any], figures: Mapping[str, bytes], images: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        metrics: what metrics.json holds.
        figures: PNG bytes by name.
        images: encoded image bytes by row id, for the gallery; a missing one becomes an empty square.
    """
    ours, protocol = metrics["results"][0], metrics["protocol"]
    title = f"{ours['name'].upper()}, {ours['num_bits']} bits"
    depth = f"mAP@{ours['top_k']}" if ours["top_k"] else "mAP"
    lead = (
        f"{protocol['queries']:,} queries against {protocol['database']:,} rows, {protocol['classes']} classes; "
        f"{depth} over {'all orders of ties' if ours['ties'] == 'expected' else ours['ties'] + ' ties'}"
    )
    return document(
        title, lead,
        f"{_tiles(metrics, depth)}"
        f"<h2>Beside the baselines</h2>{_tables(metrics, depth)}"
        f'<h2>Curves</h2><div class="figures">{pictures(figures)}</div>'
        f"<h2>Queries and their nearest rows</h2>{_gallery(metrics, images)}"
        f"{_rounds(metrics.get('training', {}))}"
        f"<h2>Code health</h2>{_facts(ours.get('code_health', {}))}"
        f"<h2>How this was made</h2>{_facts({**protocol, **metrics['environment']})}",
    )  # fmt: skip


def document(title: str, lead: str, body: str) -> str:
    """A page of ours: heading, one line below it, and the body's HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} - hashray</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{body}</body></html>'
    )


def pictures(figures: Mapping[str, bytes]) -> str:
    """PNG bytes by name, each with its caption."""
    return "".join(
        f'<figure><img alt="{html.escape(name)}" src="{_uri(data, "png")}">'
        f"<figcaption>{html.escape(CAPTIONS.get(name, name))}</figcaption></figure>"
        for name, data in figures.items()
    )


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], ours: int | None = None) -> str:
    """A table of text; row `ours` is marked."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    marked = [' class="ours"' if i == ours else "" for i in range(len(lines))]
    body = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marked, lines, strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _rounds(training: Mapping[str, Any]) -> str:
    """Self-training, round by round; nothing where there was none."""
    if not training.get("rounds"):
        return ""
    rows = []
    for line in training["rounds"]:
        right = "-" if line["precision"] is None else f"{line['precision']:.1%}"
        accepted = f"{line['accepted']:,} of {line['unlabelled']:,}"
        change = f"{line['before']:.4f} → {line['validation_map']:.4f}"
        rows.append([str(line["round"]), accepted, right, change])
    best = training.get("best_round", 0)
    note = f"This page is of the model of round {best}" + ("" if best else ", trained without any of these labels")
    table = grid(("round", "rows accepted", "labels true", "validation mAP"), rows, best - 1 if best else None)
    return f"<h2>Self-training</h2>{table}<p>{note}: of all rounds it has the best validation mAP.</p>"


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _tiles(metrics: Mapping[str, Any], depth: str) -> str:
    ours = metrics["results"][0]
    first = ours.get("scenario")
    by_name = {result["name"]: result for result in metrics["results"] if result.get("scenario") == first}
    tiles = [(f"{ours['mAP']:.4f}", f"{depth} of {ours['name']}", "ours")]
    tiles += [(f"{by_name[n]['mAP']:.4f}", f"{depth} of {n}", "") for n in ("itq", "float-cosine") if n in by_name]
    near = ours.get("precision_at", {}).get("10")
    if near is not None:
        tiles.append((f"{near:.3f}", "precision@10", ""))
    tiles.append((f"{ours['precision_radius_2']:.3f}", "precision within radius 2", ""))
    body = "".join(f'<div class="tile {css}"><b>{value}</b><span>{name}</span></div>' for value, name, css in tiles)
    return f'<div class="tiles">{body}</div>'


SCENARIOS = {
    "within": "Within: queries and database from the classes that training saw",
    "cross": "Cross: queries and database from classes that training never saw",
    "generalised": "Generalised: queries from unseen classes, a database of all classes",
}


def _tables(metrics: Mapping[str, Any], depth: str) -> str:
    """One table, or one for each scenario and the harmonic means of the first two."""
    results = metrics["results"]
    names = list(dict.fromkeys(result.get("scenario") for result in results))
    if names == [None]:
        return _table(results, depth)
    parts = [
        f"<h3>{html.escape(SCENARIOS.get(name, name))}</h3>"
        + _table([result for result in results if result["scenario"] == name], depth)
        for name in names
    ]
    means = sorted(metrics.get("harmonic_mean", {}).items(), key=lambda pair: -pair[1])
    ours = [name for name, _ in means].index(results[0]["name"])
    table = grid(("method", "2WC / (W + C)"), [[name, f"{value:.4f}"] for name, value in means], ours)
    return "".join(parts) + f"<h3>Harmonic mean of within and cross</h3>{table}"


def _table(results: Sequence[Mapping[str, Any]], depth: str) -> str:
    by_score = sorted(results, key=lambda result: -result["mAP"])
    rows = []
    for result in by_score:
        near = result.get("precision_at", {})
        rows.append([
            result["name"], str(result["num_bits"] or "float"), f"{result['mAP']:.4f}",
            _number(near.get("10")), _number(near.get("100")), _number(result.get("precision_radius_2")),
        ])  # fmt: skip
    table = grid(("method", "bits", depth, "P@10", "P@100", "radius 2"), rows, by_score.index(results[0]))
    reached = ", ".join(baselines_not_beaten(results))
    note = f"<p>{html.escape(results[0]['name'])} is not above {html.escape(reached)} here.</p>" if reached else ""
    return table + note


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gallery(metrics: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    rows = []
    shown_hard = False
    for entry in metrics["gallery"]:
        if entry["hardest"] and not shown_hard:
            rows.append("<h3>The queries with the lowest average precision</h3>")
            shown_hard = True
        query = _card(images.get(entry["query"]), entry["query"], "query", "query", entry["labels"])
        cards = [
            _card(
                images.get(n["id"]), n["id"], "right" if n["relevant"] else "wrong",
                f'<span class="mark">{"✓" if n["relevant"] else "✗"}</span> at {n["distance"]}', n["labels"],
            )
            for n in entry["neighbours"]
        ]  # fmt: skip
        rows.append(f'<div class="row">{query}{"".join(cards)}</div>')
    legend = "<p class='lead'>Nearest first, with the Hamming distance in bits; ✓ shares a class with the query.</p>"
    return legend + "".join(rows) if rows else "<p>No gallery was asked for.</p>"


def _card(data: bytes | None, row_id: str, css: str, first_line: str, labels: list[str]) -> str:
    picture = _thumbnail(data)
    shown = f'<img alt="" src="{_uri(picture, "png")}">' if picture else '<div class="none"></div>'
    names = html.escape(", ".join(labels)) or "no label"
    return f'<div class="card {css}" title="{html.escape(row_id)}">{shown}{first_line}<br>{names}</div>'


def _thumbnail(data: bytes | None) -> bytes | None:
    if data is None:
        return None
    try:
        image = decode(data)
    except BadImage:
        return None
    scale = THUMB_PIXELS * 2 / max(image.size)
    sharp = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BILINEAR
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), sharp)
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def _facts(facts: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    rows = (f"<dt>{html.escape(k.replace('_', ' '))}</dt><dd>{html.escape(text(v))}</dd>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"
