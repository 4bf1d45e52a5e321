"""Figures and the page: drawn from metrics alone, complete in one file, equal when repeated."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from hashray.evaluate.codewords import analyse
from hashray.report import bits, drawn, figures
from hashray.report import page as report

ROOT = Path(__file__).parents[2]
CURVE = {"precision": [0.9, 0.5, 0.1], "recall": [0.0, 0.6, 1.0]}


def result(name: str, num_bits: int | None, score: float) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "num_bits": num_bits, "top_k": None, "ties": "expected", "mAP": score}
    if num_bits:
        row |= {"precision_at": {"1": 0.9, "10": 0.8, "100": 0.7}, "precision_radius_2": 0.6, "pr_curve": CURVE}
    return row


@pytest.fixture
def metrics() -> dict[str, Any]:
    neighbours = [
        {"id": "n1", "distance": 0, "labels": ["cat"], "relevant": True},
        {"id": "gone", "distance": 3, "labels": [], "relevant": False},
    ]
    shared = {"average_precision": 0.5, "neighbours": neighbours}
    return {
        "protocol": {"name": "per-class", "queries": 2, "database": 3, "classes": 2, "top_k": None},
        "environment": {"commit": "abc", "command": "hashray evaluate"},
        "results": [result("dseh", 16, 0.9), result("itq", 16, 0.7), result("float-cosine", None, 0.8)],
        "distances": {"relevant": [0.5, 0.5, 0.0], "other": [0.0, 0.1, 0.9]},
        "gallery": [
            {"query": "q<1>", "labels": ["<b>"], "kind": "spread", **shared},
            {"query": "q2", "labels": ["cat"], "kind": "worst", **shared},
        ],
    }


def png_of(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def rich(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same with a sample of codes and with confusions: every figure but those of codewords."""
    codes = np.random.default_rng(0).integers(0, 256, (40, 2), np.uint8)
    counted = {"neighbours": 10, "queries": 40, "rows": 90, "classes": ["<b>", "cat"], "left_out": 0,
               "shares": [[0.75, 0.25], [0.0, 1.0]], "pairs": [["<b>", "cat", 0.25]]}  # fmt: skip
    sample = {"codes": [code.tobytes().hex() for code in codes], "labels": [0, 1] * 20}
    return {**metrics, "sample": sample, "confusions": counted, "classes": ["<b>", "cat"]}


def test_figures_are_pictures_and_repeat_exactly(metrics: dict[str, Any]) -> None:
    first, second = drawn.draw_all(rich(metrics)), drawn.draw_all(rich(metrics))
    assert first == second and set(first) == {
        "scores", "precision_recall", "precision_at", "distances", "confusions", "bit_balance", "bit_correlations",
        "codes",
    }  # fmt: skip
    for picture in first.values():
        with Image.open(io.BytesIO(picture.png)) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24) or []) > 10
        tree = ElementTree.fromstring(picture.svg)
        assert tree.tag.endswith("}svg") and len(list(tree.iter())) > 50
        assert b"<dc:date>" not in picture.svg and b"Matplotlib v" not in picture.svg
    assert set(drawn.draw_all(metrics)) == {"scores", "precision_recall", "precision_at", "distances"}
    assert set(drawn.files({"a": first["scores"]})) == {"figures/a.png", "figures/a.svg"}


def test_bits_are_drawn_as_they_are() -> None:
    codes = np.packbits(np.array([[1, 0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0]], np.uint8), axis=1)
    texts = [code.tobytes().hex() for code in codes]
    assert [bar.get_height() for bar in bits.bit_balance(texts).axes[0].patches] == [1, 0, 0.5, 0.5, 0.5, 0, 0, 0]
    matrix = bits.bit_correlations(texts).axes[0].images[0].get_array()
    assert matrix is not None and np.allclose(np.diag(matrix), [0, 0, 1, 1, 1, 0, 0, 0])
    assert np.isclose(matrix[2, 3], 1) and np.isclose(matrix[2, 4], -1) and matrix[0, 2] == 0


