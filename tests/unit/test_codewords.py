"""Semantic codewords and the softmax over codewords, against loops over rows and classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hashray.codes import hamming
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.methods.codewords import SPREAD, Codewords, semantic_codewords
from hashray.methods.losses import label_surprise
from tests.unit.worker_group import CLASSES, config_of, make_rows, run_loop, run_processes

KINDS = ("adalabelhash", "lcgh")
SEMANTIC = {"codeword_init": "semantic", "label_loss": "softmax", "codeword_lr_factor": 1e-9}


def surprise_of(u: np.ndarray, v: np.ndarray, y: np.ndarray, temperature: float) -> float:
    """The loss of one row, class by class."""
    scores = [float(u @ word) / (len(u) * temperature) for word in v]
    rivals = [math.exp(s) for s, label in zip(scores, y, strict=True) if label == 0]
    terms = [math.log(math.exp(s) + sum(rivals)) - s for s, label in zip(scores, y, strict=True) if label == 1]
    return sum(terms) / len(terms) if terms else 0.0


def test_surprise_is_that_of_a_loop_over_classes() -> None:
    rng = np.random.default_rng(0)
    u, v = rng.uniform(-1, 1, (30, 16)), rng.uniform(-1, 1, (5, 16))
    y = rng.integers(-1, 2, (30, 5)).astype(np.int8)
    y[0], y[1], y[2] = -1, 1, 0  # nothing known, every class positive, none positive
    got = label_surprise(torch.tensor(u), torch.tensor(v), torch.tensor(y), 0.2)
    np.testing.assert_allclose(got, [surprise_of(*row, 0.2) for row in zip(u, [v] * 30, y, strict=True)], atol=1e-12)
    one = torch.tensor(np.eye(5, dtype=np.int8)[rng.integers(0, 5, 30)])
    plain = torch.nn.functional.cross_entropy(
        torch.tensor(u @ v.T / (16 * 0.2)), one.argmax(1), reduction="none"
    )  # fmt: skip
    torch.testing.assert_close(label_surprise(torch.tensor(u), torch.tensor(v), one, 0.2), plain)


def test_surprise_gives_no_gradient_to_unknown_classes_and_rows() -> None:
    u, v = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    label_surprise(u, v, torch.tensor([[1, 0, -1, 0], [-1] * 4, [1] * 4]), 0.1).sum().backward()
    assert u.grad is not None and v.grad is not None
    assert (u.grad[1:] == 0).all() and (v.grad[2] == 0).all() and (v.grad[[0, 1, 3]] != 0).any(1).all()


def test_codewords_are_near_where_classes_are_near_and_all_different() -> None:
    rng = np.random.default_rng(1)
    means = rng.standard_normal((12, 40))
    means[6:] = means[:6] + 0.3 * rng.standard_normal((6, 40))  # six pairs of similar classes
    means[5], means[11] = means[0], means[0]  # and three that are the same
    means -= means.mean(0)
    words = semantic_codewords(means, np.cov(means.T), 16, seed=2)
    assert words is not None and words.shape == (12, 16) and set(np.unique(words)) == {-1, 1}
    assert len(np.unique(words, axis=0)) == 12
    pairs = np.triu_indices(12, 1)
    apart = np.linalg.norm(means[:, None] - means[None], axis=2)[pairs]
    bits = (words[:, None] != words[None]).sum(2)[pairs]
    assert bits[apart < 4].max() < bits[apart > 4].min()
    assert np.array_equal(words, semantic_codewords(means, np.cov(means.T), 16, seed=2))


def test_equal_classes_beyond_the_room_have_no_semantic_codewords() -> None:
    assert semantic_codewords(np.zeros((9, 4)), np.eye(4), 8) is not None
    assert semantic_codewords(np.zeros((12, 4)), np.eye(4), 8) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_begins_at_the_means_of_its_classes(kind: str) -> None:
    config = config_of(method={"kind": kind, **SEMANTIC}, epochs=1)
    weights, _ = run_loop(config, 80)
    features, labels, _ = make_rows(80)
    centred = features - features.mean(0)
    means = np.stack([centred[labels[:, c] == 1].mean(0) for c in range(CLASSES)])
    expected = semantic_codewords(means, centred.T @ centred / 80, 16, seed=0)
    np.testing.assert_allclose(weights["codewords.z"], SPREAD * np.asarray(expected), atol=1e-6)


def test_two_workers_begin_at_the_same_codewords() -> None:
    runs = {kind: (config_of(method={"kind": kind, **SEMANTIC}, epochs=1), 80) for kind in KINDS}
    for of_worker in run_processes(runs, world=2):
        for kind, (config, count) in runs.items():
            expected = run_loop(config, count)[0]["codewords.z"]
            torch.testing.assert_close(of_worker[kind]["codewords.z"], expected, atol=1e-6, rtol=0)


def test_codewords_of_a_trained_model_are_kept() -> None:
    config = config_of(method={"kind": "lcgh", **SEMANTIC}, epochs=1)
    _, loop = run_loop(config, 80)
    words = loop.method.codewords
    changed = -words.z.detach().clone()
    words.z.data.copy_(changed)
    words.begin(loop.table, 0, loop.workers, loop.method.features)
    assert torch.equal(words.z, changed)


class Listener:
    """Stands for the workers of a group that scan nothing: codewords that begin spread need no features."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_an_untrained_trunk_falls_back_to_spread_codewords_and_says_so() -> None:
    trunk = build_trunk(BackboneConfig(name="resnet9", width=4))
    words, listener = Codewords(CLASSES, 16, "semantic", trunk), Listener()
    _, loop = run_loop(config_of(method={"kind": "lcgh"}, epochs=1), 40)
    workers: Any = listener
    words.begin(loop.table, 0, workers, lambda inputs: inputs)
    assert int((hamming(words.bits(), words.bits()) + 16 * np.eye(CLASSES, dtype=int)).min()) == 8
    assert "pretrained trunk" in listener.said[0]
