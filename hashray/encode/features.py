"""[Ray] Cached features of a frozen trunk: one scan of the corpus, kept as an artifact, trained on many times.

features/  rows/part-00000-<plan>.parquet … (id, labels, split) · features/part-00000-<plan>.parquet … (feature)
           classes.json · quarantine.parquet · manifest.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, read_table, sha256_hex
from hashray.data.columns import list_column
from hashray.data.corpus import ROW_SCHEMA, Corpus, iterate_bytes, open_corpus
from hashray.data.images import Pixels, Resize, decode_rows
from hashray.engine.parts import BadRow, Output, PartWorker, part_files, run_parts, write_quarantine
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import run_stage
from hashray.methods.backbone import (
    BackboneConfig,
    Trunk,
    build_trunk,
    state_fingerprint,
    with_absolute_weights,
    without_place,
)
from hashray.model import Model, load_model
from hashray.storage import absolute, join, open_store

BATCH_ROWS = 64
SHORT_PIXELS = 100_000_000  # a minute or two of MobileNetV2 on two cores, less than Ray's start for smaller trunks
# Decoding in such pixels (0.4 us): the smallest PNG took 80 us, a photograph of 2.2 MB 50 ms.
DECODE_PIXELS, BYTES_PER_PIXEL = 200, 20


class TrunkWorker(PartWorker):
    """A worker that runs a trunk on a GPU or on one CPU core."""

    runs_trunk = True

    def __init__(self, gpu: bool) -> None:
        self.device = torch.device("cuda" if gpu else "cpu")
        self.threads = torch.get_num_threads()
        if not gpu:
            torch.set_num_threads(1)

    def close(self) -> None:
        torch.set_num_threads(self.threads)


def is_short(source: Corpus, split: str, image_size: int) -> bool:
    """Whether a scan of a split is over before a Ray cluster has paid for its start."""
    rows = source.count(split)
    if source.manifest.kind == "features":
        return rows <= SHORT_PIXELS
    held = sum(
        source.input_bytes(each) * source.count_part(each, split) / max(1, each.rows or 0) for each in source.parts
    )
    return pixels_of(rows, image_size, held) <= SHORT_PIXELS


def pixels_of(rows: int, image_size: int, size_bytes: float) -> float:
    """The work of a scan of images in pixels of a trunk's input: decoding takes as long as some pixels more."""
    return rows * (image_size**2 + DECODE_PIXELS) + size_bytes / BYTES_PER_PIXEL


