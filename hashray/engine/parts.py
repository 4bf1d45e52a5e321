"""[Ray] A stage as independent units, each finished once: how rows are never lost and reruns resume.

A unit is a fixed range of rows that becomes one part file. A pool of actors takes units one at a time
(Ray Data restarts a dead actor and hands its unit to another); the actor writes the part, then a small
record of it under progress/<plan>/. The plan is a hash of everything the result depends on, so a rerun
with the same arguments finds the records and skips those units, and a rerun with others does not. Parts are
a function of their unit alone: a unit that ran twice wrote the same bytes twice.
Pixels never cross the object store: a unit reads, decodes, computes and writes in one process.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import ray
from pydantic import BaseModel, ConfigDict, Field

from hashray import artifact, errors
from hashray.artifact import FileRecord, Manifest, table_bytes
from hashray.engine.session import WorkersConfig, memory_environment, require_room, unwrap
from hashray.errors import AlreadyExists, AuditError, HashrayError, InputError, TooManyBadRows
from hashray.progress import Bar, say
from hashray.storage import Store

RECORD_THREADS = 16
QUARANTINE_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])


class BadRow(BaseModel):
    """One row of the quarantine table."""

    model_config = ConfigDict(frozen=True)
    id: str
    uri: str | None = None
    reason: str


class Part(BaseModel):
    """What a unit became: its file, the rows it took, and those it put aside. `notes` stay out of manifests."""

    model_config = ConfigDict(frozen=True)
    index: int
    file: FileRecord
    rows_in: int
    bad: tuple[BadRow, ...] = ()
    notes: dict[str, Any] = Field(default_factory=dict)


class PartWorker(ABC):
    """What a stage does with one unit. Built once per actor, from plain arguments."""

    runs_trunk: ClassVar[bool] = False

    @abstractmethod
    def process(self, unit: Mapping[str, Any]) -> tuple[pa.Table, list[BadRow], dict[str, Any], dict[str, Any]]:
        """Rows of the part, rows put aside, the part's `info` in the manifest, and notes for the driver."""


class _Actor:
    def __init__(self, worker: type[PartWorker], arguments: dict[str, Any], store: Store, plan: str) -> None:
        self.make = partial(worker, **arguments)
        self.worker: PartWorker | None = None
        self.store, self.plan = store, plan

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"part": [self._run(json.loads(text)) for text in batch["unit"]], "error": [""] * len(batch["unit"])}
        except HashrayError as error:  # as data: Ray Data keeps of an exception only its traceback as text
            return {"part": [""], "error": [json.dumps([type(error).__name__, str(error)])]}

    def _run(self, unit: dict[str, Any]) -> str:
        if self.worker is None:
            self.worker = self.make()
        table, bad, info, notes = self.worker.process(unit)
        name = part_name(self.plan, unit["index"])
        if len(table) + len(bad) != unit["rows"]:
            raise AuditError(f"{name}: {unit['rows']} rows in, {len(table)} out, {len(bad)} quarantined")
        record = artifact.write_file(self.store, name, table_bytes(table), rows=len(table), info=info)
        part = Part(index=unit["index"], file=record, rows_in=unit["rows"], bad=tuple(bad), notes=notes)
        data = part.model_dump_json()
        self.store.write(_record_key(self.plan, part.index), data.encode())
        return data


def run_parts(
    store: Store,
    plan: str,
    units: Sequence[Mapping[str, Any]],
    worker: type[PartWorker],
    arguments: dict[str, Any],
    workers: WorkersConfig,
    title: str,
    max_bad: float,
) -> list[Part]:
    """Run every unit that has no record yet; return the parts of all, in order.

    Args:
        plan: hash of everything the parts depend on.
        units: each with `index` (its place) and `rows` (how many rows go in); JSON-able.
        max_bad: share of all rows that may be quarantined; above it the run stops.

    Raises:
        AlreadyExists: another plan's artifact is finished here; nothing of it is touched.
        InputError: no machine here can hold a worker.
        HashrayError: what a worker raised, as it raised it.
        TooManyBadRows: with counts, the first reasons and where the table of all of them is.
    """
    require_free(store, plan)
    total = sum(int(unit["rows"]) for unit in units)
    parts = finished_parts(store, plan, len(units))
    if sum(len(part.bad) for part in parts.values()) > max_bad * total:  # mended since: those units run again
        parts = {index: part for index, part in parts.items() if not part.bad}
    todo = [unit for unit in units if int(unit["index"]) not in parts]
    bar = Bar(title, total, "rows", done=sum(part.rows_in for part in parts.values()))
    with bar:
        if todo:
            require_room(workers.cpus_per_worker, workers.gpus_per_worker)
            items = [{"unit": json.dumps(dict(unit))} for unit in todo]
            size = min(len(todo), workers.most())
            # By the environment: a pool's actors compute in a thread of their own, which mallopt would not reach.
            keeps = worker.runs_trunk and not workers.gpus_per_worker
            dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Actor,
                fn_constructor_args=(worker, arguments, store, plan),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=size),
                num_cpus=workers.cpus_per_worker,
                num_gpus=workers.gpus_per_worker or None,
                runtime_env={"env_vars": memory_environment()} if keeps else None,
            )
            try:
                for row in dataset.iter_rows():
                    if row["error"]:
                        name, text = json.loads(row["error"])
                        raise getattr(errors, name)(text)
                    part = Part.model_validate_json(row["part"])
                    parts[part.index] = part
                    bar.add(part.rows_in)
                    _stop_if_bad(store, parts, total, max_bad, title)
            except Exception as error:
                found = unwrap(error)
                if found is error:
                    raise
                raise found from error
    missing = [str(unit["index"]) for unit in units if int(unit["index"]) not in parts]
    if missing:
        raise AuditError(f"{title}: {len(missing)} units gave no part, the first {missing[0]}; run it again")
    require_free(store, plan)
    return [parts[int(unit["index"])] for unit in units]


