"""The contract suite: what every method must do, whatever its paper."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hashray import storage
from hashray.codes import binarize
from hashray.data.images import to_pixels
from hashray.methods import known_methods
from hashray.methods.base import Method, Term
from hashray.metrics import mean_average_precision
from hashray.model import load_model, write_model
from tests.unit.worker_group import build, config_of, make_rows, run_loop

KINDS = sorted(known_methods())
SMALL: dict[str, dict[str, Any]] = {"dseh": {"rounds": 1}}
IN_CLOSED_FORM = ["itq", "pca"]
IN_STEPS = [kind for kind in KINDS if kind not in IN_CLOSED_FORM]


def loss_of(terms: dict[str, Term]) -> torch.Tensor:
    return torch.stack([term.total / term.mass for term in terms.values() if term.in_loss]).sum()


def fitted(kind: str, count: int = 64, **changes: Any) -> tuple[Method, np.ndarray, np.ndarray]:
    config = config_of(**{"epochs": 1} | changes, method={"kind": kind, **SMALL.get(kind, {})})
    weights, loop = run_loop(config, count, dtype=torch.float32)
    loop.method.load_state_dict(weights)
    features, labels, _ = make_rows(count)
    return loop.method, features.astype(np.float32), labels


@pytest.mark.parametrize("kind", IN_STEPS)
def test_terms_are_finite_and_every_trained_parameter_gets_a_gradient(kind: str) -> None:
    method, features, labels = fitted(kind)
    config = config_of(epochs=1, method={"kind": kind, **SMALL.get(kind, {})})
    reached: set[int] = set()
    for phase in method.phases(config.num_epochs):
        terms = method.loss_terms(phase, torch.as_tensor(features), torch.as_tensor(labels), torch.ones(64))
        assert terms and all(bool(torch.isfinite(term.total)) for term in terms.values())
        method.zero_grad()
        loss_of(terms).backward()
        for group in method.trained(phase):
            for parameter in group.parameters:
                assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
                if bool((parameter.grad != 0).any()):
                    reached.add(id(parameter))
    trained = {id(p) for phase in method.phases(1) for group in method.trained(phase) for p in group.parameters}
    assert reached == trained


@pytest.mark.parametrize("kind", IN_CLOSED_FORM)
def test_without_steps_there_is_one_epoch_for_any_number_of_epochs(kind: str) -> None:
    method = fitted(kind)[0]
    assert [(phase.epochs, phase.steps) for epochs in (1, 9) for phase in method.phases(epochs)] == [(1, False)] * 2
    assert not [name for name, parameter in method.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", IN_STEPS)
def test_order_and_padding_of_a_batch_do_not_change_the_loss(kind: str) -> None:
    method, features, labels = fitted(kind)
    phase = method.phases(1)[0]
    method.double()

    def total(rows: list[int], weight: list[float]) -> float:
        inputs, targets = torch.as_tensor(features[rows]).double(), torch.as_tensor(labels[rows])
        return float(loss_of(method.loss_terms(phase, inputs, targets, torch.tensor(weight))))

    plain = total(list(range(20)), [1.0] * 20)
    assert total(list(reversed(range(20))), [1.0] * 20) == pytest.approx(plain, abs=1e-10)
    assert total([*range(20), 33, 40], [1.0] * 20 + [0.0, 0.0]) == pytest.approx(plain, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_64_rows_to_map_1(kind: str) -> None:
    method, features, labels = fitted(kind, epochs=150, batch_size=64, optim={"lr": 3e-3})
    with torch.no_grad():
        codes = binarize(method.encode(torch.as_tensor(features)))
    one = labels.sum(1) == 1  # rows of two classes are relevant to two clusters: no order of codes is perfect
    slack = 1e-6 if type(method).learns_from_labels(method.config) else 0.01
    assert mean_average_precision(codes[one], labels[one], codes[one], labels[one]) == pytest.approx(1.0, abs=slack)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_codes(kind: str, tmp_path: Path) -> None:
    config = config_of(method={"kind": kind, **SMALL.get(kind, {})})
    method = build(config, torch.float32)
    from hashray.methods import build_method
    from hashray.methods.backbone import BackboneConfig, build_trunk

    method = build_method(config.method, build_trunk(BackboneConfig(width=4)), 4).eval()
    store = storage.open_store(tmp_path)
    write_model(store, method, method.state_dict(), list("abcd"), {}, {}, [], {})
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 48, 3), dtype=np.uint8)
    loaded, again = load_model(str(tmp_path)), load_model(str(tmp_path))
    codes = loaded.encode(images)
    pixels = np.stack([to_pixels(Image.fromarray(image), 32, "crop") for image in images])
    assert np.array_equal(codes, binarize(method.encode(torch.as_tensor(pixels))))
    assert np.array_equal(codes, again.encode(images)) and codes.shape == (5, loaded.num_bits // 8)
    assert codes.fingerprint == loaded.fingerprint == again.fingerprint
    assert np.array_equal(codes, loaded.encode([Image.fromarray(image) for image in images]))


@pytest.mark.parametrize("module", [*[f"hashray.methods.{kind}" for kind in KINDS], "hashray.model"])
def test_imports_without_ray(module: str) -> None:
    code = f"import {module}, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
