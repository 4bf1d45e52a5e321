"""Queries that come at the same time are worked on together, without waiting for one another. No Ray.

Ray Serve's own `serve.batch` waits a set time for a batch to fill, and needs Ray. Here a batch is what has come while
the last one was at work: alone, a query waits for nothing; under load, batches fill by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Runs `work` on up to `most` items at a time, in a thread of its own, in the order they came.

    Args:
        work: gets some items, returns an answer for each, or an exception in the place of one.
        most: items of a batch.
        seen: gets the size of each batch.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[Item]], Sequence[Answer | BaseException]],
        most: int,
        seen: Callable[[int], None],
    ) -> None:
        self._work, self.most, self._seen = work, most, seen
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._thread = ThreadPoolExecutor(1, name)
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    async def put(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to some items. Items of a cancelled call that still wait are dropped.

        Raises:
            What `work` raised or returned for one of them.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._task is None:
            self._task = loop.create_task(self._run(loop))
        return list(await asyncio.gather(*futures))

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._waiting:
                batch = self._take()
                if batch:
                    self._seen(len(batch))
                    await self._answer(loop, batch)
        finally:
            self._task = None

    def _take(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self.most:
            pair = self._waiting.popleft()
            if not pair[1].done():  # done: its request was cancelled
                batch.append(pair)
        return batch

    async def _answer(
        self, loop: asyncio.AbstractEventLoop, batch: Sequence[tuple[Item, asyncio.Future[Answer]]]
    ) -> None:
        try:
            answers = await loop.run_in_executor(self._thread, self._work, [item for item, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
