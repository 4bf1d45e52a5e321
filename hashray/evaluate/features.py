"""[Ray] The features that baselines are fitted on: the same rows, without what training learned."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashray.data.corpus import Corpus
from hashray.encode.features import TrunkRecipe, compute_features
from hashray.engine.session import WorkersConfig
from hashray.errors import InputError
from hashray.methods.backbone import BackboneConfig
from hashray.model import Model

PIXEL_SIZE = 32


class BaselineFeatures:
    """Features of any split: cached trunk features, or pixels. `name` says which.

    They are those of the model's frozen or pretrained trunk, or, for a trunk that was trained from scratch, the images'
    own pixels; a trained trunk's features would already hold the labels.
    """

    def __init__(
        self, model: Model, corpus: Corpus, frozen: Corpus | None, workers: WorkersConfig, max_bad: float
    ) -> None:
        backbone = BackboneConfig.model_validate(model.manifest.config["backbone"])
        self.cached, self.corpus = frozen, corpus
        if backbone.weights is None and frozen is None:
            self.name = f"pixels, {PIXEL_SIZE} x {PIXEL_SIZE} x 3"
            return
        if frozen is None:  # a trained trunk started from the weights file; a frozen one is in the model
            start = backbone.model_copy(update={"frozen": True})
            self.cached = compute_features(corpus, TrunkRecipe(start), None, workers, max_bad)
        origins = {"model": "trained with labels before", None: "random weights"}
        origin = origins.get(model.backbone.weights, "pretrained")
        mirrored = ", mirrored" if backbone.mirrored else ""
        self.name = f"{backbone.name}, {backbone.image_size} px{mirrored}, {origin}"

    def ids(self, split: str) -> set[str]:
        """The rows of a split that have features: fewer than the corpus's where some went to quarantine."""
        return set((self.cached or self.corpus).rows(split).ids)

    def of(self, split: str, ids: list[str]) -> NDArray[np.float32]:
        """Features float32 [n, d] of some rows of a split, in the order of `ids`."""
        source = self.cached or self.corpus
        wanted = {row_id: i for i, row_id in enumerate(ids)}
        out: NDArray[np.float32] | None = None
        for record in source.parts:
            if not source.count_part(record, split):
                continue
            table = source.read_part(record, split)
            part_ids = table.column("id").to_pylist()
            kept = [i for i, row_id in enumerate(part_ids) if row_id in wanted]
            table = table.take(pa.array(kept, pa.int64()))
            values = source.inputs(table, PIXEL_SIZE, "squash")
            flat = values.reshape(len(values), -1).astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
            if out is None:
                out = np.zeros((len(ids), flat.shape[1]), dtype=np.float32)
            out[[wanted[part_ids[i]] for i in kept]] = flat
        if out is None:
            raise InputError(f"{source.store.url} has no {split!r} rows")
        return out
