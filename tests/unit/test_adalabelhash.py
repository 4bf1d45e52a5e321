"""AdaLabelHash: the margin, unknown labels, the learning rate of the codewords, and classes without rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hashray.methods.adalabelhash import AdaLabelHash, AdaLabelHashConfig
from hashray.methods.codewords import spread_codewords
from hashray.methods.losses import adaptive_margin
from hashray.train.loop import build_optimizer
from tests.unit.worker_group import build, config_of, make_rows, run_loop

METHOD = {"kind": "adalabelhash", "label_loss": "hinge", "codeword_init": "spread"}


def method_of(**fields: object) -> AdaLabelHash:
    built = build(config_of(method=METHOD | fields), torch.float64)
    assert isinstance(built, AdaLabelHash)
    return built


def test_the_margin_of_the_paper_is_one_at_every_code_length() -> None:
    for bits in (16, 48):
        assert AdaLabelHashConfig(preset="paper", num_bits=bits).margin == 1
        assert AdaLabelHashConfig(margin_ratio=0.25, num_bits=bits).margin == bits / 4
    paper = AdaLabelHashConfig(preset="paper")
    assert (paper.negative_floor, paper.quantization, paper.codeword_lr_factor) == ("zero", "none", 1.0)
    assert AdaLabelHashConfig(preset="paper", quantization="l2").quantization == "l2"


def test_defaults_learn_by_softmax_and_the_presets_of_the_paper_by_its_hinge() -> None:
    default = AdaLabelHashConfig()
    assert (default.label_loss, default.codeword_init) == ("softmax", "semantic")
    for name in ("paper", "released"):
        preset = AdaLabelHashConfig.model_validate({"preset": name})
        assert (preset.label_loss, preset.codeword_init) == ("hinge", "uniform")
    method = build(config_of(method={"kind": "adalabelhash"}), torch.float64)
    features, labels, _ = make_rows(12)
    inputs, targets = torch.as_tensor(features), torch.as_tensor(labels)
    assert set(method.loss_terms(method.phases(1)[0], inputs, targets, torch.ones(12))) == {"softmax", "quantization"}


def test_the_loss_is_eq_1_on_the_relaxed_codes_over_the_positive_entries() -> None:
    method = method_of(quantization="none", margin_ratio=0.3)
    features, labels, _ = make_rows(12)
    inputs, targets = torch.as_tensor(features), torch.as_tensor(labels)
    terms = method.loss_terms(method.phases(1)[0], inputs, targets, torch.ones(12))
    u, v = torch.tanh(method.logits(inputs)), torch.tanh(method.codewords.z)
    assert float(terms["margin"].mass) == int((targets == 1).sum())
    expected = adaptive_margin(u, v, targets, 0.3 * 16)
    torch.testing.assert_close(terms["margin"].total / terms["margin"].mass, expected)
    assert float(terms["quantization"].total) == 0


def test_unknown_labels_and_padding_give_no_gradient() -> None:
    method = method_of(quantization="none")
    features, labels, _ = make_rows(6)
    inputs = torch.as_tensor(features).requires_grad_(True)
    targets = torch.as_tensor(labels).to(torch.int8)
    targets[:3] = -1
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0])
    terms = method.loss_terms(method.phases(1)[0], inputs, targets, weight)
    terms["margin"].total.backward()
    moved = inputs.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert moved.tolist() == [False, False, False, True, True, False]


def test_classes_without_rows_are_not_negatives_and_have_no_score() -> None:
    config = config_of(method=METHOD, epochs=1)
    method = run_loop(config, 40)[1].method
    assert isinstance(method, AdaLabelHash)
    method.codewords.present[3] = False
    method.zero_grad()
    features, labels, _ = make_rows(40)
    terms = method.loss_terms(method.phases(1)[0], torch.as_tensor(features), torch.as_tensor(labels), torch.ones(40))
    terms["margin"].total.backward()
    assert float(method.codewords.z.grad[3].abs().sum()) == 0  # type: ignore[index]
    assert bool(torch.isneginf(method.class_scores(torch.as_tensor(features))[:, 3]).all())


def test_codewords_have_a_separate_rate_without_decay() -> None:
    method = method_of(codeword_lr_factor=7.0)
    config = config_of(optim={"weight_decay": 0.5, "trunk_lr_factor": 0.1, "lr": 1e-3}).optim
    groups = {g["name"]: g for g in build_optimizer(config, method.trained(method.phases(1)[0])).param_groups}
    assert groups["codewords"]["factor"] == 7.0 and groups["codewords"]["weight_decay"] == 0
    assert groups["head"]["weight_decay"] == 0.5 and groups["codewords"]["params"][0] is method.codewords.z


@pytest.mark.parametrize("num_bits", [8, 32, 64, 128])
def test_spread_codewords_are_sylvesters_matrix_in_random_order_then_its_complement(num_bits: int) -> None:
    sylvester = np.ones((1, 1), dtype=np.int8)
    while len(sylvester) < num_bits:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    rows = sylvester[np.random.default_rng(7).permutation(num_bits)]
    words = spread_codewords(2 * num_bits, num_bits, seed=7)
    assert words.dtype == np.int8 and np.array_equal(words, np.concatenate([rows, -rows]))
    assert np.array_equal(spread_codewords(5, num_bits, seed=7), rows[:5])


@pytest.mark.parametrize("ratio", [1 / 16, 0.5])
def test_separable_rows_get_the_right_class(ratio: float) -> None:
    config = config_of(method=METHOD | {"margin_ratio": ratio}, epochs=60, optim={"lr": 3e-3})
    weights, loop = run_loop(config, 120)
    loop.method.load_state_dict(weights)
    features, labels, _ = make_rows(120)
    one = labels.sum(1) == 1
    scores = loop.method.class_scores(torch.as_tensor(features)[one])
    assert torch.equal(scores.argmax(1), torch.as_tensor(labels[one]).argmax(1))
