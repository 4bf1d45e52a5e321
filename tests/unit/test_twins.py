"""Two runs into one folder: one whole artifact, and the other's message (law 4)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_corpus, write_images, write_tiny_model

from hashray import artifact
from hashray.artifact import Manifest, write_named, write_plain
from hashray.data.ingest import IngestConfig, ingest
from hashray.encode.codes import EncodeConfig, encode
from hashray.engine.session import WorkersConfig
from hashray.errors import AlreadyExists, CorruptArtifact
from hashray.index.build import IndexConfig, build_index
from hashray.model import load_model
from hashray.storage import open_store


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


HERE = WorkersConfig(ray="never")
PAIRS = 6


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[int, str], Any]]:
    """Each stage as a function of what differs between the two runs, and of --out."""
    root = tmp_path_factory.mktemp("twins")
    source, corpus = write_images(root / "images", 24), str(root / "corpus")
    write_corpus(corpus, 24, 5)
    models = [str(root / f"model-{seed}") for seed in range(2)]
    for seed, model in enumerate(models):
        write_tiny_model(model, seed=seed)
    codes = str(root / "codes")
    encode(EncodeConfig(model=models[0], corpus=corpus, out=codes, pool=HERE))
    return {
        "ingest": lambda which, out: ingest(
            IngestConfig(source=source, out=out, seed=which, rows_per_part=5, pool=HERE)
        ),
        "encode": lambda which, out: encode(EncodeConfig(model=models[which], corpus=corpus, out=out, pool=HERE)),
        "index": lambda which, out: build_index(IndexConfig(codes=codes, out=out, shards=1 + which, pool=HERE)),
    }


def outcome(start: threading.Barrier, run: Callable[[], Any]) -> Any:
    start.wait()
    try:
        return run()
    except AlreadyExists as error:
        return error


@pytest.mark.parametrize("stage", ["ingest", "encode", "index"])
@pytest.mark.parametrize("different", [True, False])
def test_racing_runs_leave_one_whole_artifact(
    stages: dict[str, Callable[[int, str], Any]], stage: str, different: bool, tmp_path: Path
) -> None:
    for pair in range(PAIRS):
        out, start = str(tmp_path / str(pair)), threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(outcome, start, partial(stages[stage], which, out)) for which in (0, int(different))]
            ends = [run.result() for run in runs]
        lost = [end for end in ends if isinstance(end, AlreadyExists)]
        assert artifact.verify(out) == []
        assert len(lost) == different, ends
        (winner,) = {end.id for end in ends if isinstance(end, Manifest)}
        assert artifact.load_manifest(out).id == winner
        for error in lost:
            assert "another input or configuration" in str(error) or "another run published here first" in str(error)
