"""Codeword analysis, and `hashray figures`, which draws evaluations beside each other from their JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hashray import artifact
from hashray.artifact import Manifest, canonical
from hashray.cli import main
from hashray.codes import binarize, hamming
from hashray.errors import InputError, MismatchError
from hashray.evaluate.codewords import analyse
from hashray.evaluate.scoring import harmonic_means
from hashray.methods.codewords import spread_codewords
from hashray.report.bits import embed
from hashray.report.compare import FiguresConfig, comparable, compare
from hashray.report.figures import layout
from hashray.storage import open_store


def words(seed: int = 0, count: int = 8) -> np.ndarray:
    """Codewords in two groups of four, near each other within a group."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0, 0, 0], [255, 255, 255, 255]], dtype=np.uint8)
    flips = (1 << rng.integers(0, 8, (count, 4))).astype(np.uint8)
    return centres[np.arange(count) % 2] ^ flips


def test_codewords_against_a_loop_and_their_communities() -> None:
    codes, names = words(), list("abcdefgh")
    analysis = analyse(codes, names, 32)
    assert np.array_equal(analysis["distances"], hamming(codes, codes))
    pairs = [analysis["distances"][i][j] for i in range(8) for j in range(i)]
    assert analysis["smallest"] == min(pairs) and analysis["duplicates"] == sum(d == 0 for d in pairs)
    for i, name in enumerate(names):
        order = sorted((analysis["distances"][i][j], names[j]) for j in range(8) if j != i)[:3]
        assert [(n["distance"], n["class"]) for n in analysis["nearest"][name]] == order
    assert analysis["communities"] == [["a", "c", "e", "g"], ["b", "d", "f", "h"]]
    assert analysis == analyse(codes, names, 32) and json.loads(canonical(analysis)) == analysis
    assert layout(analysis).shape == (8, 2)


def test_one_class_and_two_equal_ones() -> None:
    assert analyse(words(count=1), ["a"], 32)["smallest"] is None
    twice = analyse(np.zeros((2, 4), np.uint8), ["a", "b"], 32)
    assert (twice["smallest"], twice["duplicates"]) == (0, 1)


def test_codewords_that_are_all_equally_far_apart_have_no_relations() -> None:
    names = list("abcdefgh")
    spread = binarize(spread_codewords(8, 32).astype(float))
    analysis = analyse(spread, names, 32)
    assert analysis["edges"] == [] and analysis["communities"] == [[name] for name in names]
    nearer = spread.copy()
    nearer[7] = spread[0] ^ np.array([1, 0, 0, 0], np.uint8)  # h and a differ in one bit
    analysis = analyse(nearer, names, 32)
    assert max(analysis["edges"], key=lambda edge: edge[2]) == [0, 7, 1 - 1 / 32]
    assert any({"a", "h"} <= set(group) for group in analysis["communities"])
    assert all(7 in edge[:2] for edge in analysis["edges"])  # no edge between classes that did not move


def test_harmonic_means_need_both_scenarios() -> None:
    rows = [
        {"name": n, "scenario": s, "mAP": v}
        for n, s, v in (("x", "within", 0.8), ("x", "cross", 0.4), ("y", "within", 1))
    ]
    assert harmonic_means(rows) == {"x": pytest.approx(2 * 0.8 * 0.4 / 1.2)}
    assert harmonic_means([{"name": "x", "mAP": 1.0}]) == {}


def evaluation(folder: Path, name: str, score: float, corpus: str = "c") -> str:
    rng = np.random.default_rng(0)
    curve = {"precision": [0.9, 0.5], "recall": [0.5, 1.0]}
    row = {"num_bits": 32, "top_k": None, "precision_at": {"1": 0.9, "10": 0.8}, "pr_curve": curve}
    classes = list("abcdefgh")
    codes = [code.tobytes().hex() for code in rng.integers(0, 256, (40, 4), np.uint8)]
    metrics: dict[str, Any] = {
        "protocol": {"corpus": corpus}, "classes": classes, "codewords": analyse(words(), classes, 32),
        "results": [{"name": name, "mAP": score, **row}, {"name": "itq", "mAP": 0.3, **row}],
        "sample": {"codes": codes, "labels": [0, -1] * 20},
    }  # fmt: skip
    store = open_store(folder)
    record = artifact.write_file(store, "metrics.json", canonical(metrics))
    manifest = Manifest(kind="evaluation", project_version="0", config={}, parents={}, files=(record,))
    artifact.publish(store, manifest)
    return str(folder)


def test_figures_of_two_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = evaluation(tmp_path / "a", "dseh", 0.7), evaluation(tmp_path / "b", "adalabelhash", 0.8)
    assert main(["figures", *urls, "--out", str(tmp_path / "out")]) == 0
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    each = {f"{kind}_{n}" for kind in ("codes", "codeword_distances", "codeword_graph") for n in "ab"}
    assert names == {"scores", "precision_recall", "precision_at"} | each
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    before = (tmp_path / "out/codes_a.png").read_bytes()
    compare(FiguresConfig(evaluations=urls, out=str(tmp_path / "again")))
    assert (tmp_path / "again/codes_a.png").read_bytes() == before


def test_labels_of_runs_with_different_code_lengths_name_the_length() -> None:
    def run(bits: int) -> dict[str, Any]:
        rows = [
            {"name": "dseh", "num_bits": bits},
            {"name": "itq", "num_bits": bits},
            {"name": "float-cosine", "num_bits": 0},
        ]
        return {"protocol": {}, "results": rows}

    labels = [row["label"] for row in comparable({"a": run(24), "b": run(48)}, None)]
    assert labels == ["dseh a, 24 bits", "dseh b, 48 bits", "itq, 24 bits", "float-cosine"]


def test_evaluations_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    one, other = evaluation(tmp_path / "a", "dseh", 0.7), evaluation(tmp_path / "b", "dseh", 0.7, corpus="d")
    with pytest.raises(MismatchError, match=r"differ in corpus \(c, d\)"):
        compare(FiguresConfig(evaluations=(one, other), out=str(tmp_path / "out")))
    with pytest.raises(InputError, match="no scenario 'cross'; it has None"):
        compare(FiguresConfig(evaluations=(one,), out=str(tmp_path / "out"), scenario="cross"))
    with pytest.raises(InputError, match=r"the same evaluation is named twice: .*; name each once"):
        compare(FiguresConfig(evaluations=(one, one), out=str(tmp_path / "out")))
    runs = {
        name: {"protocol": {"baseline_features": name}, "results": [{"name": "dseh", "num_bits": 8}]} for name in "ab"
    }
    with pytest.raises(MismatchError, match=r"the baselines use different features \(a; b\).* --no-baselines"):
        comparable(runs, None)
    with pytest.raises(InputError, match="needs evaluations"):
        compare(FiguresConfig(evaluations=(), out=str(tmp_path / "out")))


def test_equal_codes_lie_together_on_the_map() -> None:
    codes = ["00000000"] * 20 + ["ffffffff"] * 20
    points = embed(codes, 0)
    centres = points[:20].mean(0), points[20:].mean(0)
    spread = max(points[:20].std(), points[20:].std())
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    assert embed(codes[:2], 0).shape == (2, 2)
