"""[Ray] A stage as parts, each done exactly once: how rows are never lost and reruns resume.

A part is a fixed range of rows that becomes one file, or several with the same rows. A pool of actors takes parts one
at a time (Ray Data restarts a dead actor and hands its part to another). The actor writes the files, then a small
record of them under progress/<plan>/. The plan is a hash of everything the result depends on, so a rerun with the same
arguments finds the records and skips those parts, and a rerun with others does not. A file is a function of
its part alone: a part that ran twice wrote the same bytes twice.
A part that starts more than MAX_RETRIES + 1 times ends the stage, since it may be what kills its workers. Starts are
counted where the parts report them and Ray retries without end: its retries also count attempts to reach a node that is
gone, and on 2.60 a killed node used up four of them before the cluster knew of its death, some 15 s later.
Pixels never cross the object store: one process reads, decodes, computes and writes a part.
Short work on one machine runs in threads of this process (`WorkersConfig.runs_here`): same parts, same bytes.
Ray's own job checkpoint is not used: it keeps all ids in RAM (ray#65685) and reads all input again (ray#65891).
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.exceptions import RayActorError

from hashray import artifact, errors
from hashray.artifact import FileRecord, table_bytes
from hashray.engine.reports import MAX_RETRIES, Advance, Meter, listening, start_reports
from hashray.engine.session import WorkersConfig, connect, is_local, memory_environment, require_room, unwrap
from hashray.engine.stage import require_free
from hashray.errors import AuditError, HashrayError, InputError, RunError, TooManyBadRows
from hashray.progress import Bar
from hashray.storage import Store, requests
from hashray.storage.requests import Requests

RECORD_THREADS = 16
LOST = "lost"  # an actor's answer where a part has started too often
QUARANTINE_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])


class BadRow(BaseModel):
    """One row of the quarantine table."""

    model_config = ConfigDict(frozen=True)
    id: str
    uri: str | None = None
    reason: str


class Part(BaseModel):
    """A finished part: its file, the rows it took, and those it put aside. `notes` stay out of manifests.

    `beside` are files of the same rows in the same order, with other columns.
    """

    model_config = ConfigDict(frozen=True)
    index: int
    file: FileRecord
    beside: tuple[FileRecord, ...] = ()
    rows_in: int
    bad: tuple[BadRow, ...] = ()
    notes: dict[str, Any] = Field(default_factory=dict)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return (self.file, *self.beside)


class Output(NamedTuple):
    """What a worker makes of a part: its rows, the rows put aside, `info` for the manifest, notes for the driver.

    `beside` holds more columns of the same rows, in files of their own, by the name of their folder; where there are
    such, the rows' own folder is rows/, else parts/.
    """

    table: pa.Table
    bad: list[BadRow]
    info: dict[str, Any] = {}  # noqa: RUF012  # a NamedTuple's defaults are never changed
    notes: dict[str, Any] = {}  # noqa: RUF012
    beside: dict[str, pa.Table] = {}  # noqa: RUF012


class PartWorker(ABC):
    """What a stage does with one part. Built once per process, from plain arguments."""

    runs_trunk: ClassVar[bool] = False

    @abstractmethod
    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        """Compute a part; call `advance` with the number of rows that are done since the last call."""

    def close(self) -> None:
        """Leave this process as it was. Called where the process goes on with other work."""
        return


class PartRunner:
    """Computes parts with one worker and writes their files and records."""

    def __init__(self, worker: type[PartWorker], arguments: dict[str, Any], store: Store, plan: str) -> None:
        self.make = partial(worker, **arguments)
        self.worker: PartWorker | None = None
        self.store, self.plan = store, plan

    def run(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Part:
        """Compute one part, write its files, then its record."""
        if self.worker is None:
            self.worker = self.make()
        output = self.worker.process(unit, advance)
        name = part_name(self.plan, unit["index"], "rows" if output.beside else "parts")
        if len(output.table) + len(output.bad) != unit["rows"]:
            raise AuditError(f"{name}: {unit['rows']} rows in, {len(output.table)} out, {len(output.bad)} quarantined")
        beside = []
        for folder, table in output.beside.items():
            other = part_name(self.plan, unit["index"], folder)
            if len(table) != len(output.table):
                raise AuditError(f"{other}: {len(table)} rows, and {len(output.table)} in {name}")
            beside.append(artifact.write_file(self.store, other, table_bytes(table), rows=len(table)))
        record = artifact.write_file(
            self.store, name, table_bytes(output.table), rows=len(output.table), info=output.info
        )
        part = Part(
            index=unit["index"], file=record, beside=tuple(beside), rows_in=unit["rows"], bad=tuple(output.bad),
            notes=output.notes,
        )  # fmt: skip
        self.store.write(_record_key(self.plan, part.index), part.model_dump_json().encode())
        return part


class _Actor:
    """A runner inside Ray Data's actor pool. Errors travel as data: Ray Data keeps only the text of an exception."""

    def __init__(self, runner: PartRunner, reports: Any) -> None:
        self.runner, self.reports = runner, reports
        requests.take()  # by other work of this process

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        result = self._run(batch)
        return {**result, "requests": [json.dumps(asdict(requests.take()))]}

    def _run(self, batch: dict[str, Any]) -> dict[str, Any]:
        (text,) = batch["unit"]
        unit = json.loads(text)
        # The count survives this process, and counts no attempt to reach a node that is gone.
        if ray.get(self.reports.start.remote(unit["index"])) > MAX_RETRIES + 1:
            return {"part": [""], "error": [json.dumps([LOST, unit["index"]])]}
        try:
            part = self.runner.run(unit, Advance(self.reports, unit["index"]))
        except HashrayError as error:
            return {"part": [""], "error": [json.dumps([type(error).__name__, str(error)])]}
        except Exception as error:  # no lost worker: the same part would fail again, so it ends the stage
            text = f"part {unit['index']}: {type(error).__name__}: {error}"
            return {"part": [""], "error": [json.dumps([RunError.__name__, text])]}
        return {"part": [part.model_dump_json()], "error": [""]}


