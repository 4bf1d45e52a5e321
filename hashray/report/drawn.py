"""Figures as files: each one as PNG and as SVG, equal bytes for equal data; and all figures of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from hashray.report import bits, figures


class Drawn(NamedTuple):
    """A figure as the bytes of a PNG file and of an SVG file."""

    png: bytes
    svg: bytes


def draw(figure: Figure) -> Drawn:
    """Render a figure. Without dates, versions and random ids, equal data give equal bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    figure.set_layout_engine("none")  # its places are final
    with rc_context({"svg.hashsalt": "hashray"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Drawn(png.getvalue(), svg.getvalue())


def files(pictures: Mapping[str, Drawn]) -> dict[str, bytes]:
    """The bytes of figures by the names of their files, figures/NAME.png and figures/NAME.svg."""
    return {f"figures/{name}.{kind}": getattr(drawn, kind)
            for name, drawn in pictures.items() for kind in Drawn._fields}  # fmt: skip


def draw_all(metrics: Mapping[str, Any]) -> dict[str, Drawn]:
    """Draw every figure of an evaluation from the content of its metrics.json; by file stem."""
    first = metrics["results"][0].get("scenario")
    results = [result for result in metrics["results"] if result.get("scenario") == first]
    ours = results[0]
    drawn = {
        "scores": figures.scores(results),
        "precision_recall": figures.precision_recall(results),
        "precision_at": figures.precision_at(results),
        "distances": figures.distances(metrics["distances"], ours["name"]),
    }
    if "confusions" in metrics:
        drawn["confusions"] = figures.confusions(metrics["confusions"])
    if codes := metrics.get("sample", {}).get("codes"):
        drawn |= {"bit_balance": bits.bit_balance(codes), "bit_correlations": bits.bit_correlations(codes)}
        title = f"t-SNE of {len(codes):,} query codes: {ours['name']}, {ours['num_bits']} bits"
        points = bits.embed(codes, 0)
        drawn["codes"] = figures.code_map(points, metrics["sample"]["labels"], metrics["classes"], title)
    if "codewords" in metrics:
        drawn["codeword_distances"] = figures.codeword_distances(metrics["codewords"])
        drawn["codeword_graph"] = figures.codeword_graph(metrics["codewords"])
    return {name: draw(figure) for name, figure in drawn.items()}