def test_curves_hold_the_numbers_of_the_results(metrics: dict[str, Any]) -> None:
    axes = figures.precision_recall(metrics["results"]).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"dseh", "itq"}  # float cosine has no radius
    assert np.allclose(lines["dseh"].get_xydata(), [[0.6, 0.5], [1.0, 0.1]])  # no point for a radius without hits
    bars = figures.scores(metrics["results"]).axes[0].patches
    assert [bar.get_width() for bar in bars] == [0.7, 0.8, 0.9]


def test_scenarios_have_a_table_each_and_their_harmonic_means(metrics: dict[str, Any]) -> None:
    rows = [{**row, "scenario": name} for name in ("within", "cross", "generalised") for row in metrics["results"]]
    rows[3]["mAP"] = 0.4321
    analysis = analyse(np.arange(16, dtype=np.uint8).reshape(8, 2), list("abcdefgh"), 16)
    split = {**metrics, "results": rows, "harmonic_mean": {"dseh": 0.5757}, "codewords": analysis}
    pictures = drawn.draw_all(split)
    assert {"codeword_distances", "codeword_graph"} < set(pictures)
    page = report.page(split, pictures, {})
    assert page.count("<table") == 4 and "0.4321" in page and "0.5757" in page and "never saw" in page


def test_all_html_is_in_templates_and_every_value_is_escaped() -> None:
    for path in [*(ROOT / "hashray/report").glob("*.py"), *(ROOT / "hashray/tune").glob("*.py")]:
        assert not re.search(r"</\w+>", path.read_text()), path
    hostile = report.Table(["<i>"], [["<script>"]])
    for template in ("evaluation.html", "sweep.html"):
        with pytest.raises(UndefinedError):
            report.render(template)
    summary = {"trials": 1, "stopped": 0, "failed": [], "epochs": 1, "epochs_of_full_grid": 3, "importance": {}}
    values = {
        "summary": summary,
        "trials": 1,
        "figures": {"<x>": drawn.Drawn(b"png", b"svg")},
        "schedule": None,
        "compared": None,
    }
    page = report.render("sweep.html", **values, leaderboard=hostile, failed=hostile)
    assert page.count("<script>") == 1 and "<i>" not in page and "<x>" not in page
    assert page.count("&lt;script&gt;") == 2
    assert "1 of 3 epochs trained (33%)" in page


def test_the_page_is_one_file_with_every_number_and_picture(metrics: dict[str, Any]) -> None:
    images = {"q<1>": png_of(0), "q2": b"broken", "n1": png_of(1)}
    page = report.page(rich(metrics), drawn.draw_all(rich(metrics)), images)
    assert not re.search(r'src="(?!data:)', page) and page.count("<script") == 1
    links = re.findall(r'href="([^"]*)"', page)
    assert sorted(links) == sorted(drawn.files(drawn.draw_all(rich(metrics))))
    assert "AP 0.50" in page and "mixed most" in page and "25.0%" in page
    for text in ("0.9000", "0.7000", "0.8000", "2 queries against 3 rows", "✓", "✗", "lowest average precision"):
        assert text in page, text
    assert page.count('class="card right"') == 2 and page.count('class="card wrong"') == 2
    assert page.count('class="none"') == 3  # a broken image, and twice a row without image
    assert "<b>," not in page and "&lt;b&gt;" in page and "q&lt;1&gt;" in page
    assert "Self-training" not in page
    line = {
        "round": 1,
        "accepted": 1500,
        "unlabelled": 2000,
        "precision": 0.875,
        "before": 0.5,
        "validation_map": 0.625,
    }
    trained = report.page({**metrics, "training": {"rounds": [line], "best_round": 1}}, {}, {})
    assert "1,500 of 2,000" in trained and "87.5%" in trained and "0.5000 → 0.6250" in trained
    assert "shows the model of round 1: it has the best" in trained
    kept = report.page({**metrics, "training": {"rounds": [line], "best_round": 0}}, {}, {})
    assert "the model of round 0, trained without any of these labels: it has" in kept
    assert "No gallery" in report.page({**metrics, "gallery": []}, {}, {})