def run_parts(
    store: Store,
    plan: str,
    units: Sequence[Mapping[str, Any]],
    worker: type[PartWorker],
    arguments: dict[str, Any],
    workers: WorkersConfig,
    title: str,
    max_bad: float,
    short: bool = False,
    lost: Sequence[BadRow] = (),
) -> list[Part]:
    """Compute every part that has no record yet; return all parts, in order.

    Args:
        plan: hash of everything the parts depend on.
        units: what each part is made of: `index` (its place), `rows` (how many rows go in) and more; JSON-able.
        max_bad: share of all rows that may be quarantined; above it the run stops.
        short: whether the work is small enough to run in this process where nothing asks for a cluster.
        lost: rows that went to quarantine before; they count for `max_bad`.

    Raises:
        AlreadyExists: another plan's artifact is finished here; nothing of it is touched.
        InputError: no machine here can hold a worker.
        HashrayError: what a worker raised, as it raised it. RunError: any other error of a worker.
        TooManyBadRows: with counts, the first reasons and the place of the table of all of them.
    """
    require_free(store, plan)
    total = sum(int(unit["rows"]) for unit in units) + len(lost)
    parts = finished_parts(store, plan, len(units))
    if sum(len(part.bad) for part in parts.values()) > max_bad * total:  # mended since: those parts run again
        parts = {index: part for index, part in parts.items() if not part.bad}
    todo = [unit for unit in units if int(unit["index"]) not in parts]
    with Bar(title, total, "rows", done=len(lost) + sum(part.rows_in for part in parts.values())) as bar:
        if todo:
            meter = Meter(bar, "part")
            bad = len(lost) + sum(len(part.bad) for part in parts.values())
            execute = _in_this_process if workers.runs_here(short) else _on_ray
            runner = PartRunner(worker, arguments, store, plan)
            with closing(execute(todo, runner, workers, meter)) as results:
                for part in results:
                    parts[part.index] = part
                    meter.finish(part.index, part.rows_in)
                    bad += len(part.bad)
                    if bad > max_bad * total:
                        _too_many_bad(store, parts, lost, total, max_bad, title)
    missing = [str(unit["index"]) for unit in units if int(unit["index"]) not in parts]
    if missing:
        raise AuditError(f"{title}: {len(missing)} parts are missing, the first is {missing[0]}; run it again")
    require_free(store, plan)
    return [parts[int(unit["index"])] for unit in units]


def _in_this_process(
    todo: Sequence[Mapping[str, Any]], runner: PartRunner, workers: WorkersConfig, meter: Meter
) -> Generator[Part]:
    """Yield the parts as threads finish them. Decoding and torch release Python's lock, so cores are busy."""
    runner.worker = runner.make()
    threads = min(len(todo), workers.workers or os.cpu_count() or 1)
    meter.bar.started()
    pool = ThreadPoolExecutor(threads, "hashray-part")
    try:
        waiting = [pool.submit(runner.run, unit, partial(meter.advance, unit["index"])) for unit in todo]
        for future in as_completed(waiting):
            yield future.result()
    except Exception as error:
        if isinstance(error, HashrayError):
            raise
        raise RunError(f"{meter.bar.title}: {type(error).__name__}: {error}") from error
    finally:
        meter.stopped = True
        pool.shutdown(wait=False, cancel_futures=True)
        runner.worker.close()


