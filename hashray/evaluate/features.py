"""[Ray] The features that baselines are fitted on: the same rows, without what training learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.artifact import FileRecord
from hashray.data.corpus import Corpus
from hashray.encode.features import TrunkRecipe, compute_features
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.tasks import run_tasks
from hashray.errors import InputError
from hashray.evaluate.sides import Side, opened
from hashray.methods.backbone import BackboneConfig
from hashray.model import Model
from hashray.progress import Bar

PIXEL_SIZE = 32
FEATURE_BYTES = 512 << 20  # of the rows that baselines are fitted on, and again of those that they encode
SHORT_ROWS = 200_000  # read, and at most decoded at 32 pixels, in about the time that Ray takes to start

Floats = NDArray[np.float32]
Piece = tuple[list[str], Floats, NDArray[np.uint8]]


class BaselineFeatures:
    """Features of any split: cached trunk features, or pixels. `name` says which.

    They are those of the model's frozen or pretrained trunk, or, for a trunk that was trained from scratch, the images'
    own pixels; a trained trunk's features would already hold the labels.
    """

    def __init__(
        self, model: Model, corpus: Corpus, frozen: Corpus | None, workers: WorkersConfig, max_bad: float
    ) -> None:
        backbone = BackboneConfig.model_validate(model.manifest.config["backbone"])
        self.source, self.workers = frozen or corpus, workers
        if backbone.weights is None and frozen is None:
            self.dimensions = 3 * PIXEL_SIZE**2
            self.name = f"pixels, {PIXEL_SIZE} x {PIXEL_SIZE} x 3"
            return
        if frozen is None:  # a trained trunk started from the weights file; a frozen one is in the model
            start = backbone.model_copy(update={"frozen": True})
            self.source = compute_features(corpus, TrunkRecipe(start), None, workers, max_bad)
        self.dimensions = int(self.source.manifest.info["feature_dim"])
        origins = {"model": "trained with labels before", None: "random weights"}
        origin = origins.get(model.backbone.weights, "pretrained")
        mirrored = ", mirrored" if backbone.mirrored else ""
        self.name = f"{backbone.name}, {backbone.image_size} px{mirrored}, {origin}"

    @property
    def most_rows(self) -> int:
        """Rows whose features are held at once."""
        return max(1, FEATURE_BYTES // (4 * self.dimensions))

    def train(self, most: int, seed: int) -> tuple[Floats, NDArray[np.uint8]]:
        """Features float32 [n, d] and multi-hot labels uint8 [n, c] of at most `most` train rows, in corpus order."""
        parts = [record for record in self.source.parts if self.source.count_part(record, "train")]
        starts = np.cumsum([0, *(self.source.count_part(record, "train") for record in parts)])
        if not starts[-1]:
            raise InputError(f"{self.source.store.url} has no train rows to fit the baselines on; give --no-baselines")
        chosen = np.arange(starts[-1])
        if len(chosen) > most:
            chosen = np.sort(np.random.default_rng(seed).choice(starts[-1], most, replace=False, shuffle=False))
        ends = np.searchsorted(chosen, starts)
        jobs = {i: (record, None, chosen[ends[i] : ends[i + 1]] - starts[i]) for i, record in enumerate(parts)}
        pieces = dict(self._read("train", {i: job for i, job in jobs.items() if len(job[2])}))
        return tuple(np.concatenate([pieces[i][column] for i in sorted(pieces)]) for column in (1, 2))  # type: ignore[return-value]

    def of(self, split: str, side: Side) -> Floats:
        """Features float32 [n, d] of some rows of a split, in the order of `side`; only their parts are read."""
        parts = self.source.parts
        ids: dict[int, list[str]] = {}
        for row_id, part in zip(side.ids, side.parts.tolist(), strict=True):
            ids.setdefault(part, []).append(row_id)
        place = {row_id: i for i, row_id in enumerate(side.ids)}
        out: Floats | None = None
        for _, (names, features, _) in self._read(split, {i: (parts[i], ids[i], None) for i in sorted(ids)}):
            if out is None:
                out = np.zeros((len(place), features.shape[1]), dtype=np.float32)
            out[[place[row_id] for row_id in names]] = features
        if out is None:
            raise InputError(f"{self.source.store.url} has no {split!r} rows")
        return out

    def _read(self, split: str, jobs: Mapping[int, tuple[Any, ...]]) -> Iterator[tuple[int, Piece]]:
        counts = {number: self.source.count_part(job[0], split) for number, job in jobs.items()}
        rows = sum(counts.values())
        shared = (self.source.store.url, self.source.manifest.id, split)
        with Bar(f"features of {split} rows", rows, "rows") as bar:
            meter = Meter(bar, "part")
            for number, piece in run_tasks(_read_part, jobs, self.workers, rows <= SHORT_ROWS, meter, shared):
                yield number, piece
                meter.finish(number, counts[number])


def _read_part(
    record: FileRecord, ids: Sequence[str] | None, places: NDArray[np.int64] | None, url: str, manifest_id: str,
    split: str, advance: Callable[[int], None],
) -> Piece:  # fmt: skip
    """Ids, features and multi-hot labels of a part's rows with these ids, or at these places in the split."""
    source = opened(url, manifest_id)
    table = source.read_part(record, split)
    if ids is not None:
        places = np.flatnonzero(pc.is_in(table.column("id"), pa.array(ids, table.schema.field("id").type)).to_numpy())
    table = table.take(pa.array(places))
    values = source.inputs(table, PIXEL_SIZE, "squash")
    flat: Floats = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float32)
    if values.dtype == np.uint8:
        flat /= 255
    return table.column("id").to_pylist(), flat, source.label_matrix(table)
