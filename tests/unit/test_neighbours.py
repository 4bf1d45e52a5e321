"""The method neighbours: its loss beside an oracle in loops, its start, and what it learns without labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hashray.codes import Codes, binarize
from hashray.data.images import AugmentConfig
from hashray.errors import InputError
from hashray.evaluate.baselines import ITQ
from hashray.methods.base import LabelTable, Method
from hashray.methods.linear import principal_directions, rotate_to_signs
from hashray.methods.neighbours import neighbour_divergence
from hashray.metrics import mean_average_precision
from hashray.train.batches import EpochPlan, MemorySlices
from hashray.train.loop import Loop
from tests.unit.worker_group import DIM, build, config_of, make_rows

BITS = 16


def train(
    features: NDArray[Any], labels: NDArray[Any] | None = None, method: Method | None = None, anchors: int = 1024,
    hidden: int = 32, **changes: Any,
) -> Loop:  # fmt: skip
    """A run on features [n, 24]; the method of the loop holds the weights."""
    config = config_of(**changes, method={"kind": "neighbours", "num_bits": BITS, "anchors": anchors, "hidden": hidden})
    labels = np.zeros((len(features), 0), np.int8) if labels is None else labels
    table = LabelTable.of(torch.as_tensor(labels)) if labels.shape[1] else LabelTable.empty(0)
    plan = EpochPlan((len(features),), config.batch_size, config.shuffle_window, config.seed)
    ids = [f"row{i}" for i in range(len(features))]
    source = MemorySlices(plan, features, labels, ids, AugmentConfig(), 0, 1)
    loop = Loop(
        method or build(config, torch.float32), config, table, source, lambda line, write: None, None,
        torch.device("cpu"),
    )  # fmt: skip
    loop.method.load_state_dict(loop.run())
    return loop


def rows_of(count: int = 600, spread: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Features of rows with one class each, of classes that overlap, and their labels."""
    features, labels, _ = make_rows(count)
    one = labels.sum(1) == 1
    noise = spread * np.random.default_rng(3).standard_normal((int(one.sum()), DIM))
    return (features[one] + noise).astype(np.float32), labels[one]


def normalised(features: NDArray[Any]) -> NDArray[np.float64]:
    return features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)


def codes_of(loop: Loop, features: NDArray[Any]) -> Codes:
    return binarize(loop.method.encode(torch.as_tensor(features)))


def divergence_in_loops(
    points: NDArray[Any], anchors: NDArray[Any], codes: NDArray[Any], anchor_codes: NDArray[Any], variance: float,
    temperature: float,
) -> list[float]:  # fmt: skip
    values = []
    for point, code in zip(points, codes, strict=True):
        others = [j for j, anchor in enumerate(anchors) if np.abs(point - anchor).max() > 0]
        near = [math.exp(-sum((point - anchors[j]) ** 2) / (2 * variance)) for j in others]
        coded = [math.exp(sum(code * anchor_codes[j]) / (len(code) * temperature)) for j in others]
        p, q = [x / sum(near) for x in near], [x / sum(coded) for x in coded]
        values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return values


