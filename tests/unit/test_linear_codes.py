"""The methods itq and pca: the codes of ITQ and PCA on all rows at once, the same bytes for any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hashray.codes import Codes, binarize
from hashray.data.images import AugmentConfig
from hashray.errors import InputError
from hashray.evaluate.baselines import ITQ
from hashray.methods import linear
from hashray.methods.base import LabelTable
from hashray.methods.linear import Moments, principal_directions, random_rotation
from hashray.metrics import mean_average_precision
from hashray.train.batches import EpochPlan, MemorySlices, drawn_rows
from hashray.train.loop import Loop
from tests.unit.worker_group import DIM, Stop, build, config_of, make_rows, read, run_loop, run_processes

KINDS = ["itq", "pca"]
BITS = 16


def fit(kind: str, features: NDArray[Any], batch_size: int = 32, **changes: Any) -> Loop:
    """A run on features [n, 24] without any label; the method of the loop holds the weights."""
    config = config_of(method={"kind": kind, "num_bits": BITS}, batch_size=batch_size, **changes)
    ids = [f"row{i}" for i in range(len(features))]
    plan = EpochPlan((len(features),), batch_size, config.shuffle_window, config.seed)
    source = MemorySlices(plan, features, np.zeros((len(features), 0), np.int8), ids, AugmentConfig(), 0, 1)
    loop = Loop(
        build(config, torch.float32), config, LabelTable.empty(0), source, lambda line, write: None, None,
        torch.device("cpu"),
    )  # fmt: skip
    loop.method.load_state_dict(loop.run())
    return loop


def codes_of(loop: Loop, features: NDArray[Any]) -> Codes:
    return binarize(loop.method.encode(torch.as_tensor(features)))


def notes_of(loop: Loop) -> dict[str, Any]:
    return loop.position.notes["phases"][0]


def single() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Features of rows with one class each, of classes that overlap."""
    features, labels, _ = make_rows(1500)
    one = labels.sum(1) == 1
    return (features[one] + np.random.default_rng(3).standard_normal((one.sum(), DIM))).astype(np.float32), labels[one]


def test_itq_scores_as_itq_on_all_rows_at_once() -> None:
    features, labels = single()

    def score(codes: Codes) -> float:
        return mean_average_precision(codes, labels, codes, labels)

    seeds = range(4)
    ours = [score(codes_of(fit("itq", features, seed=seed), features)) for seed in seeds]
    whole = [score(ITQ.fit(features, BITS, seed).codes(features)) for seed in seeds]
    assert np.mean(ours) == pytest.approx(np.mean(whole), abs=0.01)
    assert notes_of(fit("itq", features))["quantization_error"] < notes_of(fit("pca", features))["quantization_error"]


def test_pca_is_the_signs_of_randomly_rotated_principal_directions() -> None:
    features, _ = single()
    loop = fit("pca", features, seed=5)
    centred = features - features.mean(0, dtype=np.float64)
    directions = principal_directions(centred.T @ centred / len(features), BITS)
    projections = centred @ directions @ random_rotation(BITS, 5000)
    sure = np.abs(projections) > 1e-3
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(
        (loop.method.encode(torch.as_tensor(features)).numpy() >= 0)[sure], (projections >= 0)[sure]
    )
    notes = notes_of(loop)
    assert notes["directions"] == BITS
    assert notes["variance_kept"] == pytest.approx(projections.var(0).sum() / features.var(0).sum(), rel=1e-4)


RUNS = {kind: (config_of(method={"kind": kind, "num_bits": BITS}), 301) for kind in KINDS}


@pytest.fixture(scope="module")
def three_workers() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_processes(RUNS, world=3)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_gives_the_same_bytes(
    kind: str, three_workers: list[dict[str, dict[str, torch.Tensor]]]
) -> None:
    alone = run_loop(*RUNS[kind])[0]
    for worker in three_workers:
        assert all(torch.equal(alone[name], worker[kind][name]) for name in alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_which_rows_come_together_changes_no_byte(kind: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ROTATION_ROWS", 600)  # of 1,200: about half of the rows are drawn
    features = (single()[0] * scale).astype(np.float32)
    first, other = (fit(kind, features, batch_size).method.state_dict() for batch_size in (7, 1000))
    assert all(torch.equal(first[name], other[name]) for name in first)
    assert np.array_equal(codes_of(fit(kind, features), features), codes_of(fit(kind, features[::-1].copy()), features))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_to_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    config, rows = RUNS[kind]
    for place, scored in (((0, 0, 0), 1), ((0, 1, 0), 0)):  # once it is fitted, and after its only epoch
        folder = tmp_path / str(place)
        folder.mkdir()
        with pytest.raises(Stop):
            run_loop(config, rows, stop_at=place, folder=folder, validate=lambda method: 0.5)
        scores: list[float] = []
        resumed, loop = run_loop(
            config,
            rows,
            checkpoint=read(folder),
            validate=lambda method, s=scores: s.append(0.5) or 0.5,  # type: ignore[misc]
        )
        whole = run_loop(config, rows)[0]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert len(scores) == scored and len(loop.position.notes["history"]) == 1
        assert (loop.position.best_score, loop.position.best_at) == (0.5, "phase 0, epoch 1")


def test_more_bits_than_directions_are_mixtures_of_all_directions() -> None:
    features = single()[0]
    features[:, 5:] = features[:, :5] @ np.random.default_rng(0).standard_normal((5, DIM - 5))  # rounded: nearly flat
    loop = fit("itq", features)
    assert notes_of(loop)["directions"] == 5
    assert notes_of(loop)["variance_kept"] == pytest.approx(1.0, abs=1e-6)
    share = (loop.method.encode(torch.as_tensor(features)).numpy() >= 0).mean(0)
    assert ((share > 0.05) & (share < 0.95)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_cannot_be_coded_are_refused(kind: str) -> None:
    features = single()[0]
    with pytest.raises(InputError, match=r"rows all have the same features"):
        fit(kind, np.repeat(features[:1], 9, axis=0))
    features[3, 2] = np.nan
    features[8, 0] = np.inf
    with pytest.raises(InputError, match=rf"2 of {len(features):,} training rows have features that are not finite"):
        fit(kind, features)


def test_exact_moments_are_those_of_the_rows() -> None:
    features = single()[0]
    loop = fit("pca", features)
    rows, exponent = loop.method._range(loop.workers)  # type: ignore[operator]
    assert (rows, 2.0 ** (exponent - 1) <= np.abs(features).max() < 2.0**exponent) == (len(features), True)
    got: Moments = loop.method._moments(loop.workers, 20 - exponent)  # type: ignore[operator]
    np.testing.assert_allclose(got.mean, features.mean(0, dtype=np.float64), atol=2.0 ** (exponent - 20))
    np.testing.assert_allclose(got.covariance, np.cov(features.T, bias=True), atol=1e-4)


def test_a_draw_is_a_share_of_the_rows_that_depends_on_each_row_alone() -> None:
    rows = np.random.default_rng(0).standard_normal((4000, 3)).astype(np.float32)
    drawn = drawn_rows(rows, 0.25)
    assert 800 < drawn.sum() < 1200
    assert np.array_equal(drawn, np.concatenate([drawn_rows(piece, 0.25) for piece in np.array_split(rows, 7)]))
    assert drawn_rows(rows, 1.0).all()
