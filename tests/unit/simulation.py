"""A deterministic simulation of an index that several writers and readers share.

Every call of the store is a point where another actor may run instead, where the answer may be lost before or after the
call took effect, where the process may die, and where the clock may jump. One seed chooses all of it. The model is a
dict of version -> rows; what a version should hold follows from the operations alone.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hashray.codes import Codes, hamming
from hashray.errors import AlreadyExists, AuditError, HashrayError, InputError, RunError, StoreUnavailable
from hashray.index.catalog import Catalog
from hashray.search.reader import open_version
from hashray.storage.base import TEMP_PREFIX, Level, Store

NUM_BITS = 32
GRACE_S = 1000.0
Rows = dict[str, tuple[bytes, str]]  # id -> code, class


class Killed(BaseException):
    """The process of an actor dies here."""


class MemoryStore(Store):
    """Objects in a dict, with a clock of its own; `hook` is called around every call."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.now_s = 0.0
        self.hook: Callable[[str, str, Callable[[], Any]], Any] = lambda _name, _key, call: call()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def _get(self, key: str) -> tuple[bytes, float]:
        if key not in self.objects:
            raise InputError(f"{self.url}/{key} not found")
        return self.objects[key]

    def _put(self, key: str, data: bytes, absent: bool = False) -> None:
        if absent and key in self.objects:
            raise AlreadyExists(f"{self.url}/{key} already exists")
        self.objects[key] = (bytes(data), self.now_s)

    def read(self, key: str) -> bytes:
        return self.hook("read", key, lambda: self._get(key)[0])

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self.hook("read", key, lambda: self._get(key)[0][start : start + length])

    def write(self, key: str, data: bytes) -> None:
        self.hook("write", key, lambda: self._put(key, data))

    def create(self, key: str, data: bytes) -> None:
        self.hook("create", key, lambda: self._put(key, data, absent=True))

    def upload(self, key: str, path: Path) -> None:
        self.write(key, path.read_bytes())

    def download(self, key: str, path: Path, advance: Callable[[int], None] | None = None) -> None:
        data = self.read(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def exists(self, key: str) -> bool:
        return self.hook("exists", key, lambda: key in self.objects)

    def size(self, key: str) -> int:
        return self.hook("size", key, lambda: len(self._get(key)[0]))

    def modified(self, key: str) -> float:
        return self.hook("modified", key, lambda: self._get(key)[1])

    def list(self, prefix: str = "", on_error: Any = None) -> Iterator[tuple[str, int]]:
        keys = self.hook("list", prefix, lambda: sorted(key for key in self.objects if key.startswith(prefix)))
        return iter([(key, len(self.objects[key][0])) for key in keys if not key.startswith(TEMP_PREFIX)])

    def level(self, prefix: str = "", on_error: Any = None) -> Level:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        self.hook("delete", key, lambda: self.objects.pop(key, None))

    def open(self, key: str, ranged: bool = False) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def local_path(self, key: str) -> None:
        return None


OPERATIONS = {name: name for name in ("append", "delete", "compact", "rollback", "gc")} | {"replace": "append"}


@dataclass
class Operation:
    """What an actor asked for: the change to the rows, and what became of it."""

    name: str
    apply: Callable[[Rows, dict[int, Rows]], Rows]
    version: int | None = None  # that it returned; None: no answer, it may have landed


@dataclass
class Actor:
    """A thread that runs while it holds the baton."""

    name: str
    work: Callable[[], None]
    go: threading.Event = field(default_factory=threading.Event)
    ended: bool = False
    error: BaseException | None = None


class Simulation:
    """One run of a seed."""

    def __init__(self, seed: int, store: MemoryStore, cache: Path, faults: float = 0.03) -> None:
        self.rng = np.random.default_rng(seed)
        self.store, self.cache, self.faults = store, cache, faults
        self.operations: list[Operation] = []
        self.trace = hashlib.sha256()
        self.first: Rows = {}
        self.seen: list[tuple[int, Rows]] = []
        self._actors: list[Actor] = []
        self._current: Actor | None = None
        self._back = threading.Event()
        self._names = iter(range(10**9))

    def run(self, writers: int, readers: int, each: int) -> None:
        """Let the actors run to their end, in an order that the seed chooses; raise what an actor raised."""
        works = [lambda n=n: self._write(n, each) for n in range(writers)]
        works += [lambda n=n: self._read(n, each) for n in range(readers)]
        self._actors = [Actor(f"actor-{number}", work) for number, work in enumerate(works)]
        for actor in self._actors:
            threading.Thread(target=self._body, args=(actor,), daemon=True).start()
        self.store.hook = self._hook
        while alive := [actor for actor in self._actors if not actor.ended]:
            self._current = alive[self.rng.integers(len(alive))]
            self._current.go.set()
            self._back.wait()
            self._back.clear()
        self.store.hook = lambda _name, _key, call: call()
        for actor in self._actors:
            if actor.error is not None:
                raise actor.error

    def _body(self, actor: Actor) -> None:
        actor.go.wait()
        actor.go.clear()
        try:
            actor.work()
        except BaseException as error:  # raised again by `run`
            actor.error = error
        actor.ended = True
        self._back.set()

    def _hook(self, name: str, key: str, call: Callable[[], Any]) -> Any:
        """Give the baton back; then the call, with or without a fault."""
        actor = self._current
        assert actor is not None
        self._back.set()
        actor.go.wait()
        actor.go.clear()
        chance, shown = self.rng.random(), "temporary" if TEMP_PREFIX in key else key
        self.trace.update(f"{actor.name} {name} {shown} {chance}\n".encode())
        self.store.now_s += 1
        if self.rng.random() < 0.002:
            self.store.now_s += 2 * GRACE_S
        if chance < self.faults / 3:
            raise StoreUnavailable(f"{key}: no answer, and no effect")
        result, error = None, None
        try:
            result = call()
        except HashrayError as raised:
            error = raised
        if chance < 2 * self.faults / 3:
            raise StoreUnavailable(f"{key}: no answer")
        if chance < self.faults:
            raise Killed
        if name == "create" and error is None and chance > 0.97:  # the answer was lost, and the client asked again
            raise AlreadyExists(f"{key} already exists")
        if error is not None:
            raise error
        return result

    def _write(self, number: int, each: int) -> None:
        for _ in range(each):
            catalog = Catalog(self.store, self.cache / f"writer-{number}")
            operation, call = self._choose(catalog)
            self.operations.append(operation)
            try:
                operation.version = call()
            except (StoreUnavailable, Killed):
                pass  # no answer: it may have landed
            except AuditError:
                raise  # the last guard has held: a change was worked out wrong
            except (InputError, RunError):
                self.operations.remove(operation)  # refused: it must not have landed

    def _choose(self, catalog: Catalog) -> tuple[Operation, Callable[[], int]]:
        rng = self.rng
        kind = rng.choice(
            ["append", "replace", "delete", "compact", "rollback", "gc"], p=[0.3, 0.1, 0.25, 0.15, 0.1, 0.1]
        )
        if kind in ("append", "replace"):
            ids = sorted({f"{rng.integers(60):02d}" for _ in range(rng.integers(1, 12))})
            rows = {
                row: (rng.integers(0, 4, NUM_BITS // 8, dtype=np.uint8).tobytes(), str(rng.choice(["a", "b"])))
                for row in ids
            }
            codes = np.array([[*code] for code, _ in rows.values()], np.uint8)
            classes = {"class": [name for _, name in rows.values()]}
            apply = lambda old, _: old | rows if kind == "replace" or not set(old) & set(rows) else _refuse()  # noqa: E731
            return Operation(kind, apply), lambda: catalog.append(ids, codes, classes, replace=kind == "replace")
        if kind == "delete":
            ids = sorted({f"{rng.integers(60):02d}" for _ in range(rng.integers(1, 8))})
            apply = lambda old, _: {row: code for row, code in old.items() if row not in ids}  # noqa: E731
            return Operation("delete", apply), lambda: catalog.delete(ids, missing_ok=True)
        if kind == "rollback":
            back = int(rng.integers(1, 8))

            def roll() -> int:
                to = max(1, catalog.version - back)
                operation.apply = lambda _, all_rows: all_rows[to]
                return catalog.rollback(to)

            operation = Operation("rollback", lambda old, _: old)
            return operation, roll
        same = Operation(str(kind), lambda old, _: old)
        if kind == "compact":
            size = int(rng.integers(5, 60))
            return same, lambda: catalog.compact(rows_per_shard=size)
        keep, grace_s = int(rng.integers(1, 5)), float(rng.choice([0, GRACE_S]))
        return same, lambda: catalog.gc(keep=keep, grace_s=grace_s)

    def _read(self, number: int, each: int) -> None:
        for _ in range(each):
            try:
                index = open_version(self.store, None, self.cache / f"reader-{number}", threads=1)
            except (StoreUnavailable, Killed):
                continue
            self.trace.update(f"read {index.version} {index.rows}\n".encode())
            self.seen.append((index.version, rows_of(index)))

    def check(self) -> dict[int, Rows]:
        """Explain every version by the operations; return the rows of each."""
        catalog = Catalog(self.store, self.cache / "check")
        history = catalog.versions()
        expected = {1: self.first}
        for facts in history[1:]:
            number = int(facts["version"])
            claims = [
                operation for operation in self.operations
                if OPERATIONS[operation.name] == facts["operation"] and operation.version in (None, number)
            ]  # fmt: skip
            choices = [apply_to(operation, expected[number - 1], expected) for operation in claims]
            choices = [rows for rows in choices if rows is not None and len(rows) == facts["rows"]]
            if facts["kept"]:
                there = rows_of(open_version(self.store, number, self.cache / "check", threads=1))
                assert there in choices, (number, facts)
                choices = [there]
            assert choices, (number, facts)
            if any(rows != choices[0] for rows in choices):  # several lost operations fit, and the files are gone
                return expected
            expected[number] = choices[0]
        for operation in self.operations:
            if (number := operation.version) is not None:  # it made this version, or had nothing to change in it
                results = [apply_to(operation, expected[n], expected) for n in (number - 1, number) if n in expected]
                assert expected[number] in results, (number, operation.name)
        for version, rows in self.seen:
            assert rows == expected[version], version
        return expected


def apply_to(operation: Operation, rows: Rows, all_rows: dict[int, Rows]) -> Rows | None:
    try:
        return operation.apply(rows, all_rows)
    except (LookupError, InputError):
        return None


def _refuse() -> Rows:
    raise InputError("an id is there already")


def rows_of(index: Any) -> Rows:
    """Every living row of an open index: id -> code, class."""
    rows: Rows = {}
    for piece in index.pieces:
        codes, ids = piece.shard.codes(), piece.ids.array.to_pylist()
        classes = piece.attributes.column("class").to_pylist()
        for place, row in enumerate(ids):
            if piece.living is None or place in piece.living:
                assert row not in rows, row
                rows[row] = (codes[place].tobytes(), classes[place])
    assert len(rows) == index.rows
    return rows


def nearest(rows: Rows, query: Codes, most: int, farthest: int, chosen: str | None) -> list[tuple[int, str]]:
    """By a naive sort: (distance, id) of the nearest rows."""
    ids = [row for row, (_, name) in rows.items() if chosen in (None, name)]
    if not ids:
        return []
    codes = np.frombuffer(b"".join(rows[row][0] for row in ids), np.uint8).reshape(len(ids), -1)
    pairs = sorted(zip(hamming(query[None], codes)[0].tolist(), ids, strict=True))
    return [pair for pair in pairs if pair[0] <= farthest][:most]


def codes_of(count, seed=0, num_bits=32):
    return np.random.default_rng(seed).integers(0, 256, (count, num_bits // 8), dtype=np.uint8)


def names(first, last):
    return [f"{number:04d}" for number in range(first, last)]


def ids_in(catalog, version=None):
    return sorted(rows_of(open_version(catalog.store, version, catalog.cache, threads=1)))