def map_part(
    table: pa.Table,
    size: int,
    resize: Resize,
    compute: Callable[[Pixels], NDArray[Any]],
    batch: int,
    advance: Callable[[int], None],
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
            advance(min(batch, len(table) - start))
    rows = table.take(pa.array(kept, pa.int64()))
    return rows, np.concatenate(outputs) if outputs else np.zeros((0, 0), np.float32), bad


@dataclass(frozen=True)
class TrunkRecipe:
    """Where each worker gets a trunk: from the weights that the config names, or from inside a model."""

    backbone: BackboneConfig
    model_url: str | None = None

    def load(self) -> Trunk:
        """The trunk in evaluation mode, on the CPU."""
        if self.model_url is None:
            return build_trunk(self.backbone).eval()
        return load_model(self.model_url, device="cpu").method.trunk.eval()


class _FeatureWorker(TrunkWorker):
    def __init__(self, corpus: str, recipe: TrunkRecipe, gpu: bool) -> None:
        super().__init__(gpu)
        self.corpus = open_corpus(corpus)
        self.trunk = recipe.load().to(self.device)

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        table = self.corpus.read_part(self.corpus.manifest.record(unit["part"]))
        config = self.trunk.config
        rows, features, bad = map_part(table, config.image_size, config.framing, self._features, BATCH_ROWS, advance)
        column = list_column(features.reshape(len(rows), self.trunk.feature_dim))
        info = {"splits": dict(sorted(Counter(rows.column("split").to_pylist()).items()))}
        return Output(rows.select(ROW_SCHEMA.names), bad, info, beside={"features": pa.table({"feature": column})})

    @torch.inference_mode()
    def _features(self, pixels: Pixels) -> Any:
        return self.trunk(torch.as_tensor(pixels, device=self.device)).cpu().numpy()


def features_of_model(
    model: Model, corpus: Corpus, workers: WorkersConfig, max_bad: float, out: str | None = None
) -> Corpus | None:
    """Features of a corpus through the frozen trunk inside a model; None if the model trained its trunk."""
    if not model.backbone.frozen:
        return None
    recipe = TrunkRecipe(model.backbone, model.url)
    return compute_features(corpus, recipe, out, workers, max_bad, model.method.trunk)


def lost_before(features: Corpus, corpus: Corpus, split: str) -> list[BadRow]:
    """Rows of the split that went to quarantine when the features were computed: no later stage has them either."""
    table = read_table(features.store, features.manifest.record(artifact.QUARANTINE))
    wanted = set(corpus.rows(split).ids) if len(table) else set()
    return [BadRow(**row) for row in table.to_pylist() if row["id"] in wanted]


def trunk_fingerprint(trunk: Trunk) -> str:
    """What cached features depend on: the trunk's weights and settings, wherever the weights came from."""
    return state_fingerprint(trunk.state_dict(), canonical(_settings(trunk)).decode())


def _settings(trunk: Trunk) -> dict[str, Any]:
    config = without_place(trunk.config)  # features made before `mirrored` existed stay valid
    settings = config.model_dump(
        mode="json", exclude={"weights", "frozen_norms"} | (set() if config.mirrored else {"mirrored"})
    )
    return settings if trunk.code is None else {**settings, "code": sha256_hex(trunk.code)}


def compute_features(
    corpus: Corpus,
    recipe: TrunkRecipe,
    out: str | None,
    workers: WorkersConfig,
    max_bad: float,
    trunk: Trunk | None = None,
) -> Corpus:
    """Compute or open the features of a corpus through a frozen trunk. Rerun = resume.

    Args:
        out: unset: features/<trunk fingerprint> inside the corpus, shared by every run with this trunk.
        trunk: the recipe's trunk, where it is loaded already.
    """
    recipe = TrunkRecipe(with_absolute_weights(recipe.backbone), recipe.model_url)
    trunk = trunk or recipe.load()
    fingerprint = trunk_fingerprint(trunk)
    store = open_store(absolute(out) if out else join(corpus.store.url, "features", fingerprint[:16]))
    plan = sha256_hex(f"features {corpus.manifest.id} {fingerprint}".encode())[:16]

    def work() -> Manifest:
        units = [{"index": i, "rows": r.rows, "part": r.name} for i, r in enumerate(corpus.parts)]
        arguments = {"corpus": corpus.store.url, "recipe": recipe, "gpu": workers.gpus_per_worker > 0}
        short = is_short(corpus, "all", trunk.config.image_size)
        parts = run_parts(store, plan, units, _FeatureWorker, arguments, workers, "features", max_bad, short)
        classes = artifact.write_named(store, "classes.json", canonical(corpus.classes))
        rows_in, bad = sum(part.rows_in for part in parts), sum(len(part.bad) for part in parts)
        columns = {f.name: str(f.type) for f in ROW_SCHEMA} | {"feature": f"float32[{trunk.feature_dim}]"}
        manifest = artifact.publish(
            store,
            Manifest(
                kind="features", project_version=__version__, config=_settings(trunk),
                parents={"corpus": corpus.manifest.id},
                columns=columns, fingerprint=fingerprint, rows_in=rows_in, rows_out=rows_in - bad,
                rows_quarantined=bad, files=(*part_files(parts), classes, write_quarantine(store, parts)),
                info={"plan": plan, "feature_dim": trunk.feature_dim},
            ),
        )  # fmt: skip
        store.clear("progress/")
        return manifest

    return Corpus(store, run_stage(store, "features", plan, work))