def random_sides(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    points, anchors = rng.standard_normal((7, 5)), rng.standard_normal((9, 5))
    anchors[:3] = points[:3]  # these rows are anchors themselves
    codes, anchor_codes = np.tanh(rng.standard_normal((7, 4))), np.tanh(rng.standard_normal((9, 4)))
    return tuple(map(torch.as_tensor, (points, anchors, codes, anchor_codes)))  # type: ignore[return-value]


def test_the_divergence_is_that_of_plain_loops() -> None:
    sides = random_sides()
    values = neighbour_divergence(*sides, 0.7, 0.3)
    expected = divergence_in_loops(*(side.numpy() for side in sides), 0.7, 0.3)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    assert (values > 0).all()


def test_codes_with_the_neighbourhoods_of_the_points_have_no_divergence() -> None:
    points, anchors, _, _ = random_sides()
    ends = torch.nn.functional.normalize(torch.cat([points, anchors]), dim=1)  # of equal length: distances are angles
    points, anchors = ends[: len(points)], ends[len(points) :]
    # -|x - a|^2 / (2 s) is x . a / s less a constant, and codes of 5 bits at a temperature of s / 5 give x . a / s.
    values = neighbour_divergence(points, anchors, points, anchors, 0.5, 0.5 / 5)
    assert values.abs().max() < 1e-12
    assert neighbour_divergence(points, anchors, -points, anchors, 0.5, 0.5 / 5).min() > 0.01


def test_a_copy_of_the_row_among_the_anchors_changes_nothing() -> None:
    points, anchors, codes, anchor_codes = random_sides()
    plain = neighbour_divergence(points[5:6], anchors, codes[5:6], anchor_codes, 0.7, 0.3)
    more = torch.cat([anchors, points[5:6], points[5:6]]), torch.cat([anchor_codes, -codes[5:6], codes[5:6]])
    torch.testing.assert_close(neighbour_divergence(points[5:6], more[0], codes[5:6], more[1], 0.7, 0.3), plain)


def test_a_row_without_any_other_anchor_has_no_loss_and_no_gradient() -> None:
    points, code = torch.ones(2, 5), torch.full((2, 4), 0.5, requires_grad=True)
    value = neighbour_divergence(points[:1], points, code[:1], code, 0.7, 0.3)
    value.sum().backward()
    assert not value.detach().any() and code.grad is not None and not code.grad.any()


def test_a_training_starts_with_the_codes_of_itq_on_normalised_features() -> None:
    features = rows_of(400, spread=3.0)[0]
    method = train(features, epochs=1, optim={"lr": 1e-12}).method
    rows = normalised(features)
    centred = rows - rows.mean(0)
    projections = centred @ principal_directions(centred.T @ centred / len(rows), BITS)
    turned = projections @ rotate_to_signs(projections[np.argsort(projections[:, 0])], 0)
    expected = turned / math.sqrt(np.square(turned).mean())
    np.testing.assert_allclose(method.encode(torch.as_tensor(features)).numpy(), expected, atol=1e-4)


def test_neighbours_that_codes_keep_score_above_itq() -> None:
    features, labels = rows_of(400)

    def score(codes: Codes) -> float:
        return mean_average_precision(codes, labels, codes, labels)

    seeds = range(2)
    ours = [
        score(codes_of(train(features, epochs=20, batch_size=64, anchors=128, optim={"lr": 3e-3}, seed=seed), features))
        for seed in seeds
    ]
    itq = [score(ITQ.fit(normalised(features), BITS, seed).codes(normalised(features))) for seed in seeds]
    assert np.mean(ours) > np.mean(itq) + 0.03


def test_without_a_hidden_layer_the_head_is_linear() -> None:
    features = rows_of(100)[0]
    method = train(features, hidden=0).method
    points = torch.randn(3, DIM)
    doubled = method._head(2 * points) - method._head(torch.zeros(1, DIM))  # type: ignore[operator]
    torch.testing.assert_close(doubled, 2 * (method._head(points) - method._head(torch.zeros(1, DIM))))  # type: ignore[operator]


def test_labels_change_no_byte() -> None:
    features, labels = rows_of(300)
    with_labels, without = train(features, labels).method, train(features).method
    state = without.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in with_labels.state_dict().items())


def test_fewer_rows_than_anchors_come_several_times_and_more_are_drawn() -> None:
    features = rows_of(100)[0]
    few, many = train(features, epochs=1), train(features, epochs=1, anchors=16)
    anchors = np.unique(few.method.anchors.numpy(), axis=0)
    assert few.method.anchors.shape == (1024, DIM) and len(anchors) == len(features)
    assert len(np.unique(many.method.anchors.numpy(), axis=0)) == 16
    lengths = np.square(anchors).sum(1)
    assert lengths.mean() == pytest.approx(DIM, rel=1e-3)  # the unit of feature_temperature


def test_after_init_the_head_is_kept_and_the_anchors_are_new() -> None:
    features = rows_of(200)[0]
    first = train(features, epochs=3).method
    before = {name: value.clone() for name, value in first.state_dict().items()}
    other = train(features[:60], epochs=1, optim={"lr": 1e-12}, method=first).method
    after = other.state_dict()
    assert torch.equal(after["directions"], before["directions"]) and torch.equal(after["mean"], before["mean"])
    torch.testing.assert_close(after["hash.weight"], before["hash.weight"])
    assert not torch.equal(after["anchors"], before["anchors"])


def test_features_that_cannot_be_coded_are_refused() -> None:
    features = rows_of(60)[0]
    with pytest.raises(InputError, match="training rows all have the same features"):
        train(np.repeat(features[:1], 9, axis=0))
    features[3, 2] = np.nan
    with pytest.raises(InputError, match="features that are not finite numbers"):
        train(features)


def test_a_feature_of_zeros_has_a_finite_code() -> None:
    features = rows_of(60)[0]
    features[5] = 0
    loop = train(features, epochs=2)
    assert torch.isfinite(loop.method.encode(torch.as_tensor(features))).all()
