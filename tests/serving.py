"""What the tests of the service share: a tiny index with its model, and the service behind a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import uvicorn
from tiny import CLASSES, png, write_corpus, write_tiny_model

import hashray
from hashray.data.corpus import open_corpus
from hashray.data.images import decode
from hashray.search.app import create_app
from hashray.search.local import listen, settings_of
from hashray.search.opening import ServeConfig, open_service
from hashray.search.service import Service

ROWS = 60


def write_all(folder: Path, rows: int = ROWS, shards: int = 3) -> dict[str, str]:
    """A corpus, a model, and an index of the corpus's codes in some shards, with attributes; their paths."""
    at = {name: str(folder / name) for name in ("corpus", "model", "index")}
    write_corpus(at["corpus"], rows, 25)
    write_tiny_model(at["model"])
    model, corpus = hashray.load_model(at["model"]), open_corpus(at["corpus"])
    catalog = hashray.create_index(at["index"], num_bits=model.num_bits, fingerprint=model.fingerprint)
    ids = sorted(corpus.rows("all").ids)
    for part in np.array_split(np.arange(rows), shards):
        names = [ids[i] for i in part]
        codes = model.encode([decode(png(int(name))) for name in names])
        kind = [CLASSES[int(name) % 3] for name in names]
        catalog.append(names, codes, pa.table({"class": kind, "number": [int(name) for name in names]}))
    return at


def config_of(at: dict[str, str], **more: Any) -> ServeConfig:
    """The config that serves what `write_all` wrote."""
    return ServeConfig(index=at["index"], model=at["model"], corpus=at["corpus"], port=0, **more)


@contextmanager
def behind_socket(config: ServeConfig, service: Service | None = None) -> Iterator[tuple[str, Service]]:
    """The service at a port of the loopback, in a thread of this process; its url, and itself."""
    service = service or open_service(config)
    listener = listen(config)
    listener.listen(128)
    server = uvicorn.Server(settings_of(create_app(service, config.hosts, config.hosts.token())))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
