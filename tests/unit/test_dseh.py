"""DSEH: the equations against loops over all pairs, LabNet alone, and the alternation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hashray.errors import InputError
from hashray.methods.base import LabelTable
from hashray.methods.dseh import (
    DSEH,
    DSEHConfig,
    LabNet,
    fit_label_network,
    label_scores,
    label_terms,
    train_label_network,
)
from hashray.metrics import mean_average_precision
from tests.unit.worker_group import config_of, make_rows, run_loop


def small(**changes: Any) -> DSEHConfig:
    return DSEHConfig(**{"num_bits": 16, "label_hidden": 32, "semantic_dim": 16, "label_epochs": 300} | changes)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def naive_terms(config: DSEHConfig, f: Tensor, h: Tensor, y_hat: Tensor, labels: Tensor) -> dict[str, float]:
    """Eqs. 5, 7, 8, 10 by loops over all n x n pairs of rows, as released (means, J4 halved)."""
    n = len(labels)
    j1 = j2 = 0.0
    for i in range(n):
        for j in range(n):
            s = float(bool((labels[i] & labels[j]).any()))
            for side, total in ((f, "j1"), (h, "j2")):
                theta = config.pair_scale * float(side[i] @ side[j])
                value = softplus(theta) - config.positive_weight * s * theta
                if total == "j1":
                    j1 += value / n**2
                else:
                    j2 += value / n**2
    j4 = sum(
        (float(labels[i, k]) - 1 / (1 + math.exp(-float(y_hat[i, k])))) ** 2
        for i in range(n)
        for k in range(labels.shape[1])
    )
    return {"label_j1": j1, "label_j2": j2, "label_j4": 0.5 * j4 / labels.numel()}


def test_terms_over_distinct_rows_equal_loops_over_all_rows() -> None:
    config = small(label_normalization="none")
    labels = torch.as_tensor(make_rows(60)[1])
    torch.manual_seed(0)
    net = LabNet(config, labels.shape[1]).double()
    table = LabelTable.of(labels)
    assert len(table.rows) < 60 and int(table.counts.sum()) == 60
    outputs = net(table.rows)
    weight = table.counts.double()
    terms = label_terms(config, outputs, (outputs[0], outputs[1]), table.rows, weight, table.rows, weight)
    expected = naive_terms(config, *net(labels), labels)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, abs=1e-9), name


def test_tables_of_pieces_add_up_to_the_table_of_all_rows() -> None:
    labels = torch.as_tensor(make_rows(60)[1])
    whole, pieces = LabelTable.of(labels), LabelTable.sum([LabelTable.of(labels[i : i + 7]) for i in range(0, 60, 7)])
    assert torch.equal(whole.rows, pieces.rows) and torch.equal(whole.counts, pieces.counts)


def test_the_score_of_labels_does_not_depend_on_the_order_of_the_classes() -> None:
    # 2,400 distinct rows of which a draw of 2,000 asks; the codes are as good as the first classes are on.
    labels = torch.as_tensor(((np.arange(2400)[:, None] >> np.arange(12)) & 1).astype(np.uint8))
    labels = torch.cat([labels, 1 - labels[:, :1]], dim=1)[
        torch.randperm(2400, generator=torch.Generator().manual_seed(0))
    ]
    torch.manual_seed(0)
    net = LabNet(small(), 13).eval()
    score = label_scores(net, LabelTable.of(labels))
    order = torch.tensor([12, 5, 0, 7, 3, 9, 1, 11, 2, 10, 4, 8, 6])
    net.hidden.weight.data = net.hidden.weight.data[:, order]
    assert label_scores(net, LabelTable.of(labels[:, order])) == pytest.approx(score, abs=1e-12)
    assert score["label_rows"] == 2400


def test_ablations_drop_their_terms() -> None:
    labels = torch.as_tensor(make_rows(20)[1])
    table = LabelTable.of(labels)
    weight = table.counts.float()

    def names(ablation: str) -> set[str]:
        config = small(ablation=ablation)
        out = LabNet(config, 4)(table.rows)
        return set(label_terms(config, out, (out[0], out[1]), table.rows, weight, table.rows, weight))

    full = {"label_j1", "label_j2", "label_j3", "label_j4"}
    assert names("none") == names("S") == names("A") == full
    assert names("SS") == full - {"label_j1"} and names("L") == full - {"label_j4"}
    assert len(run_loop(config_of(epochs=1, method={"ablation": "A", "rounds": 3}), 40)[1].phases) == 1
    history = run_loop(config_of(epochs=1, method={"ablation": "S", "rounds": 1}), 40)[1].position.notes["history"]
    assert "image_j2" in history[0] and "image_j1" not in history[0]


def test_presets_fill_unset_fields_with_the_numbers_of_the_paper() -> None:
    paper = DSEHConfig(preset="paper")
    assert (paper.pair_scale, paper.beta, paper.label_hidden, paper.label_head) == (1.0, 0.005, 4096, "linear")
    released = DSEHConfig(preset="released", beta=0.5)
    assert (released.label_normalization, released.semantic_activation, released.beta) == ("lrn", "relu", 0.5)
    with pytest.raises(ValidationError, match="not a positive multiple of 8"):
        DSEHConfig(num_bits=30)


def test_one_hot_classes_get_distinct_codes_and_retrieve_perfectly() -> None:
    labels = np.eye(100, dtype=np.uint8)[np.arange(1000) % 100]
    codes = fit_label_network(labels, DSEHConfig(num_bits=32, label_hidden=512, label_epochs=600)).codes(labels)
    assert len(np.unique(codes, axis=0)) == 100
    assert mean_average_precision(codes[:200], labels[:200], codes, labels) == pytest.approx(1.0)


def test_many_sparse_classes_do_not_collapse_to_one_code() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((600, 80), dtype=np.uint8)
    for row in labels:
        row[rng.choice(80, 1 + rng.poisson(1.5), replace=False)] = 1
    net = fit_label_network(labels, DSEHConfig(num_bits=32, label_hidden=256, label_max_steps=150))
    codes = net.codes(labels)
    distinct = len(np.unique(codes, axis=0)) / len(np.unique(labels, axis=0))
    assert distinct > 0.2
    assert mean_average_precision(codes[:200], labels[:200], codes, labels) > 3 * 0.08


@pytest.mark.parametrize("preset", ["hashray", "released", "paper"])
def test_label_network_is_seeded_and_does_not_use_the_global_generator(preset: str) -> None:
    labels = make_rows(50)[1]
    config = small(preset=preset, label_epochs=5)
    state = torch.random.get_rng_state()
    first, second, other = (fit_label_network(labels, config, seed).codes(labels) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(first, second) and first.shape == (50, 2) and first.dtype == np.uint8
    assert other.shape == first.shape


def test_unusable_label_matrices_are_refused() -> None:
    for labels, text in (
        (np.zeros((0, 4), np.uint8), "neither of them 0"),
        (np.full((3, 2), 2, np.uint8), "entries other than 0 and 1"),
        (np.ones((3, 2), np.uint8), "the same labels"),
    ):
        with pytest.raises(InputError, match=text):
            fit_label_network(labels, small())


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, LabelTable, Any]]:
    """(round, table, banks) of every later training of LabNet."""
    import hashray.methods.dseh as module

    seen: list[tuple[int, LabelTable, Any]] = []
    real = module.train_label_network

    def spy(net: Any, table: Any, config: Any, seed: int, round: int = 0, banks: Any = None, *more: Any) -> Any:
        seen.append((round, table, banks))
        return real(net, table, config, seed, round, banks, *more)

    monkeypatch.setattr(module, "train_label_network", spy)
    return seen


def test_per_sample_banks_hold_the_output_of_every_row(trainings: list[tuple[int, LabelTable, Any]]) -> None:
    _, loop = run_loop(config_of(epochs=1, method={"rounds": 2, "bank": "per_sample", "label_epochs": 2}), 80)
    (_, first, none), (_, second, banks) = trainings
    assert none is None and len(first.rows) == len(second.rows) == 80 and bool((second.counts == 1).all())
    _, labels, _ = make_rows(80)
    assert sorted(map(tuple, second.rows.tolist())) == sorted(map(tuple, labels.tolist()))
    assert banks[0].shape == (80, 16) and set(banks[1].unique().tolist()) == {-1.0, 1.0}
    assert len(torch.unique(banks[0], dim=0)) == 80  # not means of label rows
    method = loop.method
    assert isinstance(method, DSEH)
    values, of = loop.workers.gather_rows(method.eval()._bank_outputs)
    features, _, _ = make_rows(80)
    expected = method._bank_outputs(torch.as_tensor(features)).detach()
    torch.testing.assert_close(values[values.argsort(0)[:, 0]], expected[expected.argsort(0)[:, 0]])
    assert of.shape == (80, 4)


def test_rounds_after_the_first_start_from_imgnet_s_outputs(trainings: list[tuple[int, LabelTable, Any]]) -> None:
    saved: dict[str, Any] = {}
    config = config_of(epochs=1, method={"rounds": 2})

    def keep(method: Any) -> float:  # runs after the only epoch of each round
        if not saved:
            saved.update({name: value.clone() for name, value in method.state_dict().items()})
        return 0.5

    run_loop(config, 80, validate=keep)
    assert [entry[0] for entry in trainings] == [0, 1] and trainings[0][2] is None
    banks = trainings[1][2]
    features, labels, _ = make_rows(80)
    method = run_loop(config_of(epochs=1, method={"rounds": 1}), 80)[1].method
    assert isinstance(method, DSEH)
    method.load_state_dict(saved)
    method.eval()
    with torch.no_grad():
        feature = method.semantic(torch.as_tensor(features))
        bits = torch.where(method.hash(feature) >= 0, 1.0, -1.0).double()
    table = LabelTable.of(torch.as_tensor(labels))
    index = table.index(torch.as_tensor(labels))
    for row in range(len(table.rows)):
        same = index == row
        assert torch.allclose(banks[0][row], feature[same].mean(0), atol=1e-9)
        majority = torch.where(bits[same].mean(0) >= 0, 1.0, -1.0).double()
        assert torch.equal(banks[1][row], majority)


@pytest.mark.parametrize(("label_batch", "comes_back"), [(4, True), (256, False)])
def test_labnet_learns_from_imgnet_only_what_a_batch_does_not_overwrite(label_batch: int, comes_back: bool) -> None:
    table, config = LabelTable.of(torch.as_tensor(make_rows(60)[1])), small(label_batch=label_batch, label_epochs=4)
    assert 4 < len(table.rows) <= 256
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        net, generator = LabNet(config, 4), torch.Generator().manual_seed(seed)
        banks = [torch.randn(len(table.rows), width, generator=generator) for width in (16, 16)]
        train_label_network(net, table, config, 0, 1, (banks[0], banks[1]))
        states.append(net.state_dict())
    same = all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert same is not comes_back
