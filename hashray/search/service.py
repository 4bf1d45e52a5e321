"""Queries -> answers: decode, encode, search, describe, in batches that fill by themselves. No Ray."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.data.images import BadImage, decode
from hashray.errors import InputError
from hashray.model import Model
from hashray.search.batching import Batcher
from hashray.search.groups import Groups
from hashray.search.limits import Admission, LimitsConfig, Refused
from hashray.search.messages import Ask, Query
from hashray.search.metrics import Metrics
from hashray.search.nearest import Described, Row, Searchable
from hashray.search.pictures import Pictures
from hashray.search.served import Served

DECODE_THREADS = 2


@dataclass(frozen=True)
class Wanted:
    """A code to search with: uint8 [num_bits // 8], the open version, and what is wanted."""

    opened: Searchable
    code: Codes
    k: int
    where: str | None
    skip: int = 0  # rows that are not described


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of one query: ids, distances int32 [k], and how many shards are missing.

    `rows` says what they are, and what those of the other queries of their batch are.
    """

    ids: list[str]
    distances: NDArray[np.int32]
    rows: dict[str, Row]
    missing: int


class Service:
    """Everything behind the HTTP API, without HTTP.

    Args:
        indexes: "main", and "compare" where there is one.
        models: the model of each.
        pictures: the images of the rows, where a corpus was given.
        groups: the duplicates, where a report was given.
        partial: whether an answer may lack shards that do not answer; it says so. Unset: 503.
        lanes: batches that are searched at a time: more than one where the shards are in other processes.
    """

    def __init__(
        self,
        indexes: Mapping[str, Served],
        models: Mapping[str, Model],
        limits: LimitsConfig,
        metrics: Metrics,
        pictures: Pictures | None = None,
        groups: Groups | None = None,
        partial: bool = False,
        lanes: int = 1,
    ) -> None:
        self.indexes, self.models, self.limits, self.metrics = indexes, models, limits, metrics
        self.pictures, self.groups, self.partial = pictures, groups, partial
        self.admission, self.draining = Admission(limits), False
        self.decoders = ThreadPoolExecutor(DECODE_THREADS, "hashray-decode")
        self._encoders: dict[str, Batcher[NDArray[np.uint8], Codes]] = {
            name: Batcher(f"hashray-encode-{name}", self._encode_with(model), limits.together, lambda _: None)
            for name, model in models.items()
        }
        self._searcher: Batcher[Wanted, Neighbours] = Batcher(
            "hashray-search", self._search, limits.together, metrics.batch.observe, lanes
        )
        metrics.queued.set_function(lambda: self.admission.queries)
        metrics.ready.set_function(lambda: not self.draining)

    async def answer(self, queries: Sequence[Query], ask: Ask) -> list[dict[str, Any]]:
        """The answer to each query, as `SearchAnswer` without its request_id.

        Raises:
            InputError: a query or a parameter cannot be answered. Refused: too much is asked for, or too much is at
                work, or a shard does not answer.
        """
        start_s = perf_counter()
        self._check(ask, len(queries))
        with self.admission.work(len(queries)):
            served = self.indexes[ask.index]
            opened = await asyncio.to_thread(served.at, ask.version) if ask.version else served.at()
            codes = await self._codes(queries, opened, ask.index)
            depth = ask.offset + ask.k + 1  # one more, to say whether there are more
            wanted = [Wanted(opened, code, depth, ask.where, ask.offset) for code in codes]
            nearest = await self._searcher.put(wanted)
        if missing := max((one.missing for one in nearest), default=0):
            if not self.partial:
                raise Refused(503, f"{missing} shards of the index do not answer at the moment", 1)
            self.metrics.degraded.inc()
        took_ms = round((perf_counter() - start_s) * 1e3, 2)
        one = partial(_answer, ask=ask, opened=opened, took_ms=took_ms)
        if len(queries) == 1:
            return [one(queries[0], codes[0], nearest[0])]
        # In a thread: the rows of many answers would hold up the other requests.
        return await asyncio.to_thread(lambda: [*map(one, queries, codes, nearest)])

    def _check(self, ask: Ask, count: int) -> None:
        limits = self.limits
        if ask.index not in self.indexes:
            raise InputError("this service has no index to compare with: start it with --compare")
        for name, value, most in (
            ("k", ask.k, limits.k), ("offset + k", ask.offset + ask.k, limits.offset), ("queries", count, limits.batch),
        ):  # fmt: skip
            if value > most:
                raise InputError(f"{name} = {value:,}; at most {most:,} are taken")

    async def _codes(self, queries: Sequence[Query], opened: Searchable, name: str) -> list[Codes]:
        """The code of each query, uint8 [num_bits // 8]."""
        num_bytes = opened.facts.num_bits // 8
        images = [query.image for query in queries if query.image is not None]
        ids = [query.id for query in queries if query.id is not None]
        encoded = iter(await self._encode(images, name) if images else [])
        known = await asyncio.to_thread(opened.describe, ids, None) if ids else Described({})
        codes: list[Codes] = []
        for query in queries:
            if query.image is not None:
                codes.append(next(encoded))
            elif query.id is not None:
                if query.id not in known.rows:
                    raise _unknown(query.id, opened, known.missing)
                codes.append(known.rows[query.id].code)
            else:
                data = query.code or b""
                if len(data) != num_bytes:
                    raise InputError(
                        f"the code has {len(data) * 8} bits, the index {opened.facts.num_bits}: expected "
                        f"{num_bytes * 2} hexadecimal digits"
                    )
                codes.append(np.frombuffer(data, np.uint8))
        return codes

    async def _encode(self, images: Sequence[bytes], name: str) -> list[Codes]:
        model = self.models[name]

        def pixels(data: bytes) -> NDArray[np.uint8]:
            with self.metrics.stage("decode"):
                try:
                    return model.pixels(decode(data, self.limits.pixels))
                except BadImage as error:
                    raise InputError(f"the image cannot be used as a query: {error}") from error

        jobs = [self.decoders.submit(pixels, data) for data in images]
        try:
            decoded = await asyncio.gather(*map(asyncio.wrap_future, jobs))
        finally:  # where one fails the others must not go on: their request is answered, and no longer counted
            for job in jobs:
                job.cancel()
        return await self._encoders[name].put(decoded)

    def _encode_with(self, model: Model) -> Any:
        def encode(pixels: Sequence[NDArray[np.uint8]]) -> list[Codes]:
            with self.metrics.stage("encode"):
                return list(np.asarray(model.encode_pixels(pixels)))

        return encode

    def _search(self, batch: Sequence[Wanted]) -> list[Neighbours | BaseException]:
        """Search a batch: queries of one version, filter and order of k go together; a faulty filter fails alone."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, wanted in enumerate(batch):
            groups[id(wanted.opened), wanted.where, wanted.k.bit_length()].append(number)
        answers: list[Neighbours | BaseException] = [InputError("not searched")] * len(batch)
        for numbers in groups.values():
            some = [batch[number] for number in numbers]
            answers_of: Sequence[Neighbours | BaseException]
            try:
                answers_of = self._search_together(some)
            except Exception as error:
                answers_of = [error] * len(some)
            for number, one in zip(numbers, answers_of, strict=True):
                answers[number] = one
        return answers

    def _search_together(self, some: Sequence[Wanted]) -> list[Neighbours]:
        opened, codes = some[0].opened, np.stack([wanted.code for wanted in some])
        with self.metrics.stage("search"):
            nearest = opened.search(codes, max(wanted.k for wanted in some), some[0].where)
        lists = [[row_id for row_id in nearest.ids[i, : one.k] if row_id is not None] for i, one in enumerate(some)]
        with self.metrics.stage("describe"):  # the last row of a list says only that there are more
            shown = {row_id for one, ids in zip(some, lists, strict=True) for row_id in ids[one.skip : one.k - 1]}
            described = opened.describe(sorted(shown), codes) if shown else Described({})
        missing = max(nearest.missing, described.missing)
        return [
            Neighbours(ids, nearest.distances[i, : len(ids)], described.rows, missing) for i, ids in enumerate(lists)
        ]


def _unknown(row_id: str, opened: Searchable, missing: int) -> Refused:
    if missing:
        return Refused(503, f"{missing} shards of the index do not answer at the moment: the id may be in them", 1)
    return Refused(404, f"id {row_id[:200]!r} is not in version {opened.facts.version} of the index")


def _answer(
    query: Query, code: Codes, neighbours: Neighbours, ask: Ask, opened: Searchable, took_ms: float
) -> dict[str, Any]:
    facts = opened.facts
    ids, distances = neighbours.ids, neighbours.distances
    if ask.within is not None:
        ids = ids[: int(np.searchsorted(distances, ask.within, side="right"))]
    shown = slice(ask.offset, ask.offset + ask.k)
    hits = [
        {
            "id": row_id,
            "distance": int(distance),
            "code": neighbours.rows[row_id].code.tobytes().hex() if row_id in neighbours.rows else "",
            "attributes": neighbours.rows[row_id].attributes if row_id in neighbours.rows else {},
        }
        for row_id, distance in zip(ids[shown], distances[shown], strict=False)
    ]
    return {
        "version": facts.version,
        "index": ask.index,
        "num_bits": facts.num_bits,
        "rows": facts.rows,
        "query": {"id": query.id, "code": code.tobytes().hex()},
        "hits": hits,
        "more": len(ids) > ask.offset + ask.k,
        "degraded": neighbours.missing > 0,
        "missing_shards": neighbours.missing,
        "took_ms": took_ms,
    }
