"""Two runs into one folder: one whole artifact, and the other's message (law 4)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import BACKBONE, METHOD, write_corpus, write_images, write_tiny_model
from twins import Twins, twins

from hashray import artifact
from hashray.artifact import Manifest, write_named, write_plain
from hashray.config import validate
from hashray.data.corpus import open_corpus
from hashray.data.ingest import IngestConfig, ingest
from hashray.encode.codes import EncodeConfig, encode
from hashray.encode.features import TrunkRecipe, compute_features
from hashray.engine.session import WorkersConfig
from hashray.errors import AlreadyExists, CorruptArtifact, InputError
from hashray.evaluate.run import EvaluateConfig, evaluate
from hashray.index.build import IndexConfig, build_index
from hashray.model import load_model
from hashray.storage import open_store
from hashray.storage.local import place, write_synced
from hashray.train.config import TrainConfig
from hashray.train.run import train

TRAINING = {
    "method": {**METHOD, "rounds": 1, "label_epochs": 3}, "backbone": BACKBONE, "epochs": 2, "batch_size": 8,
    "validation_rows": 4, "ray": "never", "tensorboard": False,
}  # fmt: skip
HERE = WorkersConfig(workers=1, ray="never")
ALL_PAIRS = 20


def test_the_model_of_the_winner_is_not_touched_by_the_loser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B writes and publishes while A stands between its files and its manifest."""
    publish: Callable[..., Manifest] = artifact.publish
    out, alone = tmp_path / "out", tmp_path / "alone"
    winner = write_tiny_model(alone, seed=1)

    def overtaken(*arguments: object) -> Manifest:
        monkeypatch.setattr(artifact, "publish", publish)
        write_tiny_model(out, seed=1)  # B, in the middle of A
        return publish(*arguments)

    monkeypatch.setattr(artifact, "publish", overtaken)
    with pytest.raises(AlreadyExists, match="another run published here first"):
        write_tiny_model(out, seed=0)  # A
    assert artifact.verify(out) == [] and artifact.load_manifest(out) == winner
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    assert np.array_equal(load_model(str(out)).logits(pixels), load_model(str(alone)).logits(pixels))


def test_plain_copies_are_of_what_is_published(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    mine, theirs = (write_named(store, "figures/report.html", text) for text in (b"mine", b"theirs"))
    assert mine.name != theirs.name and store.read(mine.name) == b"mine"
    fields = {"project_version": "0", "config": {}, "parents": {}}
    manifest = Manifest(kind="evaluation", files=(theirs,), **fields)
    write_plain(store, manifest)
    assert store.read("figures/report.html") == b"theirs"
    store.write("figures/report.html", b"a loser's")
    write_plain(store, manifest)
    assert store.read("figures/report.html") == b"theirs"
    assert manifest.record("figures/report.html") == theirs
    with pytest.raises(CorruptArtifact, match=r"lists no file 'report\.html'"):
        manifest.record("report.html")


def test_a_folder_that_another_run_removes_is_made_again(tmp_path: Path) -> None:
    target, seen = tmp_path / "out" / "progress" / "record", []

    def fill(temp: Path) -> None:
        seen.append(temp)
        if len(seen) < 3:
            temp.parent.rmdir()
        if len(seen) == 1:
            temp.parent.parent.rmdir()
        write_synced(temp, b"data")

    place(target, fill, os.replace)
    assert target.read_bytes() == b"data" and len(seen) == 3

    def cleared_at_once(temp: Path, target: Path) -> None:
        temp.replace(target)
        target.unlink()
        target.parent.rmdir()

    place(target, lambda temp: write_synced(temp, b"data"), cleared_at_once)
    assert not target.parent.exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a part of this path is a file"):
        open_store(tmp_path).write("file/record", b"data")


@dataclass(frozen=True)
class Places:
    """Inputs that all pairs share; the two models differ in their weights, also in those of the trunk."""

    source: str
    corpus: str
    models: tuple[str, str]
    codes: str


def run_ingest(places: Places, which: int, out: str) -> Manifest:
    return ingest(IngestConfig(source=places.source, out=out, seed=which, rows_per_part=5, pool=HERE))


def run_encode(places: Places, which: int, out: str) -> Manifest:
    return encode(EncodeConfig(model=places.models[which], corpus=places.corpus, out=out, pool=HERE))


def run_features(places: Places, which: int, out: str) -> Manifest:
    recipe = TrunkRecipe(load_model(places.models[which]).backbone, places.models[which])
    return compute_features(open_corpus(places.corpus), recipe, out, HERE, 0.0).manifest


def run_train(places: Places, which: int, out: str) -> Manifest:
    return train(validate(TrainConfig, {**TRAINING, "corpus": places.corpus, "out": out, "seed": which}, "twin"))


def run_index(places: Places, which: int, out: str) -> Manifest:
    return build_index(IndexConfig(codes=places.codes, out=out, shards=1 + which, pool=HERE))


def run_evaluate(places: Places, which: int, out: str) -> dict[str, Any]:
    config = EvaluateConfig(
        model=places.models[0], corpus=places.corpus, out=out, top_k=5 + which, baselines=False, gallery=2, pool=HERE
    )
    return evaluate(config)


def run_evaluate_models(places: Places, which: int, out: str) -> dict[str, Any]:
    config = EvaluateConfig(
        model=places.models[which], corpus=places.corpus, out=out, baselines=False, gallery=2, pool=HERE
    )
    return evaluate(config)


# Each stage, and its pairs in the fast suite.
STAGES = {
    "ingest": (run_ingest, 4), "features": (run_features, 4), "train": (run_train, 2), "encode": (run_encode, 4),
    "index": (run_index, 8), "evaluate": (run_evaluate, 1), "evaluate-models": (run_evaluate_models, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("twins")
    source, corpus, codes = write_images(root / "images", 24), str(root / "corpus"), str(root / "codes")
    write_corpus(corpus, 24, 6, split_of=lambda i: "query" if i % 4 == 3 else "database+train")
    models = (str(root / "model-0"), str(root / "model-1"))
    for seed, model in enumerate(models):
        write_tiny_model(model, seed=seed)
    encode(EncodeConfig(model=models[0], corpus=corpus, out=codes, pool=HERE))
    return Places(source, corpus, models, codes)


@pytest.fixture(scope="module")
def pair() -> Iterator[Twins]:
    with twins() as processes:
        yield processes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("different", [True, False], ids=["different", "identical"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.timeout(1200)
def test_racing_runs_leave_one_whole_artifact(
    pair: Twins, places: Places, stage: str, different: bool, every: bool, tmp_path: Path
) -> None:
    run, few = STAGES[stage]
    pair.race_pairs(partial(run, places), different, tmp_path, ALL_PAIRS if every else few)
