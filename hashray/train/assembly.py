"""One worker's side of a training job: the method, its rows, its validation, put together as a loop. No Ray."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hashray.codes import binarize
from hashray.data.corpus import Corpus, open_corpus
from hashray.methods import build_method
from hashray.methods.backbone import build_trunk
from hashray.methods.base import Method
from hashray.metrics import mean_average_precision
from hashray.model import load_model
from hashray.train.batches import MemorySlices, SliceSource, held_out
from hashray.train.config import TrainConfig
from hashray.train.group import Report
from hashray.train.job import PSEUDO_SPLITS, TrainJob
from hashray.train.loop import Loop
from hashray.train.selection import Selection

VALIDATION_DATABASE = 5000
ENCODE_ROWS = 256
RANDOM_DRAWS = 5
LEAST_GAIN = 0.02  # share of the way from random codes to a perfect ranking that counts as having learned


def build_loop(
    job: TrainJob, rank: int, world: int, device: torch.device, report: Report,
    stream: Callable[[Corpus], SliceSource] | None = None,
) -> Loop:  # fmt: skip
    """Put together one worker's loop, with its rows in memory or from `stream`."""
    config = job.config
    torch.manual_seed(config.seed)  # the same initial weights on every worker
    trunk = build_trunk(config.backbone)
    method = build_method(config.method, trunk, job.num_classes)
    if config.init is not None:
        method.load_state_dict(load_model(config.init, device="cpu").method.state_dict())
    method = method.to(device)
    if device.type == "cuda" and world > 1:
        # The trunk alone: the first worker trains LabNet, and its norms would wait for the others without end.
        method.trunk = torch.nn.SyncBatchNorm.convert_sync_batchnorm(method.trunk)
    data = open_corpus(job.source, None)
    source: SliceSource
    if stream is None:
        source = MemorySlices(job.plan, *training_rows(data, job.selection, config), config.augment, rank, world)
    else:
        source = stream(data)
    validation = _Validation(data, job) if job.validation or job.validation_given else None
    if validation is not None and rank == 0:
        validation.load()
    loop = Loop(method, config, job.table, source, report, validation, device)
    if validation is not None and rank == 0:
        loop.position.notes["random_map"] = validation.of_random_codes()
    return loop


class _Validation:
    """mAP of the held-out (or given) validation rows against a draw of the other train rows.

    With `select_by` harmonic: the harmonic mean of that and of the mAP within the pseudo-unseen classes.
    """

    def __init__(self, data: Corpus, job: TrainJob) -> None:
        self.data, self.config = data, job.config
        self.given, self.held = job.validation_given, set(job.validation)

    def load(self) -> None:
        """Read both sides; on the worker that validates. Parts without such rows are not read."""
        every, count = None, VALIDATION_DATABASE + len(self.held)
        query = self._rows("validation", every) if self.given else self._rows("train", self.held)
        # Drawn, not the first: rows of a Parquet or tar source may stand class by class. By the same order as the
        # validation rows, which come first in it.
        ids = (row_id for table in self.data.row_tables("train") for row_id in table.column("id").to_pylist())
        self.sides = [(query, self._rows("train", held_out(ids, count, self.config.seed) - self.held))]
        if self.config.select_by == "harmonic":
            queries, database = (self._rows(name, every) for name in PSEUDO_SPLITS)
            self.sides.append((queries, database))

    def _rows(self, split: str, chosen: set[str] | None) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        return load_rows(self.data, chosen, self.config, split)

    def __call__(self, method: Method) -> float:
        return self._score(lambda inputs: _codes(method, inputs))

    def of_random_codes(self) -> list[float]:
        """The scores of five draws of random codes: what a model that has learned nothing would get."""
        width, rng = self.config.method.num_bits // 8, np.random.default_rng(self.config.seed)
        draw = lambda inputs: rng.integers(0, 256, (len(inputs), width), dtype=np.uint8)  # noqa: E731
        return [self._score(draw) for _ in range(RANDOM_DRAWS)]

    def _score(self, codes: Callable[[NDArray[Any]], NDArray[np.uint8]]) -> float:
        scores = [
            mean_average_precision(codes(query), query_labels, codes(database), database_labels)
            for (query, query_labels), (database, database_labels) in self.sides
        ]
        return statistics.harmonic_mean(scores)


def has_learned(score: float, of_random: Sequence[float]) -> bool:
    """Whether a validation score is clearly above those of random codes.

    That is by more than three standard deviations between draws, and by 2 % of the way to 1: the codes of an untrained
    network are not independent, so their score is a little above that of random codes.

    >>> has_learned(0.105, [0.1003, 0.1005, 0.1001]), has_learned(0.3, [0.1003, 0.1005, 0.1001])
    (False, True)
    """
    chance = statistics.mean(of_random)
    return score > chance + max(3 * statistics.stdev(of_random), LEAST_GAIN * (1 - chance))


def training_rows(
    data: Corpus, selection: Selection, config: TrainConfig
) -> tuple[NDArray[Any], NDArray[np.int8], list[str]]:
    """(inputs, labels, ids) of the training rows, in corpus order."""
    pieces = []
    for record in data.parts:
        table = selection.take(data.read_part(record))
        if len(table):
            inputs = data.inputs(table, config.backbone.image_size, config.backbone.framing)
            pieces.append((inputs, selection.labels(data, table), table.column("id").to_pylist()))
    ids = [row_id for _, _, part_ids in pieces for row_id in part_ids]
    return np.concatenate([inputs for inputs, _, _ in pieces]), np.concatenate([labels for _, labels, _ in pieces]), ids


def load_rows(
    data: Corpus, chosen: set[str] | None, config: TrainConfig, split: str
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """(inputs, labels) of the rows of a split that are `chosen`, all if None, in corpus order."""
    inputs: list[NDArray[Any]] = []
    labels: list[NDArray[np.uint8]] = []
    whole = (data.read_part(record, split) for record in data.parts if data.count_part(record, split))
    for table in whole if chosen is None else data.chosen(split, chosen):
        inputs.append(data.inputs(table, config.backbone.image_size, config.backbone.framing))
        labels.append(data.label_matrix(table))
    return np.concatenate(inputs), np.concatenate(labels)


def _codes(method: Method, inputs: NDArray[Any]) -> NDArray[np.uint8]:
    device = method.trunk.mean.device
    chunks = [
        binarize(method.encode(torch.as_tensor(inputs[i : i + ENCODE_ROWS], device=device)))
        for i in range(0, len(inputs), ENCODE_ROWS)
    ]
    return np.concatenate(chunks)
