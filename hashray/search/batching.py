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
    """Runs `work` on up to `most` items at a time, in a thread, in the order they came.

    Args:
        work: gets some items, returns an answer for each, or an exception in the place of one.
        most: items of a batch.
        seen: gets the size of each batch.
        lanes: batches at work at a time: more than one where `work` waits for other processes.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[Item]], Sequence[Answer | BaseException]],
        most: int,
        seen: Callable[[int], None],
        lanes: int = 1,
    ) -> None:
        self._work, self._most, self._seen, self._lanes = work, most, seen, lanes
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._threads = ThreadPoolExecutor(lanes, name)
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly
        self._running = 0

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
        if self._running < self._lanes:
            self._running += 1
            task = loop.create_task(self._run(loop))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return list(await asyncio.gather(*futures))

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._waiting:
                if batch := self._take():
                    self._seen(len(batch))
                    await self._answer(loop, batch)
        finally:  # at once, not in a callback: what comes next must see that this lane is free
            self._running -= 1

    def _take(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._most:
            pair = self._waiting.popleft()
            if not pair[1].done():  # done: its request was cancelled
                batch.append(pair)
        return batch

    async def _answer(
        self, loop: asyncio.AbstractEventLoop, batch: Sequence[tuple[Item, asyncio.Future[Answer]]]
    ) -> None:
        try:
            answers = await loop.run_in_executor(self._threads, self._work, [item for item, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
