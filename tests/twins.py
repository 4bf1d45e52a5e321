"""Two processes that run one stage at the same moment, and what has to be true afterwards (law 4)."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import BrokenBarrierError
from typing import Any

from tiny import DEADLINE_S

from hashray import artifact
from hashray.artifact import Manifest
from hashray.errors import AlreadyExists
from hashray.storage import open_store

REFUSED = "of another input or configuration. Nothing was changed there. Choose another --out"
_barrier: Any = None


@dataclass(frozen=True)
class End:
    """How a run ended: with the id of a manifest (or what metrics.json holds), or refused with a text."""

    result: str | None
    refused: str | None = None


# A stage as a function of `which` of two configurations, and of --out.
Stage = Callable[[int, str], Any]


def _join(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _run(stage: Stage, which: int, out: str) -> End:
    try:
        _barrier.wait(DEADLINE_S)
    except BrokenBarrierError:
        raise RuntimeError("the other process has not come") from None
    try:
        result = stage(which, out)
    except AlreadyExists as error:
        return End(None, str(error))
    return End(_identity(result))


def _identity(result: Any) -> str:
    return result.id if isinstance(result, Manifest) else json.dumps(result, sort_keys=True)


class Twins:
    """Two processes that live through many pairs, so that their imports are paid once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def race(self, stage: Stage, different: bool, out: str) -> None:
        """Run a pair into `out`; check that one whole artifact is there, and that each run says the right thing."""
        runs: list[Future[End]] = [self.pool.submit(_run, stage, which, out) for which in (0, int(different))]
        ends = [run.result() for run in runs]
        manifest, lost = artifact.load_manifest(out), [end.refused for end in ends if end.refused is not None]
        assert artifact.verify(out) == []
        assert len(lost) == different, ends
        published = {manifest.id}
        if manifest.kind == "evaluation":
            store = open_store(out)
            metrics = artifact.read_file(store, manifest.record("metrics.json"))
            assert store.read("metrics.json") == metrics
            published = {_identity(json.loads(metrics))}
        assert {end.result for end in ends if end.refused is None} == published, ends
        for text in lost:
            assert REFUSED in text, text

    def race_pairs(self, stage: Stage, different: bool, folder: Any, pairs: int) -> None:
        """Run as many pairs, each into a folder of its own."""
        for pair in range(pairs):
            self.race(stage, different, str(folder / str(pair)))


@contextmanager
def twins() -> Iterator[Twins]:
    """Start the two processes; end them with the block."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, _join, (context.Barrier(2),)) as pool:
        yield Twins(pool)
