"""The page of an evaluation: one HTML file with everything inside, no network; its one script sorts tables.

This file turns metrics into plain data; all HTML is in templates/.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from hashray.data.images import BadImage, decode
from hashray.report.calibration import baselines_not_beaten
from hashray.report.drawn import Drawn

THUMB_PIXELS = 72


class Table(NamedTuple):
    """A table of text. Row `marked` is ours."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None


def render(template: str, **values: Any) -> str:
    """Fill a template of templates/. Every value is escaped, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("hashray.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"thousands": "{:,}".format, "png_url": _png_url}
    return environment.get_template(template).render(values)


def score_text(value: float | None) -> str:
    """A score with four digits, or a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def page(metrics: Mapping[str, Any], figures: Mapping[str, Drawn], images: Mapping[str, bytes]) -> str:
    """The page of an evaluation.

    Args:
        metrics: the content of metrics.json.
        figures: by name; the page shows them and links their files, figures/NAME.png and figures/NAME.svg.
        images: encoded image bytes by row id, for the gallery. A missing image becomes an empty square.
    """
    ours, protocol, training = metrics["results"][0], metrics["protocol"], metrics.get("training", {})
    depth = f"mAP@{ours['top_k']}" if ours["top_k"] else "mAP"
    shown = {row["id"] for entry in metrics["gallery"] for row in entry["neighbours"]}
    shown |= {entry["query"] for entry in metrics["gallery"]}
    return render(
        "evaluation.html",
        ours={"code_health": {}} | ours, protocol=protocol, origin={**protocol, **metrics["environment"]}, depth=depth,
        tiles=list(_tiles(metrics["results"], depth)), results=list(_results(metrics["results"], depth)),
        means=_means(metrics), figures=figures, gallery=metrics["gallery"],
        thumbnails={row_id: thumbnail(images.get(row_id)) for row_id in shown},
        rounds=_rounds(training), best_round=training.get("best_round", 0), confusions=_confusions(metrics),
    )  # fmt: skip


def _tiles(results: Sequence[Mapping[str, Any]], depth: str) -> Iterator[tuple[str, str]]:
    """Name and value of the numbers at the top of the page, ours first."""
    ours = results[0]
    by_name = {row["name"]: row for row in results if row.get("scenario") == ours.get("scenario")}
    yield f"{depth} of {ours['name']}", f"{ours['mAP']:.4f}"
    for name in ("itq", "float-cosine"):
        if name in by_name and name != ours["name"]:
            yield f"{depth} of {name}", f"{by_name[name]['mAP']:.4f}"
    near = ours.get("precision_at", {}).get("10")
    if near is not None:
        yield "precision@10", f"{near:.3f}"
    yield "precision within radius 2", f"{ours['precision_radius_2']:.3f}"


def _results(results: Sequence[Mapping[str, Any]], depth: str) -> Iterator[dict[str, Any]]:
    """The table of results, or one table for each scenario of a class split."""
    for scenario in dict.fromkeys(row.get("scenario") for row in results):
        rows = [row for row in results if row.get("scenario") == scenario]
        ranked = sorted(rows, key=lambda row: -row["mAP"])
        cells = [
            [
                row["name"], str(row["num_bits"] or "float"), score_text(row["mAP"]),
                score_text(row.get("precision_at", {}).get("10")), score_text(row.get("precision_at", {}).get("100")),
                score_text(row.get("precision_radius_2")),
            ]
            for row in ranked
        ]  # fmt: skip
        columns = ("method", "bits", depth, "P@10", "P@100", "radius 2")
        table = Table(columns, cells, ranked.index(rows[0]))
        yield {"scenario": scenario, "table": table, "not_beaten": baselines_not_beaten(rows)}


def _means(metrics: Mapping[str, Any]) -> Table | None:
    """Harmonic mean of the within and cross scores; None for a corpus without a class split."""
    if metrics["results"][0].get("scenario") is None:
        return None
    means = sorted(metrics.get("harmonic_mean", {}).items(), key=lambda pair: -pair[1])
    ours = [name for name, _ in means].index(metrics["results"][0]["name"])
    return Table(("method", "2WC / (W + C)"), [[name, score_text(value)] for name, value in means], ours)


def _confusions(metrics: Mapping[str, Any]) -> Table | None:
    """The pairs of classes that are mixed most; None where all neighbours share the query's class."""
    pairs = metrics.get("confusions", {}).get("pairs")
    if not pairs:
        return None
    return Table(("class of the query", "class of the neighbours", "share"), [[a, b, f"{c:.1%}"] for a, b, c in pairs])


def _rounds(training: Mapping[str, Any]) -> Table | None:
    """The rounds of self-training; None for a training without it."""
    rounds, best = training.get("rounds"), training.get("best_round", 0)
    if not rounds:
        return None
    rows = [
        [
            str(line["round"]), f"{line['accepted']:,} of {line['unlabelled']:,}",
            "-" if line["precision"] is None else f"{line['precision']:.1%}",
            f"{line['before']:.4f} → {line['validation_map']:.4f}",
        ]
        for line in rounds
    ]  # fmt: skip
    return Table(("round", "rows accepted", "labels true", "validation mAP"), rows, best - 1 if best else None)


def _png_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes | None) -> bytes | None:
    """PNG bytes at twice the size on the page; None if the image is missing or does not decode."""
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
