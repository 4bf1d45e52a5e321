"""Two different runs into one folder: one whole artifact, and the other's message (law 4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_model

from hashray import artifact
from hashray.artifact import Manifest, write_named, write_plain
from hashray.errors import AlreadyExists, CorruptArtifact
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
