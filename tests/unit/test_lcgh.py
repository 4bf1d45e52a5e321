"""LCGH: labels come first in every step, the effect of each priority, and the toy of METHODS 3.5."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hashray.codes import binarize
from hashray.errors import ConfigError, InputError
from hashray.methods import build_method
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.methods.base import LabelTable
from hashray.methods.lcgh import LCGH, LCGHConfig, _Fork, straight_through
from hashray.metrics import mean_average_precision
from hashray.train.group import TorchWorkerGroup
from tests.unit.worker_group import build, config_of, make_rows, run_loop

METHOD: dict[str, Any] = {"kind": "lcgh"}
SPREAD_HINGE = {"codeword_init": "spread", "label_loss": "hinge"}  # needs no features, and can be exactly zero


def method_of(**fields: Any) -> LCGH:
    built = build(config_of(method=METHOD | SPREAD_HINGE | fields), torch.float64)
    assert isinstance(built, LCGH)
    return built


class Give(torch.nn.Module):
    """Replaces a hash head and returns fixed logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.logits


class OneRow(TorchWorkerGroup):
    """A worker group with a single training row."""

    def __init__(self) -> None:
        pass

    def sum_by_group(self, outputs: Any, group: Any, groups: int) -> torch.Tensor:
        return outputs(torch.as_tensor(make_rows(1)[0])).double()


