"""`hashray train` on Ray: the same weights from memory and from the stream, through a lost worker and a lost driver."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.state import get_actor
from safetensors.torch import load_file
from tiny import BACKBONE, METHOD, file_of, files_of, kill_command_when, killing_worker_when, write_corpus, write_toml

from hashray import artifact
from hashray.artifact import Manifest, canonical, table_bytes
from hashray.cli import main
from hashray.config import validate
from hashray.data.columns import list_column
from hashray.data.corpus import open_corpus
from hashray.data.images import AugmentConfig
from hashray.engine.reports import start_reports
from hashray.errors import AlreadyExists
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.storage import open_store
from hashray.train.assembly import training_rows
from hashray.train.batches import EpochPlan, MemorySlices, Slice
from hashray.train.config import TrainConfig
from hashray.train.job import input_shape, input_type
from hashray.train.run import train
from hashray.train.selection import Selection
from hashray.train.stream import START_FILE, StreamSlices, StreamSpec, scan_dataset, training_dataset

pytestmark = pytest.mark.usefixtures("ray_session")
ROWS, BATCH, WINDOW, EPOCHS = 60, 8, 16, 3
CONFIG: dict[str, Any] = {
    "method": {**METHOD, "rounds": 2},
    "backbone": BACKBONE,
    "augment": {"flip": True, "shift": 1},
    "optim": {"lr": 3e-3},
    "epochs": 2,
    "batch_size": BATCH,
    "shuffle_window": WINDOW,
    "validation_rows": 8,
    "validation_every": 1,
    "checkpoint_steps": 2,
    "cpus_per_worker": 0.5,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("train") / "corpus")
    write_corpus(url, ROWS, 25)
    return url


@pytest.fixture(scope="module")
def unbroken(corpus: str, ray_session: Any) -> Path:
    """A model trained from memory by one worker without interruption."""
    out = Path(corpus).parent / "unbroken"
    train(config_of(corpus=corpus, out=str(out), input="memory"))
    return out


def config_of(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, CONFIG | changes, "test")


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    """Equal weights and, line by line, equal metrics."""
    left, right = (load_file(file_of(folder, "model.safetensors")) for folder in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n} {text}"
        )  # type: ignore[misc]
    lines = [
        [json.loads(line) for line in file_of(folder, "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    assert len(lines[0]) == len(lines[1]) == 4
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, abs=10 * tolerance) if isinstance(value, float) else value), key


def second_epoch_begun(out: Path) -> bool:
    """Whether there is a complete checkpoint of the second epoch or later."""
    for state in (out / "checkpoints").glob("*/checkpoint_*/position.json"):
        try:
            at = json.loads(state.read_text())
        except (OSError, ValueError):
            continue
        if (at["phase"], at["epoch"]) >= (0, 1) and at["step"] > 0:
            return True
    return False


@pytest.mark.slow
def test_streamed_and_its_worker_killed_gives_the_weights_of_memory_unbroken(
    corpus: str, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "streamed"
    with killing_worker_when(lambda: second_epoch_begun(out), "ray::RayTrainWorker") as killed:
        train(config_of(corpus=corpus, out=str(out), input="stream"))
    assert killed, "the run was over before its worker could be killed"
    assert_same(unbroken, out, 1e-6)
    assert artifact.verify(out) == []
    assert not list((out / "checkpoints").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_its_checkpoint(
    corpus: str, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = write_toml(tmp_path / "config.toml", CONFIG), tmp_path / "resumed"
    words = ["train", path, "--corpus", corpus, "--out", str(out), "--input", "memory", "--ray", "always"]
    kill_command_when(words, lambda: second_epoch_begun(out), tmp_path / "log")
    assert not (out / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*/checkpoint_*/position.json")}
    assert kept
    assert main(words) == 0
    assert_same(unbroken, out, 1e-6)
    assert files_of(out)["manifest.json"] == files_of(unbroken)["manifest.json"]
    # It is finished now: the same command changes nothing, another one may not write here.
    before = files_of(out)
    assert main(words) == 0
    assert "is finished already" in capfd.readouterr().err
    assert main([*words, "--seed", "7"]) == 1
    assert "holds a finished model" in capfd.readouterr().err
    assert files_of(out) == before


def test_where_there_is_no_dashboard_the_question_for_an_actor_is_refused_at_once() -> None:
    # Looked for, its address would not be found: ConnectionError, after 40 s.
    with pytest.raises(RayTaskError, match="Failed to connect to API server"):
        ray.get(ray.remote(num_cpus=0)(get_actor).remote("0" * 32, timeout=10))


@pytest.mark.slow
def test_frozen_features_are_made_once_and_two_workers_equal_one(corpus: str, tmp_path: Path) -> None:
    weights = tmp_path / "trunk.pth"
    torch.manual_seed(1)
    torch.save(build_trunk(BackboneConfig.model_validate(BACKBONE)).net.state_dict(), weights)
    frozen = {"backbone": {**BACKBONE, "frozen": True, "weights": str(weights)}, "features": str(tmp_path / "features")}
    one = train(config_of(corpus=corpus, out=str(tmp_path / "one"), **frozen))
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*") if p.is_file()}
    assert artifact.verify(tmp_path / "features") == []
    two = train(config_of(corpus=corpus, out=str(tmp_path / "two"), workers=2, **frozen))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*") if p.is_file()} == written
    assert one.parents == two.parents and set(one.parents) == {"corpus", "features"}
    assert_same(tmp_path / "one", tmp_path / "two", 1e-4)
    # Features that do not fit into memory are streamed: the same batches, so the same weights.
    train(config_of(corpus=corpus, out=str(tmp_path / "streamed"), input="stream", **frozen))
    assert_same(tmp_path / "one", tmp_path / "streamed", 1e-6)
    with pytest.raises(AlreadyExists, match="holds a finished model"):
        train(config_of(corpus=corpus, out=str(tmp_path / "one"), seed=3, **frozen))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, "1:2"])
def test_two_workers_on_the_stream_train_on_every_row(workers: int | str, corpus: str, tmp_path: Path) -> None:
    """The loop itself counts the rows of every epoch; the slices test below checks which rows they are."""
    out = tmp_path / "two"
    train(config_of(corpus=corpus, out=str(out), input="stream", workers=workers))
    assert len(file_of(out, "metrics.jsonl").read_text().splitlines()) == 4


@pytest.fixture(scope="module")
def features(corpus: str) -> str:
    """Cached features of the corpus: any numbers, its rows."""
    source, store = open_corpus(corpus), open_store(Path(corpus).parent / "features")
    files = []
    for record in source.parts:
        rows = source.part_rows(record, "all")
        column = list_column(np.random.default_rng(len(files)).normal(size=(len(rows), 5)).astype(np.float32))
        name = record.name.replace("rows", "features", 1)
        files += [
            artifact.write_file(store, record.name, table_bytes(rows), len(rows), record.info),
            artifact.write_file(store, name, table_bytes(pa.table({"feature": column})), len(rows)),
        ]
    files.append(artifact.write_file(store, "classes.json", canonical(source.classes)))
    info = {"feature_dim": 5}
    artifact.publish(
        store, Manifest(kind="features", project_version="0", config={}, parents={}, files=tuple(files), info=info)
    )
    return store.url


@pytest.mark.parametrize("kind", ["corpus", "features"])
def test_the_slices_of_a_stream_are_those_of_memory_for_one_worker_and_two(
    kind: str, corpus: str, features: str, tmp_path: Path
) -> None:
    config = config_of(corpus=corpus, out=str(tmp_path))
    opened = open_corpus({"corpus": corpus, "features": features}[kind], kind)
    selection = Selection(frozenset({"0003", "0040"}))
    inputs, labels, ids = training_rows(opened, selection, config)
    parts = tuple(record.name for record in opened.parts)
    plan = EpochPlan((24, 24, 10), 9, WINDOW, 5)  # 9 rows on two workers: shares of 5 and 4; the last batch has 4
    shape, dtype = input_shape(config, opened), input_type(opened).str
    assert (shape, dtype) == (((3, 16, 16), "|u1") if kind == "corpus" else ((5,), "<f4"))
    for fewest, world in ((1, 1), (2, 2), (1, 2)):  # the last is an elastic group, at its second size
        url = str(tmp_path / f"{fewest}-{world}")
        augmentation = AugmentConfig(shift=2)
        spec = StreamSpec(opened.store.url, plan, parts, selection, shape, dtype, "crop", augmentation, fewest, url)
        memory = [MemorySlices(plan, inputs, labels, ids, augmentation, rank, world) for rank in range(world)]
        begin_at(url, 0, 0, world)
        for source, slices in zip(memory, read_all(spec, world, 0, 0), strict=True):
            assert_slices(slices, [piece for number in range(EPOCHS) for piece in source.epoch(number, 0)])
        if world == 1:
            continue
        # After a checkpoint in the second epoch, earlier windows are not read; later slices stay the same.
        begin_at(url, 1, 5, world)
        for source, slices in zip(memory, read_all(spec, world, 1, 5), strict=True):
            assert_slices(slices, [*source.epoch(1, 5), *source.epoch(2, 0)])
        with ThreadPoolExecutor(world) as pool:
            shards = split(scan_dataset(spec, start_reports()), world)
            swept = list(pool.map(lambda shard, spec=spec: list(StreamSlices(spec, None, shard, 3).scan()), shards))  # type: ignore[misc]
        assert sum(len(rows) for share in swept for rows, _ in share) == plan.rows


def begin_at(url: str, epoch: int, step: int, world: int) -> None:
    """Where a group of workers begins, as its first worker writes it."""
    position = {"epoch": epoch, "step": step, "world": world}
    open_store(url).write(START_FILE, json.dumps(position).encode())


def split(dataset: ray.data.Dataset, world: int) -> list[Any]:
    """Shards as Ray Train makes them."""
    dataset.context.execution_options.preserve_order = True
    return list(dataset.streaming_split(world, equal=True))


def read_all(spec: StreamSpec, world: int, first_epoch: int, first_step: int) -> list[list[Slice]]:
    """What every worker sees of the epochs from a place on; they read at the same time, as workers do."""

    def read(shard: Any) -> list[Slice]:
        source = StreamSlices(spec, shard, None, 3)
        epochs = [source.epoch(n, first_step if n == first_epoch else 0) for n in range(first_epoch, EPOCHS)]
        slices = [piece for one in epochs for piece in one]
        assert source._running is not None and next(source._running, None) is None  # nothing is left over
        return slices

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(read, split(training_dataset(spec, EPOCHS, start_reports()), world)))


def assert_slices(slices: list[Slice], expected: list[Slice]) -> None:
    assert [(piece.step, piece.rows) for piece in slices] == [(piece.step, piece.rows) for piece in expected]
    for one, other in zip(slices, expected, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.labels, other.labels)