def part_name(plan: str, index: int) -> str:
    """Where a unit's part goes: with the plan in its name, so that no other run ever writes over it."""
    return f"parts/part-{index:05d}-{plan[:8]}.parquet"


def already_made(store: Store, kind: str, plan: str, name: str = "plan") -> Manifest | None:
    """The finished artifact of this very plan; None where nothing is finished yet.

    Raises:
        MismatchError: what is finished there is of another kind. AlreadyExists: it is another plan's.
    """
    if not artifact.is_finished(store):
        return None
    manifest = artifact.load_manifest(store, kind)
    require_free(store, plan, name)
    for left in ("progress/", "checkpoints/"):  # by a run that was killed between its manifest and its tidying
        store.clear(left)
    say(f"{store.url} is finished already" + ("" if manifest.rows_out is None else f": {manifest.rows_out:,} rows"))
    return manifest


def require_free(store: Store, plan: str, name: str = "plan") -> None:
    """Raise AlreadyExists where the finished artifact of another plan is, before anything of it is overwritten.

    `name` is what the manifest's info calls its plan.
    """
    if not artifact.is_finished(store):
        return
    manifest = artifact.load_manifest(store)
    if manifest.info.get(name) != plan:
        raise AlreadyExists(
            f"{store.url} holds a finished {manifest.kind} ({manifest.id[:12]}) of another input or configuration; "
            "nothing was changed there: choose another --out, or delete the folder to make it again"
        )


def finished_parts(store: Store, plan: str, count: int) -> dict[int, Part]:
    """The records an earlier run of the same plan left, by index. A broken record counts as none."""

    def read(key: str) -> Part | None:
        try:
            part = Part.model_validate_json(store.read(key))
            return part if store.size(part.file.name) == part.file.bytes else None
        except (ValueError, InputError):  # half a record, or its part is gone: the unit runs again
            return None

    keys = [key for key, _ in store.list(f"progress/{plan}/")]
    with ThreadPoolExecutor(RECORD_THREADS) as pool:
        found = [part for part in pool.map(read, keys) if part is not None]
    return {part.index: part for part in found if part.index < count}


def _record_key(plan: str, index: int) -> str:
    return f"progress/{plan}/{index:06d}.json"


def write_quarantine(store: Store, parts: Sequence[Part], before: Sequence[BadRow] = ()) -> FileRecord:
    """Write the quarantine table of all parts, after rows lost `before`; an empty one: nothing was put aside."""
    bad = [*before, *(row for part in sorted(parts, key=lambda part: part.index) for row in part.bad)]
    rows = [row.model_dump() for row in bad]
    table = pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
    return artifact.write_file(store, artifact.QUARANTINE, table_bytes(table), rows=len(rows))


def _stop_if_bad(store: Store, parts: Mapping[int, Part], total: int, max_bad: float, title: str) -> None:
    bad = [row for part in parts.values() for row in part.bad]
    if len(bad) <= max_bad * total:
        return
    write_quarantine(store, list(parts.values()))
    first = "".join(f"\n  {row.id}: {row.reason}" for row in bad[:5])
    raise TooManyBadRows(
        f"{title}: {len(bad):,} of {total:,} rows could not be used, --max-bad allows {max_bad:g} of them; all so far "
        f"are in {store.url}/{artifact.QUARANTINE}, the first:{first}\nMend or remove them, or raise --max-bad and run "
        "the same command again: finished parts are kept"
    )
