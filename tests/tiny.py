"""What the tests of whole stages share: a tiny corpus, a tiny model, and commands that are killed half way."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import tomli_w
import torch
from PIL import Image

from hashray import artifact
from hashray.artifact import FileRecord, Manifest, canonical, table_bytes
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA
from hashray.engine.parts import Part, part_files, write_quarantine
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.model import write_model
from hashray.storage import Store, open_store

CLASSES = ("ant", "bee", "cat")
SIZE = 16
METHOD = {"kind": "dseh", "num_bits": 16, "label_hidden": 32, "semantic_dim": 16, "label_epochs": 30}
BACKBONE = {"name": "resnet9", "width": 4, "image_size": SIZE}
# Long enough for a machine on which everything else runs too; a test that passes never waits so long.
DEADLINE_S = 300


def png(number: int) -> bytes:
    """An image of class `number % 3`: its colour channel is the bright one."""
    pixels = np.random.default_rng(number).integers(0, 128, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels[:, :, number % 3] += 100
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def deny(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Make a file unreadable, for root too."""
    read_bytes = Path.read_bytes

    def read(self: Path) -> bytes:
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(self)

    patch.setattr(Path, "read_bytes", read)


def write_images(url: str | Path, rows: int) -> str:
    """A folder of images with splits and classes: every fourth a query, the others train and database."""
    store = open_store(url)
    for i in range(rows):
        split = "query" if i % 4 == 3 else "train"
        store.write(f"{split}/{CLASSES[i % 3]}/{i:03d}.png", png(i))
    return str(url)


def write_part(store: Store, index: int, items: Sequence[Mapping[str, Any]]) -> tuple[FileRecord, FileRecord]:
    """A part of a corpus from rows with all its columns: the file of the row table and that of the images."""
    info, name = {"splits": dict(Counter(item["split"] for item in items))}, f"part-{index:05d}.parquet"
    rows, images = (pa.Table.from_pylist(list(items), schema=schema) for schema in (ROW_SCHEMA, IMAGE_SCHEMA))
    return (
        artifact.write_file(store, f"rows/{name}", table_bytes(rows), rows=len(items), info=info),
        artifact.write_file(store, f"images/{name}", table_bytes(images), rows=len(items)),
    )


def write_corpus(
    url: str | Path,
    rows: int,
    rows_per_part: int,
    reference: str | Path | None = None,
    split_of: Callable[[int], str] = lambda number: "database+train",
    config: Mapping[str, Any] | None = None,
    labels_of: Callable[[int], list[int]] = lambda number: [number % 3],
    image_of: Callable[[int], bytes] = png,
    class_names: Sequence[str] | None = None,
) -> Manifest:
    """A corpus as ingest leaves it, without Ray; every row is in train and in database, or where `split_of` says.

    With `reference` (a folder) the images are written there and the corpus only says where they are.
    """
    class_names = CLASSES if class_names is None else class_names
    store = open_store(url)
    if reference is not None:
        for i in range(rows):
            open_store(reference).write(f"{i:04d}.png", png(i))
    parts: list[Part] = []
    for index, start in enumerate(range(0, rows, rows_per_part)):
        numbers = range(start, min(rows, start + rows_per_part))
        items = [
            {"id": f"{i:04d}", "image": None if reference else image_of(i),
             "uri": reference and f"{reference}/{i:04d}.png", "labels": labels_of(i), "split": split_of(i)}
            for i in numbers
        ]  # fmt: skip
        record, images = write_part(store, index, items)
        parts.append(Part(index=index, file=record, beside=(images,), rows_in=len(items)))
    classes = artifact.write_file(store, "classes.json", canonical(list(class_names)))
    return artifact.publish(
        store,
        Manifest(
            kind="corpus", project_version="0", config=dict(config or {}), parents={},
            rows_in=rows, rows_out=rows, rows_quarantined=0,
            files=(*part_files(parts), classes, write_quarantine(store, parts)),
            info={"num_classes": len(class_names)},
        ),
    )  # fmt: skip


