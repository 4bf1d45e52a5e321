"""Values that change while a model trains: which may, from which epoch on, and which stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hashray.config import validate
from hashray.errors import ConfigError
from hashray.train.config import TrainConfig
from hashray.train.job import require_one_network
from tests.unit.worker_group import Stop, config_of, read, run_loop

HALF: dict[str, Any] = {"epochs": 2, "method": {"kind": "adalabelhash"}}


def changing(*changes: dict[str, Any], **more: Any) -> TrainConfig:
    return validate(TrainConfig, {"method": {"kind": "lcgh"}, "epochs": 20, "changes": list(changes), **more}, "f")


def refused(*changes: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        changing(*changes, **more)
    return str(caught.value)


def test_each_change_adds_to_those_before_it() -> None:
    config = changing(
        {"after": 3, "optim": {"lr": 1e-4}}, {"after": 5, "method": {"margin": 0.2}, "augment": {"flip": False}}
    )
    segments = config.segments()
    assert [after for after, _ in segments] == [0, 3, 5]
    assert [segment.optim.lr for _, segment in segments] == [1e-3, 1e-4, 1e-4]
    assert [segment.method.margin for _, segment in segments] == [0.5, 0.5, 0.2]  # type: ignore[attr-defined]
    assert [segment.augment.flip for _, segment in segments] == [True, True, False]
    assert all(not segment.changes for _, segment in segments)
    assert "changes" in config.result_of() and "changes" not in segments[0][1].result_of()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"after": 2, "optim": {"lrr": 1.0}}, "optim.lrr: unknown key, perhaps you meant 'lr'?"),
        ({"after": 2, "optim": {"lr": -1.0}}, "after 2 epochs: 1 fault\n  optim.lr: Input should be greater than 0"),
        ({"after": 0, "optim": {"lr": 1.0}}, "changes.0.after: Input should be greater than or equal to 1"),
        ({"after": 2, "method": {"kind": "dseh"}}, "method.kind cannot change while a model trains"),
        ({"after": 2, "optim": {"name": "sgd"}}, "optim.name cannot change while a model trains"),
        ({"after": 2, "epochs": 3}, "changes.0.epochs: unknown key"),
    ],
)
def test_a_change_that_cannot_be_is_refused(change: dict[str, Any], text: str) -> None:
    assert text in refused(change)


def test_changes_come_one_after_another_and_are_of_one_training() -> None:
    late, early = {"after": 4, "optim": {"lr": 1e-4}}, {"after": 2, "optim": {"lr": 1e-4}}
    assert "after = [4, 2]; each comes later" in refused(late, early)
    assert "give one of the two" in refused(early, self_training={"rounds": 1})


@pytest.mark.parametrize(
    ("method", "after", "text"),
    [
        ({"hidden": 8}, 2, "after 2 epochs: hidden would give another network"),
        ({"warmup_share": 0.5}, 2, "warmup_share would give another network or other phases"),
        ({"priority": "split"}, 2, "priority would give another network"),  # whose class codes are of fewer bits
        ({"margin": 0.2}, 20, "after = 20, and the training ends after 20 epochs"),
    ],
)
def test_the_network_and_the_phases_stay_as_they_are(method: dict[str, Any], after: int, text: str) -> None:
    config = changing({"after": after, "method": method}, backbone={"width": 4})
    with pytest.raises(ConfigError) as caught:
        require_one_network(config, 3)
    assert text in str(caught.value)


def test_codes_are_read_in_one_way_all_along() -> None:
    method = {"kind": "dseh", "label_hidden": 8, "semantic_dim": 8, "hash_reads": "semantic"}
    change = {"after": 2, "method": {"hash_reads": "activated"}}
    config = validate(TrainConfig, {"method": method, "epochs": 20, "changes": [change], "backbone": {"width": 4}}, "f")
    with pytest.raises(ConfigError, match="hash_reads would give another network"):
        require_one_network(config, 3)


def test_a_weight_may_change_before_the_last_epoch() -> None:
    require_one_network(changing({"after": 19, "method": {"margin": 0.2}}, backbone={"width": 4}), 3)


def in_two(tmp_path: Path, **later: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A run whose second epoch has another config."""
    with pytest.raises(Stop):
        run_loop(config_of(**HALF), 100, stop_at=(0, 1, 0), folder=tmp_path)
    return run_loop(config_of(**{**HALF, **later}), 100, checkpoint=read(tmp_path))


def test_a_change_to_the_same_values_changes_nothing(tmp_path: Path) -> None:
    whole, _ = run_loop(config_of(**HALF), 100)
    weights, _ = in_two(tmp_path)
    assert all(torch.equal(whole[name], weights[name]) for name in whole)


def test_rates_and_decays_are_those_of_the_segment_and_moments_go_on(tmp_path: Path) -> None:
    whole, unbroken = run_loop(config_of(**HALF), 100)
    method = {"kind": "adalabelhash", "codeword_lr_factor": 7.0}
    weights, loop = in_two(tmp_path, optim={"lr": 1e-4, "weight_decay": 0.5}, method=method)
    first, second = loop.position.notes["history"]
    assert first == unbroken.position.notes["history"][0]
    assert second["lr"] == pytest.approx(unbroken.position.notes["history"][1]["lr"] / 10)
    groups = {group["name"]: group for group in loop.optimizer.param_groups}
    assert groups["head"]["weight_decay"] == 0.5 and groups["codewords"]["factor"] == 7.0
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {8}
    assert any(not torch.equal(whole[name], weights[name]) for name in whole)
