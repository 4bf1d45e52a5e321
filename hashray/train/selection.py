"""The training rows of a corpus, and their labels as far as they are known. No Ray.

pseudo-labels/  parts/part-00000-<plan>.parquet … (id, labels int8 [c], confidence, hidden)
                accepted.parquet (accepted, labels) · quarantine.parquet · manifest.json
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashray import artifact
from hashray.data.columns import in_split, list_matrix
from hashray.data.corpus import Corpus
from hashray.storage import open_store

ACCEPTED = "accepted.parquet"


def read_pseudo_labels(url: str) -> dict[str, NDArray[np.int8]]:
    """Labels int8 [c] in {0, 1, -1} of the accepted rows of a pseudo-label artifact, by id."""
    return _read_pseudo_labels(url, artifact.load_manifest(url, "pseudo-labels").id)


@lru_cache(maxsize=2)
def _read_pseudo_labels(url: str, manifest_id: str) -> dict[str, NDArray[np.int8]]:
    store = open_store(url)
    manifest = artifact.load_manifest(store, "pseudo-labels")
    table = artifact.read_table(store, manifest.record(ACCEPTED))
    return dict(zip(table.column("accepted").to_pylist(), list_matrix(table.column("labels")), strict=True))


@dataclass(frozen=True)
class Selection:
    """The training rows: the train split without `left_out`, and rows added from the unlabelled split.

    Attributes:
        left_out: ids of train rows held out for validation.
        pseudo_labels: a pseudo-label artifact, whose accepted rows are trained on with its labels.
        unlabelled: the other rows of the unlabelled split are trained on too, with every label unknown (-1),
            whatever labels the corpus may hold for them.
    """

    left_out: frozenset[str]
    pseudo_labels: str | None = None
    unlabelled: bool = False

    def take(self, table: pa.Table) -> pa.Table:
        """The training rows of a part that has at least the columns id and split."""
        splits, ids = table.column("split"), table.column("id").to_pylist()
        wanted = in_split(splits, "train")
        if self.unlabelled or self._pseudo:
            known = np.array([self.unlabelled or i in self._pseudo for i in ids], dtype=bool)
            wanted |= in_split(splits, "unlabelled") & known
        return table.filter(pa.array(wanted & np.array([i not in self.left_out for i in ids], dtype=bool)))

    def labels(self, corpus: Corpus, table: pa.Table) -> NDArray[np.int8]:
        """Labels int8 [n, c] in {0, 1, -1} of rows that `take` returned."""
        labels = corpus.label_matrix(table).astype(np.int8)
        hidden = in_split(table.column("split"), "unlabelled") & ~in_split(table.column("split"), "train")
        labels[hidden] = -1
        ids = table.column("id").to_pylist()
        for i in np.flatnonzero(hidden):
            if ids[i] in self._pseudo:
                labels[i] = self._pseudo[ids[i]]
        return labels

    @cached_property
    def _pseudo(self) -> dict[str, NDArray[np.int8]]:
        return read_pseudo_labels(self.pseudo_labels) if self.pseudo_labels else {}

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("left_out", "pseudo_labels", "unlabelled")}
