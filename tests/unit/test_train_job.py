"""What a training is known by, and what its workers run in; the training itself is in tests/distributed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BACKBONE, write_corpus, write_trunk

from hashray.config import validate
from hashray.data.corpus import open_corpus
from hashray.errors import InputError
from hashray.train.batches import held_out
from hashray.train.config import TrainConfig
from hashray.train.job import plan_job, run_of, with_epochs
from hashray.train.run import with_absolute_paths
from hashray.train.worker import environment_of, trainer_of


def config_of(gpu: bool = False, **backbone: Any) -> TrainConfig:
    method = {"kind": "adalabelhash", "num_bits": 16}
    return validate(TrainConfig, {"method": method, "backbone": {**BACKBONE, **backbone}, "gpu": gpu}, "test")


def test_a_run_is_known_by_what_its_weights_hold_not_by_where_they_lie(tmp_path: Path) -> None:
    write_corpus(str(tmp_path / "corpus"), 8, 8)
    corpus = open_corpus(str(tmp_path / "corpus"))
    first, second, other = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    write_trunk(first)
    shutil.copy(first, second)
    torch.save({name: tensor + 1 for name, tensor in torch.load(first).items()}, other)

    def run(path: Path) -> str:
        return run_of(with_absolute_paths(config_of(weights=str(path), frozen=True)), corpus, None)[0]

    assert run(first) == run(second) != run(other)


def test_validation_rows_that_cannot_be_scored_are_refused_before_the_training(tmp_path: Path) -> None:
    (held,) = held_out([f"{i:04d}" for i in range(8)], 1, seed=0)
    write_corpus(str(tmp_path / "corpus"), 8, 8, labels_of=lambda i: [0 if i == int(held) else 1 + i % 2])
    corpus, config = open_corpus(str(tmp_path / "corpus")), config_of()
    with pytest.raises(
        InputError, match=r"1 validation rows share no class with the other train rows.*--validation-rows 0"
    ):
        plan_job(config, corpus)
    assert plan_job(config.model_copy(update={"validation_rows": 0}), corpus).plan.rows == 8


def test_a_trunk_that_trains_on_cpus_keeps_its_memory(tmp_path: Path) -> None:
    write_trunk(tmp_path / "a.pth")
    assert "MALLOC_MMAP_MAX_" in environment_of(config_of())["env_vars"]
    assert environment_of(config_of(gpu=True)) == {}
    assert environment_of(config_of(weights=str(tmp_path / "a.pth"), frozen=True)) == {}


def test_workers_wait_for_the_first_one_longer_than_a_label_network_trains(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 8, 8)
    job = plan_job(config_of(), open_corpus(str(tmp_path / "corpus")))
    trainer = trainer_of(replace(job, checkpoints=str(tmp_path / "checkpoints"), run="run"), reports=None)
    assert trainer.backend_config.timeout_s >= 86_400  # Ray's default is 1,800, and it ends the group and its restarts


@pytest.mark.parametrize(
    ("train", "given", "epochs"),
    [
        (500, {}, 250),  # 400 rows are 4 steps an epoch; without the validation rows there are 100 fewer
        (500, {"validation_rows": 0, "batch_size": 50}, 100),
        (2_000, {}, 77),
        (8_000, {}, 20),
        (1_000_000, {}, 20),
        (500, {"epochs": 3}, 3),
    ],
)
def test_few_rows_train_for_as_many_epochs_as_give_a_thousand_steps(
    train: int, given: dict[str, Any], epochs: int
) -> None:
    config = validate(TrainConfig, {"method": {"kind": "adalabelhash"}, "backbone": BACKBONE, **given}, "test")
    assert with_epochs(config, train, validation=0, unlabelled=7).epochs == epochs


def test_unlabelled_rows_that_train_count_as_rows() -> None:
    config = validate(TrainConfig, {"method": {"kind": "lcgh"}, "backbone": BACKBONE, "unlabelled": True}, "test")
    assert with_epochs(config, train=500, validation=100, unlabelled=1_100).epochs == 77