def code_gradients(hidden: bool = False, **fields: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(label's, decoder's, combined) gradients on the codes of 20 rows with the same weights."""
    features, labels, _ = make_rows(20)
    labels = np.full(labels.shape, -1, np.int8) if hidden else labels
    gradients = []
    for change in ({"reconstruction_weight": 1e-30}, {"label_weight": 0.0, "quantization_weight": 0.0}, {}):
        method = method_of(**fields | change)
        inputs = torch.as_tensor(features)
        logits = method.hash(inputs).detach().requires_grad_(True)
        method.hash = Give(logits)
        terms = method.loss_terms(method.phases(1)[0], inputs, torch.as_tensor(labels), torch.ones(20))
        # The terms are means over different masses, as in the loop.
        torch.stack([t.total / t.mass for t in terms.values() if t.in_loss]).sum().backward()
        gradients.append(logits.grad / (1 - torch.tanh(logits.detach()) ** 2))
    return gradients[0], gradients[1], gradients[2]


def test_project_removes_the_part_that_opposes_the_labels_row_by_row() -> None:
    label, decoder, combined = code_gradients(priority="project", reconstruction_weight=3.0, quantization="none")
    expected = []
    for g, r in zip(label, decoder, strict=True):
        against = float(r @ g)
        expected.append(g + r - (min(against, 0.0) / float(g @ g)) * g)
    torch.testing.assert_close(combined, torch.stack(expected))
    conflicts = (label * decoder).sum(1) < 0
    assert bool(conflicts.any())
    first_order = (label * combined).sum(1)[conflicts]
    # To first order, the label loss falls as it does without a decoder.
    torch.testing.assert_close(first_order, label.square().sum(1)[conflicts])


def test_sum_adds_both_gradients() -> None:
    label, decoder, combined = code_gradients(priority="sum", reconstruction_weight=2.0, quantization="none")
    torch.testing.assert_close(combined, label + decoder)


def test_without_labels_quantisation_does_not_come_first() -> None:
    def check(**fields: Any) -> None:
        project, plain = (
            code_gradients(priority=name, quantization_weight=1.0, **fields) for name in ("project", "sum")
        )
        assert bool(((project[0] * project[1]).sum(1) < 0).any())
        torch.testing.assert_close(project[2], plain[2])

    check(label_weight=0.0)
    check(hidden=True)  # rows with unknown labels


def test_the_fork_against_the_formula_of_the_specification() -> None:
    u = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    a, b = torch.randn(2, 5, 8, dtype=torch.float64)
    left, right = _Fork.apply(u, 3.0, True)
    ((left * a).sum() + (right * b).sum()).backward()
    c = (b * a).sum(1).clamp(max=0) / (a * a).sum(1)
    expected = a + 3.0 * (b - c[:, None] * a)
    torch.testing.assert_close(u.grad, expected)
    # The direction is the same for very small gradients, as in a large batch of consistent rows.
    u.grad = None
    left, right = _Fork.apply(u, 3.0, True)
    ((left * a * 1e-12).sum() + (right * b * 1e-12).sum()).backward()
    torch.testing.assert_close(u.grad * 1e12, expected)
    u.grad = None
    left, right = _Fork.apply(u, 3.0, True)
    ((left * 0).sum() + (right * b).sum()).backward()
    torch.testing.assert_close(u.grad, 3.0 * b)


def test_in_a_warm_up_codes_see_only_labels_and_the_decoder_learns() -> None:
    method = method_of(warmup_share=0.5)
    warm, rest = method.phases(4)
    assert (warm.name, warm.epochs, rest.name, rest.epochs) == ("labels", 2, "codes", 2)
    features, labels, _ = make_rows(20)
    grads = {}
    for phase in (warm, rest):
        method.zero_grad()
        terms = method.loss_terms(phase, torch.as_tensor(features), torch.as_tensor(labels), torch.ones(20))
        terms["reconstruction"].total.backward()
        head = sum(float(p.grad.abs().sum()) for p in method.hash.parameters())  # type: ignore[union-attr]
        decoder = sum(float(p.grad.abs().sum()) for p in method.decoder.parameters())  # type: ignore[union-attr]
        grads[phase.name] = head, decoder
    assert grads["labels"][0] == 0 and grads["labels"][1] > 0 and grads["codes"][0] > 0


def test_the_weights_of_the_warm_up_are_never_chosen() -> None:
    seen: list[int] = []

    def validate(method: torch.nn.Module) -> float:
        seen.append(1)
        return 1.0 / len(seen)  # the first is the best

    config = config_of(method=METHOD | {"warmup_share": 0.5}, epochs=4, validation_every=1)
    _, loop = run_loop(config, 60, validate=validate)
    assert len(seen) == 4  # a sweep compares trials in their warm-up, too
    assert loop.position.best_at == "phase 1, epoch 1"


def test_gate_rebuilds_only_consistent_rows() -> None:
    method = method_of(priority="gate")
    features, labels, _ = make_rows(20)
    phase = method.phases(1)[0]
    terms = method.loss_terms(phase, torch.as_tensor(features), torch.as_tensor(labels), torch.ones(20))
    consistent = float(terms["consistency"].total / terms["consistency"].mass)
    assert 0 < consistent < 1
    plain = method_of(priority="sum")
    full = plain.loss_terms(phase, torch.as_tensor(features), torch.as_tensor(labels), torch.ones(20))
    assert 0 < float(terms["reconstruction"].total) < float(full["reconstruction"].total)
    known = torch.as_tensor(labels)
    u, v = straight_through(method.logits(torch.as_tensor(features))), straight_through(method.codewords())
    wins = [
        min(float(u[i] @ v[j]) for j in range(4) if known[i, j])
        > max(float(u[i] @ v[j]) for j in range(4) if not known[i, j])
        for i in range(20)
    ]
    assert consistent == pytest.approx(np.mean(wins))


def test_split_limits_the_labels_to_the_first_bits() -> None:
    method = method_of(priority="split", split_share=0.25, quantization="none")
    features, labels, _ = make_rows(20)
    logits = torch.as_tensor(features)[:, :16].clone().requires_grad_(True)
    method.hash = Give(logits)
    terms = method.loss_terms(method.phases(1)[0], torch.as_tensor(features), torch.as_tensor(labels), torch.ones(20))
    grad = torch.autograd.grad(terms["label"].total, logits, retain_graph=True)[0]
    assert float(grad[:, 4:].abs().sum()) == 0 and float(grad[:, :4].abs().sum()) > 0
    rebuilt = torch.autograd.grad(terms["reconstruction"].total, logits)[0]
    assert float(rebuilt[:, :4].abs().sum()) == 0 and bool((rebuilt[:, 4:].abs().sum(0) > 0).all())
    assert method.class_codes() is None
    scores = method.class_scores(torch.as_tensor(features))
    expected = torch.tanh(logits)[:, :4] @ torch.tanh(method.codewords.z)[:, :4].T
    torch.testing.assert_close(scores, expected)


def test_split_leaves_the_decoder_a_bit_at_any_share() -> None:
    for share, seen in ((0.99, 7), (0.5, 4), (0.01, 1)):
        assert method_of(priority="split", split_share=share, num_bits=8)._label_bits == seen


def test_dual_raises_the_multiplier_while_the_label_loss_is_above_its_plateau() -> None:
    with pytest.raises(ValueError, match="set warmup_share > 0"):
        LCGHConfig(priority="dual")
    method = method_of(priority="dual", warmup_share=0.5, dual_slack=0.5)
    warm, rest = method.phases(2)
    method.after_step(warm, {"label_loss": 0.2})
    workers = TorchWorkerGroup.__new__(TorchWorkerGroup)
    table = LabelTable.of(torch.eye(4, dtype=torch.uint8))
    assert method.begin_phase(rest, table, 0, workers)["label_plateau"] == pytest.approx(0.2)
    assert float(method.dual[2]) == pytest.approx(0.3)
    for hinge, rises in ((9.0, True), (0.0, None), (0.0, None)):
        before = float(method.dual[0])
        method.after_step(rest, {"label_loss": hinge})
        if rises:
            assert float(method.dual[0]) > before
    for _ in range(400):
        method.after_step(rest, {"label_loss": 0.0})
    assert float(method.dual[0]) < 1
    assert "dual" in method.state_dict()  # a resumed run continues with it
    before = method.dual.clone()
    method.after_step(rest, {"reconstruction": 1.0})  # a step without labelled rows changes nothing
    assert torch.equal(method.dual, before)
    method.begin_phase(warm, table, 0, OneRow())
    assert method.dual.tolist() == [1.0, 0.0, 0.0]  # a training that starts from this model finds a new plateau


def test_a_warm_up_has_at_least_one_epoch() -> None:
    assert [phase.epochs for phase in method_of(priority="dual", warmup_share=0.01).phases(4)] == [1, 3]
    assert [phase.epochs for phase in method_of(warmup_share=0.01).phases(1)] == [1]
    with pytest.raises(ConfigError, match="a warm-up and an epoch after it"):
        method_of(priority="dual", warmup_share=0.5).phases(1)


def test_without_labels_there_are_no_codewords_and_no_scores() -> None:
    method = method_of(label_weight=0.0)
    assert method.class_codes() is None
    with pytest.raises(InputError, match="label_weight = 0 trains no codewords"):
        method.class_scores(torch.zeros(1, 4))


def test_settings_with_nothing_to_learn_are_refused() -> None:
    with pytest.raises(ValueError, match="label_weight = 0 and reconstruction_weight = 0 leave nothing to learn"):
        method_of(label_weight=0.0, reconstruction_weight=0.0)
    with pytest.raises(InputError, match=r"would rebuild random features; set backbone\.weights"):
        LCGH(LCGHConfig(target="feature"), build_trunk(BackboneConfig(name="resnet9", width=4)), 4)


def test_only_the_decoder_learns_from_rows_without_labels() -> None:
    method = method_of(quantization="none")
    features, _, _ = make_rows(10)
    hidden = torch.full((10, 4), -1, dtype=torch.int8)
    terms = method.loss_terms(method.phases(1)[0], torch.as_tensor(features), hidden, torch.ones(10))
    assert float(terms["label"].mass) == 0 and float(terms["label"].total) == 0
    assert float(terms["reconstruction"].mass) == 10 and float(terms["reconstruction"].total) > 0


def test_the_target_is_standardised_over_all_training_rows_even_in_dead_dimensions() -> None:
    weights, loop = run_loop(config_of(method=METHOD, epochs=1), 100)
    features, _, _ = make_rows(100)
    torch.testing.assert_close(weights["target_mean"].double(), torch.as_tensor(features.mean(0)), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights["target_std"].double(), torch.as_tensor(features.std(0)), atol=1e-6, rtol=0)
    method = loop.method
    assert isinstance(method, LCGH)
    method.target_std[0] = 1e-12
    assert bool(torch.isfinite(method._target(torch.as_tensor(features))).all())


def test_a_common_scale_keeps_the_proportions_of_the_dimensions() -> None:
    weights, _ = run_loop(config_of(method={**METHOD, "target_scale": "common"}, epochs=1), 100)
    features, _, _ = make_rows(100)
    expected = np.full(features.shape[1], np.sqrt(features.var(0).mean()))
    torch.testing.assert_close(weights["target_std"].double(), torch.as_tensor(expected), atol=1e-6, rtol=0)


def test_a_trained_trunk_rebuilds_pixels_or_the_features_it_started_from(tmp_path: Any) -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    fresh = build_method(LCGHConfig(), build_trunk(BackboneConfig(width=4)), 3)
    assert isinstance(fresh, LCGH) and fresh._raw_target(images).shape == (6, 192)
    torch.save(build_trunk(BackboneConfig(width=4)).net.state_dict(), tmp_path / "w.pth")
    started = build_method(LCGHConfig(), build_trunk(BackboneConfig(width=4, weights=str(tmp_path / "w.pth"))), 3)
    assert isinstance(started, LCGH)
    before = started._raw_target(images)
    with torch.no_grad():
        for parameter in started.trunk.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(started._raw_target(images), before)
    assert not any("pretrained" in name for name in started.state_dict())
    with pytest.raises(InputError, match="needs images"):
        build_method(LCGHConfig(target="pixels"), build_trunk(BackboneConfig(width=4, frozen=True)), 3)


def toy(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """METHODS 3.5: 40 Gaussian classes with means in a 40-d subspace of 256 d; 10 are seen, 30 unseen."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((256, 40)))[0]
    means = rng.standard_normal((40, 40)) @ basis.T
    labels = np.repeat(np.arange(40), 60)
    features = means[labels] + 0.5 * rng.standard_normal((len(labels), 256))
    one_hot = np.eye(40, dtype=np.uint8)[labels]
    fresh = np.arange(len(labels)) % 60 < 12
    seen = labels < 10
    return {
        name: (features[rows], one_hot[rows])
        for name, rows in {
            "train": seen & ~fresh, "seen query": seen & fresh, "unseen": ~seen & ~fresh, "unseen query": ~seen & fresh,
        }.items()
    }  # fmt: skip


def train_toy(data: dict[str, tuple[np.ndarray, np.ndarray]], epochs: int = 100, **fields: Any) -> tuple[float, float]:
    """(within, cross) mAP of a short training on the toy."""
    from hashray.data.images import AugmentConfig
    from hashray.methods import parse_method_config
    from hashray.train.batches import EpochPlan, MemorySlices
    from hashray.train.loop import Loop

    features, labels = data["train"]
    head = METHOD | {"num_bits": 32, "hidden": 256} | fields
    config = config_of(method=head, epochs=epochs, batch_size=96, optim={"lr": 2e-3})
    trunk = build_trunk(BackboneConfig(name="resnet9", width=4, frozen=True))
    trunk.feature_dim = 256
    torch.manual_seed(0)
    method = build_method(parse_method_config(config.method.model_dump()), trunk, 40).double()
    plan = EpochPlan((len(features),), config.batch_size, 1 << 14, 0)
    source = MemorySlices(plan, features, labels.astype(np.int8), [str(i) for i in range(len(features))],
                          AugmentConfig(), 0, 1)  # fmt: skip
    table = LabelTable.of(torch.as_tensor(labels))
    weights = Loop(method, config, table, source, lambda *_: None, None, torch.device("cpu")).run()
    method.load_state_dict(weights)

    def score(query: str, database: str) -> float:
        codes = [binarize(method.encode(torch.as_tensor(data[name][0]))) for name in (query, database)]
        return mean_average_precision(codes[0], data[query][1], codes[1], data[database][1])

    return score("seen query", "train"), score("unseen query", "unseen")


def test_unseen_classes_gain_more_than_seen_ones_lose_on_strong_features() -> None:
    data = toy(0)
    # The hinge: every setting tells the seen classes apart here, and only a hinge then leaves the decoder its way.
    within, cross = train_toy(data, reconstruction_weight=3.0, **SPREAD_HINGE)
    supervised_within, supervised_cross = train_toy(data, reconstruction_weight=0.0, **SPREAD_HINGE)
    assert cross > supervised_cross + 0.03
    assert within > supervised_within - 0.03
