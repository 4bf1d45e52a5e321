"""[Ray] Cached features of a frozen trunk: one pass over the corpus, kept as an artifact, trained on many times.

features/  parts/part-00000.parquet … (id, feature, labels, split) · classes.json · quarantine.parquet · manifest.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, read_table, sha256_hex
from hashray.data.columns import list_column
from hashray.data.corpus import ROW_FIELDS, Corpus, iterate_bytes, open_corpus
from hashray.data.images import Pixels, Resize, decode_rows
from hashray.engine.parts import BadRow, PartWorker, already_made, run_parts, write_quarantine
from hashray.engine.session import WorkersConfig, connect
from hashray.methods.backbone import (
    BackboneConfig,
    Trunk,
    build_trunk,
    state_fingerprint,
    with_absolute_weights,
)
from hashray.model import load_model
from hashray.storage import absolute, join, open_store

BATCH_ROWS = 64


def worker_device(gpu: bool) -> torch.device:
    """Prepare a worker process that runs a trunk; return where it does: a GPU, or one core."""
    if gpu:
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def map_part(
    table: pa.Table, size: int, resize: Resize, compute: Callable[[Pixels], NDArray[Any]], batch: int
) -> tuple[pa.Table, NDArray[Any], list[BadRow]]:
    """Decode the images of a part and compute on them, `batch` rows at a time, decoding one batch ahead.

    Returns:
        the rows that could be decoded, `compute`'s outputs for them [kept, …], and the rows that could not.
    """
    kept: list[int] = []
    outputs: list[NDArray[Any]] = []
    bad: list[BadRow] = []
    starts = range(0, len(table), batch)

    def read(start: int) -> tuple[Pixels, list[int], list[tuple[str, str]]]:
        return decode_rows(iterate_bytes(table.slice(start, batch)), size, resize)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, 0) if len(table) else None
        for start in starts:
            assert ahead is not None
            pixels, positions, faults = ahead.result()
            if start + batch < len(table):
                ahead = pool.submit(read, start + batch)
            kept += [start + position for position in positions]
            bad += [BadRow(id=row_id, reason=reason) for row_id, reason in faults]
            if len(pixels):
                outputs.append(compute(pixels))
    rows = table.take(pa.array(kept, pa.int64()))
    return rows, np.concatenate(outputs) if outputs else np.zeros((0, 0), np.float32), bad


class _FeatureWorker(PartWorker):
    runs_trunk = True

    def __init__(self, corpus: str, backbone: dict[str, Any], trunk_of_model: str | None, gpu: bool) -> None:
        self.corpus = open_corpus(corpus)
        self.device = worker_device(gpu)
        self.trunk = _load_trunk(BackboneConfig.model_validate(backbone), trunk_of_model).to(self.device)

    def process(self, unit: Mapping[str, Any]) -> tuple[pa.Table, list[BadRow], dict[str, Any], dict[str, Any]]:
        table = self.corpus.read_part(self.corpus.manifest.record(unit["part"]))
        config = self.trunk.config
        rows, features, bad = map_part(table, config.image_size, config.resize, self._features, BATCH_ROWS)
        column = list_column(features.reshape(len(rows), self.trunk.feature_dim))
        out = rows.select(["id", "labels", "split"]).append_column("feature", column)
        return out, bad, {"splits": dict(sorted(Counter(out.column("split").to_pylist()).items()))}, {}

    @torch.inference_mode()
    def _features(self, pixels: Pixels) -> Any:
        return self.trunk(torch.as_tensor(pixels, device=self.device)).cpu().numpy()


def features_of_model(
    model_url: str, corpus_url: str, workers: WorkersConfig, max_bad: float, out: str | None = None
) -> str | None:
    """Features of a corpus through the frozen trunk inside a model, computed or found; None if it was trained."""
    backbone = load_model(model_url, device="cpu").backbone
    if not backbone.frozen:
        return None
    return compute_features(corpus_url, backbone, out, workers, max_bad, trunk_of_model=model_url)


def lost_before(features: Corpus, corpus: Corpus, split: str) -> list[BadRow]:
    """Rows of the split that went to quarantine when the features were computed: no later stage has them either."""
    table = read_table(features.store, features.manifest.record(artifact.QUARANTINE))
    wanted = set(corpus.rows(split).ids) if len(table) else set()
    return [BadRow(**row) for row in table.to_pylist() if row["id"] in wanted]


def trunk_fingerprint(trunk: Trunk) -> str:
    """What cached features depend on: the trunk's weights and settings, wherever the weights came from."""
    return state_fingerprint(trunk.state_dict(), canonical(_settings(trunk)).decode())


def _settings(trunk: Trunk) -> dict[str, Any]:
    config = trunk.config  # what was made before features could be mirrored stays valid
    return config.model_dump(
        mode="json", exclude={"weights", "frozen_norms"} | (set() if config.mirrored else {"mirrored"})
    )


def _load_trunk(backbone: BackboneConfig, trunk_of_model: str | None) -> Trunk:
    trunk = build_trunk(backbone) if trunk_of_model is None else load_model(trunk_of_model, device="cpu").method.trunk
    return trunk.eval()


def compute_features(
    corpus_url: str,
    backbone: BackboneConfig,
    out: str | None,
    workers: WorkersConfig,
    max_bad: float,
    trunk_of_model: str | None = None,
) -> str:
    """Compute, or find, the features of a corpus through a frozen trunk; return their url. Rerun = resume.

    Unset, `out` is features/<trunk fingerprint> inside the corpus: every run with this trunk shares them.
    The trunk's weights are those that `backbone` names, or those inside a model.
    """
    corpus_url, backbone = absolute(corpus_url), with_absolute_weights(backbone)
    out, trunk_of_model = out and absolute(out), trunk_of_model and absolute(trunk_of_model)
    corpus = open_corpus(corpus_url)
    trunk = _load_trunk(backbone, trunk_of_model)
    fingerprint = trunk_fingerprint(trunk)
    url = out or join(corpus_url, "features", fingerprint[:16])
    store = open_store(url)
    plan = sha256_hex(f"features {corpus.manifest.id} {fingerprint}".encode())[:16]
    if already_made(store, "features", plan) is not None:
        return url
    connect()
    units = [{"index": i, "rows": r.rows, "part": r.name} for i, r in enumerate(corpus.parts)]
    arguments = {
        "corpus": corpus_url, "backbone": backbone.model_dump(mode="json"), "trunk_of_model": trunk_of_model,
        "gpu": workers.gpus_per_worker > 0,
    }  # fmt: skip
    parts = run_parts(store, plan, units, _FeatureWorker, arguments, workers, "features", max_bad)
    classes = artifact.write_file(store, "classes.json", canonical(corpus.classes))
    rows_in, bad = sum(part.rows_in for part in parts), sum(len(part.bad) for part in parts)
    columns = {"id": "string", "feature": f"float32[{trunk.feature_dim}]", **{n: str(t) for n, t in ROW_FIELDS}}
    artifact.publish(
        store,
        Manifest(
            kind="features", project_version=__version__, config=_settings(trunk),
            parents={"corpus": corpus.manifest.id},
            columns=columns, fingerprint=fingerprint, rows_in=rows_in, rows_out=rows_in - bad, rows_quarantined=bad,
            files=(*[part.file for part in parts], classes, write_quarantine(store, parts)),
            info={"plan": plan, "feature_dim": trunk.feature_dim},
        ),
    )  # fmt: skip
    store.clear("progress/")
    return url