def file_of(artifact_url: str | Path, name: str) -> Path:
    """The path of a file of a local artifact, whatever hash its name holds."""
    return Path(artifact_url) / artifact.load_manifest(artifact_url).record(name).name


def write_tiny_model(url: str | Path, seed: int = 0, **method: Any) -> Manifest:
    """An untrained model."""
    torch.manual_seed(seed)
    trunk = build_trunk(BackboneConfig.model_validate(BACKBONE))
    fields = {**METHOD, **method} if method.get("kind", "dseh") == "dseh" else {"num_bits": 16, **method}
    built = build_method(parse_method_config(fields), trunk, len(CLASSES))
    config = {"method": built.config.model_dump(mode="json"), "backbone": trunk.config.model_dump(mode="json")}
    return write_model(open_store(url), built, built.state_dict(), CLASSES, config, {}, [], {})


def write_trunk(path: Path) -> None:
    """Weights for a frozen trunk."""
    torch.manual_seed(1)
    torch.save(build_trunk(BackboneConfig.model_validate(BACKBONE)).net.state_dict(), path)


def head_config(weights: Path) -> dict[str, Any]:
    """A training of a head on the trunk with these weights."""
    return {
        "method": {"kind": "adalabelhash", "num_bits": 16, "label_loss": "hinge", "codeword_init": "spread"},
        "backbone": {**BACKBONE, "frozen": True, "weights": str(weights)},
        "optim": {"lr": 3e-3}, "epochs": 4, "batch_size": 8, "cpus_per_worker": 0.5,
    }  # fmt: skip


def write_toml(path: Path, config: Mapping[str, Any]) -> str:
    """Write a training config as the file that `hashray train` reads."""
    path.write_text(tomli_w.dumps(config))
    return str(path)


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Every file of a local artifact, by its key."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Ask until the answer is true; fail when the deadline has passed."""
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)
    return value


def command(*words: str) -> list[str]:
    """The command line of `hashray WORDS` with this Python."""
    return [sys.executable, "-m", "hashray", *words]


def kill_command_when(words: list[str], ready: Callable[[], Any], log: Path) -> None:
    """Run `hashray WORDS` with a Ray of its own, and kill -9 the driver and every process of its Ray once `ready`.

    Ray's node sometimes does not come up in time on a busy machine: then the command is started once more.
    """
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_USAGE_STATS_ENABLED": "0"}
    for attempt in range(2):
        with log.open("wb") as sink:
            process = subprocess.Popen(command(*words), stdout=sink, stderr=sink, env=environment)
            driver = psutil.Process(process.pid)
            try:
                wait_until(lambda p=process: ready() or p.poll() is not None, "the command to be half way")  # type: ignore[misc]
                if process.poll() is None:
                    return
            finally:
                kill_tree(driver)
                process.wait()
        failed_start = process.returncode != 0 and b"timed out" in log.read_bytes()
        assert attempt == 0 and failed_start, f"ended with {process.returncode} before it could be killed: {log}"


def kill_tree(root: psutil.Process) -> None:
    """Kill -9 a process, then all that it had started, and see them gone."""
    with_children = []
    try:
        with_children = root.children(recursive=True)
        root.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        pass
    for child in with_children:
        try:
            child.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(with_children, timeout=DEADLINE_S)


@contextmanager
def killing_worker_when(ready: Callable[[], Any], title: str) -> Iterator[list[int]]:
    """While the block runs, wait until `ready`, then kill -9 one of this process's Ray workers named `title`.

    Gives a list that holds the pid once it is killed.
    """
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not ready():
            over.wait(0.005)
        while not over.wait(0.005) and not killed:  # a short task's worker bears its name for a moment only
            for child in psutil.Process().children(recursive=True):
                try:
                    if not over.is_set() and not killed and title in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGKILL)
                        killed.append(child.pid)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
