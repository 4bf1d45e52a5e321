"""`hashray encode` on Ray: every row once, through a kill in the middle and through images that went away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import file_of, files_of, kill_command_when, png, write_corpus, write_tiny_model

from hashray import artifact
from hashray.artifact import read_table
from hashray.cli import main
from hashray.data.images import decode
from hashray.encode.codes import EncodeConfig, encode
from hashray.engine.session import WorkersConfig
from hashray.model import load_model
from hashray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")
ROWS, ROWS_PER_PART, WORKERS = 480, 6, 2
PARTS = ROWS // ROWS_PER_PART
POOL = WorkersConfig(workers=WORKERS, cpus_per_worker=0.5)


def read_codes(url: str | Path) -> tuple[list[str], np.ndarray]:
    """Ids and packed codes of a finished artifact, in its order."""
    store = open_store(url)
    records = artifact.load_manifest(store, "codes").files
    table = pa.concat_tables([read_table(store, r) for r in records if r.name.startswith("parts/")])
    codes = np.frombuffer(b"".join(table.column("code").to_pylist()), np.uint8)
    return table.column("id").to_pylist(), codes.reshape(len(table), -1)


def test_killed_half_way_and_run_again_is_byte_equal(tmp_path: Path) -> None:
    model, corpus, out = str(tmp_path / "model"), str(tmp_path / "corpus"), tmp_path / "codes"
    write_tiny_model(model)
    write_corpus(corpus, ROWS, ROWS_PER_PART)
    unbroken = tmp_path / "unbroken"
    whole = encode(EncodeConfig(model=model, corpus=corpus, out=str(unbroken), pool=POOL))
    assert (whole.rows_in, whole.rows_out, whole.rows_quarantined) == (ROWS, ROWS, 0)

    words = ["encode", "--model", model, "--corpus", corpus, "--out", str(out), "--workers", str(WORKERS)]
    kill_command_when(words, lambda: len(list(out.glob("progress/*/*.json"))) >= PARTS // 2, tmp_path / "log")
    assert not (out / "manifest.json").exists()
    finished = {json.loads(p.read_bytes())["file"]["name"] for p in out.glob("progress/*/*.json")}
    assert PARTS // 2 <= len(finished) < PARTS, "the kill came too late to show anything"
    before = {f"parts/{p.name}": p.stat().st_mtime_ns for p in (out / "parts").glob("part-*")}
    assert finished <= before.keys()

    assert main(words) == 0
    again = {name for name, mtime in before.items() if (out / name).stat().st_mtime_ns != mtime}
    assert len(again) <= WORKERS and not again & finished
    assert not list(out.rglob(".hashray-tmp-*.parquet"))
    assert {n: d for n, d in files_of(out).items() if "hashray-tmp" not in n} == files_of(unbroken)
    assert artifact.verify(out) == []
    ids, codes = read_codes(out)
    assert ids == [f"{i:04d}" for i in range(ROWS)]
    direct = load_model(model).encode([decode(png(i)) for i in range(ROWS)])
    # One row of a thousand may hold a logit so near 0 that another batch size tips it.
    assert (codes != np.asarray(direct)).any(1).mean() <= 1e-3


def test_images_that_went_away_are_put_aside_one_row_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, corpus, images = str(tmp_path / "model"), str(tmp_path / "corpus"), tmp_path / "images"
    write_tiny_model(model)
    write_corpus(corpus, 40, 7, reference=images)
    (images / "0005.png").unlink()
    (images / "0023.png").write_bytes(png(23)[:60])
    strict = ["encode", "--model", model, "--corpus", corpus, "--out", str(tmp_path / "codes")]
    strict += ["--workers", "2", "--cpus-per-worker", "0.5"]
    assert main([*strict, "--max-bad", "0.04"]) == 1
    text = capfd.readouterr().err
    assert "2 of 40 rows could not be used, --max-bad allows 0.04" in text
    assert not (tmp_path / "codes" / "manifest.json").exists()
    # The same command with a larger share goes on from the finished parts.
    assert main([*strict, "--max-bad", "0.05"]) == 0
    manifest = artifact.load_manifest(tmp_path / "codes", "codes")
    assert (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined) == (40, 38, 2)
    assert artifact.verify(tmp_path / "codes") == []
    bad: list[dict[str, Any]] = pq.read_table(file_of(tmp_path / "codes", "quarantine.parquet")).to_pylist()
    assert [row["id"] for row in bad] == ["0005", "0023"]
    assert "not found" in bad[0]["reason"] and "OSError" in bad[1]["reason"]
    ids, _ = read_codes(tmp_path / "codes")
    assert sorted(ids + [row["id"] for row in bad]) == [f"{i:04d}" for i in range(40)]
