"""[Ray] Independent calls of one function, as many at a time as the pool has workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from hashray.engine.session import WorkersConfig, connect, require_room, unwrap


def run_tasks(
    function: Callable[..., Any],
    jobs: Mapping[int, tuple[Any, ...]],
    pool: WorkersConfig,
    short: bool,
    shared: tuple[Any, ...] = (),
) -> Iterator[tuple[int, Any]]:
    """Call `function(*job, *shared)` for every job; yield (key, result) as calls end.

    Args:
        short: whether the work is small enough to run in this process where nothing asks for a cluster.
        shared: last arguments of every call, sent to each node once.

    Raises:
        HashrayError: what a call raised, as it raised it. InputError: no machine here can hold a worker.
    """
    if pool.runs_here(short):
        for number, job in jobs.items():
            yield number, function(*job, *shared)
        return
    connect()
    require_room(pool.cpus_per_worker, pool.gpus_per_worker)
    task = ray.remote(function).options(num_cpus=pool.cpus_per_worker, num_gpus=pool.gpus_per_worker)
    last = [ray.put(value) for value in shared]
    waiting, limit = list(jobs), pool.most()
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                number = waiting.pop(0)
                running[task.remote(*jobs[number], *last)] = number
            (ready,), _ = ray.wait(list(running), num_returns=1)
            result = ray.get(ready)
            yield running.pop(ready), result
    except ray.exceptions.RayError as error:
        # The others run to their end, and the rerun finds what they wrote. Not ray.cancel: on 2.60, cancelling a
        # task at the moment it ends kills the driver ("Tried to complete task that was not pending").
        raise unwrap(error) from error
