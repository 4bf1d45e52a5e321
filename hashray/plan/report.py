"""What a plan says: tables for people, JSON for programs, and what the cluster cannot hold. No Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hashray.plan.costs import DAY_S, GB, HOUR_S, Costs, Prices, Role, Sample, Work
from hashray.progress import say, show_table

MOST_DAYS = 1.0  # of a whole run, before more workers are proposed
WHAT_TO_DO = {
    "driver": "raise --rows-per-part and --part-bytes of ingest, for fewer parts",
    "ingest worker": "lower --part-bytes or --rows-per-part of ingest, or --workers",
    "encode worker": "lower --part-bytes of ingest, or --workers, or take a smaller trunk or image_size",
    "training worker": 'stream the rows (input = "stream"); a frozen trunk needs nodes with more memory',
    "stream task": "lower shuffle_window, or take nodes with more memory for each core",
    "index task": "raise --shards, or lower --workers of index build",
    "searcher": "take fewer bits, or nodes with more memory; a mapped index also searches from disk, slowly",
    "evaluation driver": "evaluate fewer queries (--query-per-class), or lower the sample of baselines",
}


@dataclass(frozen=True)
class Cluster:
    """What there is: nodes, memory and object store of the smallest in bytes, all CPUs and GPUs, free disk at --out."""

    nodes: int
    memory_bytes: int
    object_store_bytes: int
    cpus: float
    gpus: float
    free_disk_bytes: int | None

    def workers(self, cpus: float, gpus: float) -> int:
        """How many workers with these CPUs and GPUs fit, at least 1.

        >>> Cluster(1, 0, 0, cpus=8, gpus=0, free_disk_bytes=None).workers(2, 0)
        4
        """
        fits = [int(have / each) for have, each in ((self.cpus, cpus), (self.gpus, gpus)) if each]
        return max(1, min(fits, default=1))


@dataclass(frozen=True)
class Excess:
    """One thing that the cluster does not have enough of."""

    what: str
    needs: float
    has: float
    unit: str
    do: str


def exceeded(costs: Costs, work: Work, cluster: Cluster) -> list[Excess]:
    """What will be exceeded on this cluster, each with what to do."""
    faults = []
    room = cluster.memory_bytes - cluster.object_store_bytes
    for role in costs.roles:
        on_one_node = role.bytes * math.ceil(role.at_once / cluster.nodes)
        if on_one_node > room:
            what = f"memory of a node, by {math.ceil(role.at_once / cluster.nodes)} x {role.name}"
            faults.append(Excess(what, on_one_node, room, "bytes", WHAT_TO_DO[role.name]))
    if cluster.free_disk_bytes is not None and costs.disk_bytes > cluster.free_disk_bytes:
        do = "free some space, choose another --out, or keep only places of images (--store reference)"
        faults.append(Excess("disk at --out", costs.disk_bytes, cluster.free_disk_bytes, "bytes", do))
    if costs.wall_s > MOST_DAYS * DAY_S:
        workers = math.ceil(work.workers * costs.wall_s / DAY_S / MOST_DAYS)
        do = f"{workers:,} workers would take {MOST_DAYS:g} day, if every stage has parts enough for them"
        faults.append(Excess("time", costs.wall_s / DAY_S, MOST_DAYS, "days", do))
    return faults


def as_json(
    costs: Costs, work: Work, sample: Sample, cluster: Cluster, faults: Sequence[Excess], prices: Prices | None
) -> dict[str, Any]:
    """The plan as programs read it: seconds, bytes, counts and money as numbers."""
    stages = []
    for stage in costs.stages:
        line = asdict(stage) | {"wall_s": stage.wall_s}
        stages.append(line | ({} if prices is None else {"price": stage.price(prices)}))
    measured = {name: value for name, value in asdict(sample).items() if name != "sizes"}
    measured["mean_image_bytes"] = sample.mean_bytes
    out: dict[str, Any] = {
        "rows": work.rows, "stages": stages, "memory": [asdict(role) for role in costs.roles],
        "disk_bytes": costs.disk_bytes, "wall_s": costs.wall_s, "query_s": costs.query_s,
        "work": asdict(work), "sample": measured, "cluster": asdict(cluster),
        "exceeded": [asdict(fault) for fault in faults],
    }  # fmt: skip
    if prices is not None:
        out["price"] = {
            "currency": prices.currency, "stages": sum(stage.price(prices) for stage in costs.stages),
            "month": costs.disk_bytes / GB * prices.gb_month,
        }  # fmt: skip
    return out


def show(
    costs: Costs, work: Work, sample: Sample, cluster: Cluster, faults: Sequence[Excess], prices: Prices | None
) -> None:
    """Print the tables, then what will be exceeded."""
    times, stored = [], []
    for stage in costs.stages:
        cores = duration(stage.cores_s + stage.gpu_s)
        times.append([stage.name, f"{stage.rows:,}", f"{stage.units:,} {stage.unit}", cores, duration(stage.wall_s)])
        line = [stage.name, size(stage.disk_bytes), f"{stage.reads:,}", f"{stage.writes:,}"]
        stored.append(line + ([] if prices is None else [f"{stage.price(prices):,.2f}"]))
    cores_s = sum(stage.cores_s + stage.gpu_s for stage in costs.stages)
    times.append(["all", "", "", duration(cores_s), duration(costs.wall_s)])
    requests = [f"{sum(getattr(stage, name) for stage in costs.stages):,}" for name in ("reads", "writes")]
    total = ["all", size(costs.disk_bytes), *requests]
    if prices is not None:
        total.append(f"{sum(stage.price(prices) for stage in costs.stages):,.2f}")
    title = f"{work.rows:,} rows, {work.workers:,} workers; {sample.rows:,} rows were measured"
    show_table(title, ["stage", "rows", "made of", "one core", "all workers"], times)
    money = [] if prices is None else [f"{prices.currency} (time too)"]
    show_table("Store", ["stage", "disk", "reads", "writes", *money], [*stored, total])
    show_table("Memory", ["process", "at once", "each"], [_role(role) for role in costs.roles])
    say(f"a query on one core: {costs.query_s * 1000:,.2f} ms over all {work.database:,} rows (flat)")
    if prices is not None:
        say(f"a month in the store: {costs.disk_bytes / GB * prices.gb_month:,.2f} {prices.currency}")
    say("not counted: baselines of an evaluation, a label network, a slow network")
    for fault in faults:
        say(f"warning: {fault.what}: needs {_amount(fault.needs, fault.unit)}, there is "
            f"{_amount(fault.has, fault.unit)}. What to do: {fault.do}")  # fmt: skip
    if not faults:
        room = size(cluster.memory_bytes - cluster.object_store_bytes)
        say(f"nothing is exceeded: {cluster.nodes:,} nodes with {room} beside the object store, {cluster.cpus:g} CPUs")


def _role(role: Role) -> list[str]:
    return [role.name, f"{role.at_once:,}", size(role.bytes)]


def _amount(value: float, unit: str) -> str:
    return size(value) if unit == "bytes" else f"{value:,.1f} {unit}"


def size(count: float) -> str:
    """Bytes as a person reads them.

    >>> size(0), size(1536), size(5 << 30)
    ('0 B', '1.5 KiB', '5.0 GiB')
    """
    power = min(4, int(math.log(max(count, 1), 1024)))
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 1024**power:,.{1 if power else 0}f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> duration(0.4), duration(75), duration(5400), duration(200_000)
    ('0.4 s', '75.0 s', '1.5 h', '2.3 days')
    """
    steps = ((180, 1, "s"), (HOUR_S, 60, "min"), (2 * DAY_S, HOUR_S, "h"), (math.inf, DAY_S, "days"))
    each, unit = next((each, unit) for most, each, unit in steps if seconds < most)
    return f"{seconds / each:,.1f} {unit}"