def _on_ray(
    todo: Sequence[Mapping[str, Any]], runner: PartRunner, workers: WorkersConfig, meter: Meter
) -> Generator[Part]:
    """Yield the parts as a pool of actors finishes them."""
    meter.bar.waiting("workers to start")
    connect()
    require_room(workers.cpus_per_worker, workers.gpus_per_worker)
    items = [{"unit": json.dumps(dict(unit))} for unit in todo]
    # By the environment: a pool's actors compute in a thread of their own, which mallopt would not reach.
    keeps = runner.make.func.runs_trunk and not workers.gpus_per_worker  # type: ignore[attr-defined]
    reports = start_reports()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor,
        fn_constructor_args=(runner, reports),
        batch_size=1,
        compute=_pool(len(todo), workers),
        num_cpus=workers.cpus_per_worker,
        num_gpus=workers.gpus_per_worker or None,
        runtime_env={"env_vars": memory_environment()} if keeps else None,
    )
    with listening(reports, meter.hear, meter.bar.tick), _plain_errors(meter):
        for row in dataset.iter_rows():
            requests.add(Requests(**json.loads(row["requests"])))
            if row["error"]:
                name, text = json.loads(row["error"])
                if name == LOST:
                    raise meter.lost(text)
                raise getattr(errors, name)(text if name != RunError.__name__ else f"{meter.bar.title}: {text}")
            yield Part.model_validate_json(row["part"])


def _pool(parts: int, workers: WorkersConfig) -> ray.data.ActorPoolStrategy:
    """As many actors as there are parts and room: on a cluster, also in nodes that come while the stage runs.

    There the pool may always shrink: an actor of a lost node starts again where an idle one gives up its place.
    """
    first = min(parts, workers.most())
    if is_local():
        return ray.data.ActorPoolStrategy(size=first)
    most = parts if workers.workers is None else first
    return ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=first)


@contextmanager
def _plain_errors(meter: Meter) -> Iterator[None]:
    """Raise the hashray error inside what Ray raises, and a plain one for workers that were lost too often."""
    try:
        yield
    except Exception as error:
        plain = unwrap(error)
        if isinstance(plain, RayActorError):
            raise meter.lost() from error
        if plain is error:
            raise
        raise plain from error


def part_name(plan: str, index: int, folder: str = "parts") -> str:
    """Where a unit's part goes: with the plan in its name, so that no other run ever writes over it."""
    return f"{folder}/part-{index:05d}-{plan[:8]}.parquet"


def finished_parts(store: Store, plan: str, count: int) -> dict[int, Part]:
    """The records an earlier run of the same plan left, by index. A broken record counts as none."""

    def read(key: str) -> Part | None:
        try:
            part = Part.model_validate_json(store.read(key))
            return part if all(store.size(file.name) == file.bytes for file in part.files) else None
        except (ValueError, InputError):  # half a record, or its part is gone: the unit runs again
            return None

    keys = [key for key, _ in store.list(f"progress/{plan}/")]
    with ThreadPoolExecutor(RECORD_THREADS) as pool:
        parts = [part for part in pool.map(read, keys) if part is not None]
    return {part.index: part for part in parts if part.index < count}


def _record_key(plan: str, index: int) -> str:
    return f"progress/{plan}/{index:06d}.json"


def part_files(parts: Sequence[Part]) -> list[FileRecord]:
    """The files of all parts, for a manifest: folder by folder, each in order."""
    return [file for folder in zip(*(part.files for part in parts), strict=True) for file in folder]


def write_quarantine(store: Store, parts: Sequence[Part], before: Sequence[BadRow] = ()) -> FileRecord:
    """Write the quarantine table of all parts, after rows lost `before`; an empty one: nothing was put aside."""
    bad = [*before, *(row for part in sorted(parts, key=lambda part: part.index) for row in part.bad)]
    rows = [row.model_dump() for row in bad]
    table = pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
    return artifact.write_named(store, artifact.QUARANTINE, table_bytes(table), rows=len(rows))


def _too_many_bad(
    store: Store, parts: Mapping[int, Part], lost: Sequence[BadRow], total: int, max_bad: float, title: str
) -> None:
    bad = [*lost, *(row for part in parts.values() for row in part.bad)]
    table = write_quarantine(store, list(parts.values()), lost)
    first = "".join(f"\n  {row.id}: {row.reason}" for row in bad[:5])
    raise TooManyBadRows(
        f"{title}: {len(bad):,} of {total:,} rows could not be used, --max-bad allows {max_bad:g} of them; all so far "
        f"are in {store.url}/{table.name}, the first:{first}\nMend or remove them, or raise --max-bad and run "
        "the same command again: finished parts are kept"
    )
