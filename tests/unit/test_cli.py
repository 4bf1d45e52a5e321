"""The command line: exit code 2 and advice for a wrong request, before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import head_config, write_corpus, write_tiny_model, write_toml, write_trunk

from hashray import artifact, storage
from hashray.artifact import Manifest
from hashray.cli import main
from hashray.methods import of_kind
from hashray.train.config import read_training_config
from tests.unit.worker_group import config_of


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 2) -> str:
    """Run a command that must end with `code`; what it said, in one line."""
    try:
        exit_code = main([str(word) for word in words])
    except SystemExit as stopped:  # tyro ends the process itself for a flag it does not know
        exit_code = int(stopped.code or 0)
    assert exit_code == code
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


def toml(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text)
    return path


def test_commands_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert "perhaps you meant 'ingest'" in fails(capsys, "ingst")
    assert "'index rebuild' is not a command" in fails(capsys, "index", "rebuild")
    assert "usage: hashray [-h] {demo,ingest," in fails(capsys)
    assert "Perhaps you meant" in fails(capsys, "ingest", "x", "--out", "y", "--split-protocl", "as-given")


def test_missing_and_empty_sources(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path}/none" in fails(capsys, "ingest", tmp_path / "none", "--out", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, "ingest", tmp_path / "empty", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_labels_out_of_range_name_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 7\n")
    flags = ("--class-names", tmp_path / "names.txt", "--out", tmp_path / "o")
    said = fails(capsys, "ingest", tmp_path / "list.txt", *flags)
    assert "line 2" in said and "label 7 is out of range" in said and "0 to 1" in said


def test_training_configs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = toml(tmp_path, 'epoch = 3\n[method]\nkind = "dseh"\nnum_bits = 30\n[optim]\nlr = -1\n')
    said = fails(capsys, "train", path)
    assert "3 faults" in said and "perhaps you meant 'epochs'" in said
    assert "30 is not a positive multiple of 8; use 24 or 32" in said and "optim.lr" in said
    assert "perhaps you meant 'dseh'" in fails(capsys, "train", toml(tmp_path, '[method]\nkind = "dsh"\n'))
    good = toml(tmp_path, '[method]\nkind = "dseh"\n')
    assert "--corpus is missing" in fails(capsys, "train", good, "--out", tmp_path / "m")
    assert "not a finished artifact" in fails(capsys, "train", good, "--corpus", tmp_path, "--out", tmp_path / "m")
    assert "31 is not a positive multiple of 8" in fails(capsys, "train", good, "--method.num-bits", "31")
    assert "Unrecognized" in fails(capsys, "train", good, "--method.num-bit", "32")
    assert "needs a config first" in fails(capsys, "train", "--out", "x")
    assert "not found" in fails(capsys, "train", tmp_path / "none.toml")


def test_a_query_that_is_no_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from hashray.methods import build_method
    from hashray.methods.backbone import BackboneConfig, build_trunk
    from hashray.model import write_model
    from tests.unit.test_search import small_index

    config = config_of()
    method = build_method(config.method, build_trunk(BackboneConfig(width=4)), 3)
    write_model(storage.open_store(tmp_path / "m"), method, method.state_dict(), list("abc"), {}, {}, [], {})
    small_index(tmp_path, num_bits=16)
    (tmp_path / "x.png").write_bytes(b"not an image")
    words = ("search", tmp_path / "index", "--model", tmp_path / "m", "--image")
    assert "x.png cannot be used as a query: UnidentifiedImageError" in fails(capsys, *words, tmp_path / "x.png")
    assert "none.png not found" in fails(capsys, *words, tmp_path / "none.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "y.png")
    assert "cannot be searched" in fails(capsys, *words, tmp_path / "y.png")


def test_describe_and_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = storage.open_store(tmp_path)
    record = artifact.write_file(store, "a.bin", b"12345")
    manifest = Manifest(kind="model", project_version="1", config={}, parents={}, files=(record,))
    artifact.publish(store, manifest)
    assert main(["describe", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True
    assert main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "a.bin").write_bytes(b"12346")
    assert "a.bin" in fails(capsys, "verify", tmp_path, code=1)
    assert "not a finished artifact" in fails(capsys, "describe", tmp_path / "none")


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hashray", "describe", str(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_the_endpoint_flag_reaches_the_store(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):  # whichever is set: boto3 and Arrow prefer the second
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    assert main(["--endpoint-url", "http://127.0.0.1:9", "--version"]) == 0
    assert "at http://127.0.0.1:9 " in fails(
        capsys, "--endpoint-url", "http://127.0.0.1:9", "describe", "s3://b/x", code=1
    )
    assert "needs a value" in fails(capsys, "verify", "x", "--endpoint-url")


def test_another_method_on_the_command_line_keeps_what_both_know(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = 'epochs = 2\n[method]\nkind = "adalabelhash"\nnum_bits = 16\nmargin_ratio = 0.3\n'
    path = toml(tmp_path, text)
    said = fails(capsys, "train", path, "--method.kind", "dseh", "--method.num-bit", "8")
    assert "dseh takes no method.margin_ratio from" in said and "Unrecognized" in said
    assert "'dsh' is not known, perhaps you meant 'dseh'" in fails(capsys, "train", path, "--method.kind=dsh")
    assert "--out is missing" in fails(capsys, "train", path, "--method.kind=lcgh", "--method.hidden", "8")
    config = read_training_config(str(path))
    other, left_out = of_kind(config.method, "lcgh")
    assert (other.kind, other.num_bits, left_out) == ("lcgh", 16, ["margin_ratio"])


def test_a_training_that_learned_nothing_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 300)  # of which the images say nothing
    write_corpus(tmp_path / "chance", 300, 300, labels_of=lambda number: [int(labels[number])])
    write_corpus(tmp_path / "corpus", 300, 300)
    write_trunk(tmp_path / "trunk.pt")
    path = write_toml(tmp_path / "c.toml", head_config(tmp_path / "trunk.pt"))
    flags = ("--ray", "never", "--epochs", "1")
    said = fails(capsys, "train", path, "--corpus", tmp_path / "chance", "--out", tmp_path / "m", *flags, code=0)
    info = artifact.load_manifest(tmp_path / "m").info
    assert f"(random codes {info['random_map']:.4f})" in said and "learned next to nothing in 30 steps" in said
    said = fails(
        capsys, "train", path, "--corpus", tmp_path / "corpus", "--out", tmp_path / "n", "--ray", "never", code=0
    )
    assert "(random codes 0.3" in said and "next to nothing" not in said
