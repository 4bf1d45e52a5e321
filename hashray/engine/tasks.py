"""[Ray] Independent calls of one function, as many at a time as the pool has workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, RayTaskError

from hashray.engine.reports import MAX_RETRIES, Advance, Meter, listening, start_reports
from hashray.engine.session import WorkersConfig, connect, require_room, unwrap
from hashray.errors import HashrayError
from hashray.storage import requests
from hashray.storage.requests import Requests

LOOK_S = 5.0


def run_tasks(
    function: Callable[..., Any],
    jobs: Mapping[int, tuple[Any, ...]],
    pool: WorkersConfig,
    short: bool,
    meter: Meter,
    shared: tuple[Any, ...] = (),
) -> Iterator[tuple[int, Any]]:
    """Call `function(*job, *shared, advance)` for every job; yield (key, result) as calls end.

    A call whose worker is lost runs again, which is said, at most `MAX_RETRIES` times; one whose node is lost, always.
    An error is final at once.

    Args:
        short: whether the work is small enough to run in this process where nothing asks for a cluster.
        meter: counts the rows that a call passes to `advance`. The caller counts what is finished.
        shared: arguments of every call, sent to each node once.

    Raises:
        HashrayError: what a call raised, as it raised it. InputError: no machine here can hold a worker.
        RunError: a call lost its worker too often.
    """
    if pool.runs_here(short):
        meter.bar.started()
        for number, job in jobs.items():
            yield number, function(*job, *shared, partial(meter.advance, number))
        return
    meter.bar.waiting("workers to start")
    connect()
    require_room(pool.cpus_per_worker, pool.gpus_per_worker)
    options = {"num_cpus": pool.cpus_per_worker, "num_gpus": pool.gpus_per_worker, "max_retries": 0}
    task, reports = ray.remote(_call).options(**options), start_reports()
    last = [ray.put(value) for value in shared]
    waiting = list(jobs)
    running, losses = dict[Any, int](), Counter[int]()
    with listening(reports, meter.hear, meter.bar.tick):
        while waiting or running:
            while waiting and len(running) < pool.most():  # more, once more nodes have come
                number = waiting.pop(0)
                running[task.remote(function, number, reports, *jobs[number], *last)] = number
            ended, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
            if not ended:
                continue
            number = running.pop(ready := ended[0])
            try:
                result, sent = ray.get(ready)
            except RayError as error:
                # The others run to their end, and the rerun finds what they wrote. Not ray.cancel: on 2.60, cancelling
                # a task at the moment it ends kills the driver ("Tried to complete task that was not pending").
                if isinstance(error, RayTaskError) or isinstance(unwrap(error), HashrayError):
                    raise unwrap(error) from error
                losses[number] += not isinstance(error, NodeDiedError)
                if losses[number] > MAX_RETRIES:
                    raise meter.lost(number) from error
                waiting.insert(0, number)
            else:
                requests.add(sent)
                yield number, result


def _call(function: Callable[..., Any], number: int, reports: Any, *arguments: Any) -> tuple[Any, Requests]:
    ray.get(reports.put.remote({"start": number}))  # arrives even where this process dies at once
    requests.take()  # by other work of this process
    result = function(*arguments, Advance(reports, number))
    return result, requests.take()
