"""The batcher: every item is answered once; a request that gives up leaves the others alone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hashray.search.batching import Batcher


def run(check):
    return asyncio.run(asyncio.wait_for(check(), 60))


@pytest.mark.parametrize("lanes", [1, 3])
def test_each_item_gets_its_own_answer(lanes):
    sizes, callers = [], set()

    def work(items):
        callers.add(threading.get_ident())
        return [item * 2 for item in items]

    async def check():
        batcher = Batcher("test", work, 8, sizes.append, lanes)
        answers = await asyncio.gather(*(batcher.put([n, n + 1]) for n in range(100)))
        assert answers == [[2 * n, 2 * n + 2] for n in range(100)]
        assert await batcher.put([]) == [] and await batcher.put([7]) == [14] and len(batcher) == 0

    run(check)
    assert sum(sizes) == 201 and max(sizes) == 8 and threading.get_ident() not in callers and len(callers) <= lanes


def test_what_comes_while_a_batch_is_at_work_goes_together():
    hold, begun, sizes = threading.Event(), threading.Event(), []

    def work(items):
        begun.set()
        assert hold.wait(60)
        return items

    async def check():
        batcher = Batcher("test", work, 100, sizes.append)
        first = asyncio.create_task(batcher.put([0]))
        await asyncio.to_thread(begun.wait)
        others = [asyncio.create_task(batcher.put([n])) for n in range(1, 10)]
        await asyncio.sleep(0)  # let them put their items
        others[3].cancel()
        await asyncio.sleep(0)
        hold.set()
        assert await first == [0]
        assert await asyncio.gather(*others[:3], *others[4:]) == [[n] for n in (1, 2, 3, 5, 6, 7, 8, 9)]

    run(check)
    assert sizes == [1, 8]  # the one that was cancelled was not worked on


def test_an_error_is_of_its_item_or_of_its_batch_and_the_next_batch_goes_on():
    def work(items):
        if "break" in items:
            raise RuntimeError("the whole batch")
        return [ValueError(item) if item == "bad" else item for item in items]

    async def check():
        batcher = Batcher("test", work, 1, lambda _: None)
        good, bad, broken, last = await asyncio.gather(
            *(batcher.put([word]) for word in ("good", "bad", "break", "last")), return_exceptions=True
        )
        assert good == ["good"] and last == ["last"]
        assert isinstance(bad, ValueError) and isinstance(broken, RuntimeError)

    run(check)


def test_a_lane_that_has_ended_is_free_for_the_next_item():
    async def check():
        batcher = Batcher("test", lambda items: items, 4, lambda _: None)
        for n in range(200):  # each put comes as the lane of the last one ends
            assert await batcher.put([n]) == [n]

    run(check)
