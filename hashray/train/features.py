"""[Ray] Cached features of a frozen trunk: one pass over the corpus, kept as an artifact, trained on many times.

features/  parts/part-00000.parquet … (id, feature, labels, split) · classes.json · quarantine.parquet · manifest.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, sha256_hex
from hashray.data.corpus import ROW_FIELDS, Corpus, open_corpus, read_table
from hashray.data.images import Pixels
from hashray.data.units import BadRow, UnitWorker, already_made, map_part, run_units, write_quarantine
from hashray.methods.backbone import (
    BackboneConfig,
    Trunk,
    build_trunk,
    state_fingerprint,
    with_absolute_weights,
)
from hashray.model import load_model
from hashray.runtime import WorkersConfig, connect
from hashray.storage import absolute, join, open_store
from hashray.train.config import TrainConfig

BATCH_ROWS = 64


def settle(gpu: bool) -> torch.device:
    """Prepare a worker process that runs a trunk; return where it does: a GPU, or one core."""
    if gpu:
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


class _FeatureWorker(UnitWorker):
    runs_trunk = True

    def __init__(self, corpus: str, backbone: dict[str, Any], trunk_of_model: str | None, gpu: bool) -> None:
        self.corpus = open_corpus(corpus)
        self.device = settle(gpu)
        self.trunk = _load_trunk(BackboneConfig.model_validate(backbone), trunk_of_model).to(self.device)

    def process(self, unit: Mapping[str, Any]) -> tuple[pa.Table, list[BadRow], dict[str, Any], dict[str, Any]]:
        table = self.corpus.read_part(self.corpus.manifest.record(unit["part"]))
        config = self.trunk.config
        rows, features, bad = map_part(table, config.image_size, config.resize, self._features, BATCH_ROWS)
        flat = pa.array(features.reshape(-1), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, self.trunk.feature_dim)
        out = rows.select(["id", "labels", "split"]).append_column("feature", column)
        return out, bad, {"splits": dict(sorted(Counter(out.column("split").to_pylist()).items()))}, {}

    @torch.inference_mode()
    def _features(self, pixels: Pixels) -> Any:
        return self.trunk(torch.as_tensor(pixels, device=self.device)).cpu().numpy()


def pool_of(config: TrainConfig) -> WorkersConfig:
    """The workers of a training's passes over the corpus: one a GPU, or one a core, whose torch has one thread."""
    return WorkersConfig(gpus_per_worker=float(config.gpu))


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
    parts = run_units(store, plan, units, _FeatureWorker, arguments, workers, "features", max_bad)
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
