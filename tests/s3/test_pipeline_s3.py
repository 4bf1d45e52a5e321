"""The whole pipeline against a real S3 server over HTTP, through the command line, source images on S3 too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hashray import artifact, load_model, open_index
from hashray.cli import main
from hashray.config import validate
from hashray.errors import HashrayError, MismatchError
from hashray.index.build import IndexConfig, build_index
from hashray.storage import open_store, read_url
from tests.tiny import BACKBONE, METHOD, png, write_images, write_tiny_model, write_toml

TRAINING = {
    "epochs": 1,
    "batch_size": 16,
    "validation_rows": 4,
    "method": {**METHOD, "rounds": 1},
    "backbone": BACKBONE,
}


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def flip(url: str, name: str) -> bytes:
    """Flip one bit in the middle of a file; return what it held."""
    store = open_store(url)
    data = store.read(name)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    store.write(name, bytes(changed))
    return data


def test_images_on_s3_become_a_searchable_index_on_s3(
    ray_session: Any, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_toml(tmp_path / "c.toml", TRAINING)
    source = write_images(f"{s3_url}/images", 48)
    open_store(source).write("train/ant/broken.png", b"no image")
    out = f"{s3_url}/run"
    assert run("pipeline", config, "--source", source, "--out", out, "--shards", "2", "--workers", "1") == 0
    artifacts = ("corpus", "model", "codes", "index", "evaluation")
    for name in artifacts:
        assert run("verify", f"{out}/{name}") == 0, capsys.readouterr().err
    corpus = artifact.load_manifest(f"{out}/corpus", "corpus")
    assert (corpus.rows_in, corpus.rows_out, corpus.rows_quarantined) == (49, 48, 1)
    metrics = json.loads(read_url(f"{out}/evaluation/metrics.json"))
    assert {row["name"] for row in metrics["results"]} >= {"dseh", "itq", "lsh", "float-cosine"}
    assert b"<h1>DSEH" in read_url(f"{out}/evaluation/report.html")

    # The same command again finds everything finished; another training config into the same place is refused.
    ids = [artifact.load_manifest(f"{out}/{name}").id for name in artifacts]
    assert run("pipeline", config, "--source", source, "--out", out, "--shards", "2", "--workers", "1") == 0
    assert ids == [artifact.load_manifest(f"{out}/{name}").id for name in artifacts]
    other = ("train", config, "--corpus", f"{out}/corpus", "--out", f"{out}/model", "--seed", "9")
    assert run(*other) == 1
    assert "Choose another --out" in " ".join(capsys.readouterr().err.split())

    # Search by the command line and from Python, without Ray.
    (tmp_path / "q.png").write_bytes(png(3))
    search = ("search", f"{out}/index", "--model", f"{out}/model", "--image", tmp_path / "q.png", "--k", "3", "--json")
    assert run(*search) == 0
    hits = json.loads(capsys.readouterr().out)[0]["hits"]
    assert len(hits) == 3 and hits == sorted(hits, key=lambda hit: (hit["distance"], hit["id"]))

    # Codes of another model of the same width, and of another width, are refused.
    write_tiny_model(f"{s3_url}/other", seed=1)
    write_tiny_model(f"{s3_url}/wide", num_bits=32)
    for model, said in (("other", "cannot be searched"), ("wide", "32 bits")):
        words = ("search", f"{out}/index", "--model", f"{s3_url}/{model}", "--image", tmp_path / "q.png")
        assert run(*words) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(MismatchError, match="cannot be searched"):
        open_index(f"{out}/index").search(load_model(f"{s3_url}/other").encode([]), 1)

    # One flipped bit in any file of any artifact: verify names it, and opening refuses.
    for name in artifacts:
        url = f"{out}/{name}"
        key = "versions/00000001.json" if name == "index" else "manifest.json"
        for file in [key, *(record.name for record in artifact.load_manifest(url).files)]:
            before = flip(url, file)
            assert run("verify", url) == 1, file
            assert file in capsys.readouterr().err
            open_store(url).write(file, before)
    fresh = str(tmp_path / "fresh")  # a whole copy of the shard in the cache would be opened in its place
    for url, file, opens in (
        (f"{out}/model", artifact.load_manifest(f"{out}/model").record("model.safetensors").name, load_model),
        (
            f"{out}/index",
            artifact.load_manifest(f"{out}/index").files[0].name,
            lambda u: open_index(u, cache_dir=fresh),
        ),
    ):
        before = flip(url, file)
        with pytest.raises(HashrayError, match=file.split("/")[-1]):
            opens(url)
        open_store(url).write(file, before)

    # Two publishers with different content race for version 1: one wins, the other raises.
    ends: dict[str, BaseException | None] = {}
    barrier = threading.Barrier(2)

    def publish(kind: str, shards: int) -> None:
        wanted = {"codes": f"{out}/codes", "out": f"{s3_url}/raced", "kind": kind, "shards": shards}
        barrier.wait()
        try:
            build_index(validate(IndexConfig, wanted, "race"))
            ends[kind + str(shards)] = None
        except HashrayError as error:
            ends[kind + str(shards)] = error

    threads = [threading.Thread(target=publish, args=("flat", shards)) for shards in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losers = [error for error in ends.values() if error is not None]
    assert len(ends) == 2 and len(losers) == 1
    assert "holds a finished index" in str(losers[0]) or "already exists" in str(losers[0])
    assert artifact.verify(f"{s3_url}/raced") == []

    # A version from the future.
    store = open_store(f"{s3_url}/raced")
    from hashray.artifact.manifest import canonical, sha256_hex

    fields = json.loads(store.read("versions/00000001.json"))
    del fields["id"]
    fields["format_version"] = 99
    store.write("versions/00000001.json", canonical({**fields, "id": sha256_hex(canonical(fields))}))
    assert run("search", f"{s3_url}/raced", "--model", f"{out}/model", "--image", tmp_path / "q.png") == 2
    assert "newer hashray" in " ".join(capsys.readouterr().err.split())


def test_wrong_bucket_and_missing_credentials(s3_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("describe", "s3://no-such-bucket-here/corpus") == 2
    assert "no-such-bucket-here" in capsys.readouterr().err
    keep = {k: v for k, v in os.environ.items() if not k.startswith("AWS_") or k == "AWS_ENDPOINT_URL"}
    keep |= {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    words = [sys.executable, "-m", "hashray", "describe", "s3://any/corpus"]
    ended = subprocess.run(words, env=keep, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "AWS_ACCESS_KEY_ID" in ended.stderr and "Traceback" not in ended.stderr
