"""[Ray] An index in Ray actors: each holds some shards, the answers are merged as those of one process.

A call that an actor does not answer goes to another that holds the same shards; if there is none, to the same one
again, which Ray starts again and which opens its shards from storage. What does not answer in time is counted as
missing: the service refuses the query then, or says that its answer is not whole.

Actors keep the last versions that were asked for, so that a new version is opened beside the one that is served.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayError

from hashray.codes import Codes
from hashray.engine.session import unwrap
from hashray.errors import HashrayError, RequestError, StoreUnavailable
from hashray.index.attributes import joined_schema
from hashray.index.log import Version, read_version
from hashray.index.version import ShardRecord
from hashray.search.metrics import log
from hashray.search.nearest import Described, Facts, Nearest, Row, facts_of, merge_nearest, rows_of
from hashray.search.reader import Index, open_version
from hashray.storage import Store, open_store
from hashray.storage.cache import cache_folder

NAMESPACE = "hashray"
VERSIONS = 4  # that an actor keeps open
OPEN_S = 600.0  # in which a version's files are fetched and verified
LATE_S = 2.0  # that the other actors of a group have to open it too
FIRST_S = 1.0  # that an actor has before another is asked too
SUSPECT_S = 2.0  # that an actor is asked last after it did not answer
Group = tuple[str, ...]  # shards that one actor holds, by the names of their files of ids


@dataclass(frozen=True)
class Opened:
    """What an actor says of the shards it has opened."""

    facts: Facts
    schema: pa.Schema


class ShardHolder:
    """The shards of some versions of an index, open in an actor; each search uses one thread."""

    def __init__(self, url: str) -> None:
        self._store, self._open = open_store(url), OrderedDict[tuple[int, Group], Index]()
        self._lock = Lock()

    def open(self, version: int, group: Group) -> Opened:
        """Open some shards of a version, unless they are open."""
        index = self._at(version, group)
        return Opened(facts_of(index), joined_schema([piece.attributes for piece in index.pieces]))

    def search(self, version: int, group: Group, codes: Codes, k: int, where: str | None, schema: pa.Schema) -> Nearest:
        """The k nearest rows among these shards; `schema`: the attributes of all shards of the index."""
        index = self._at(version, group)
        index.schema = schema
        return Nearest(*index.search(codes, k, where))

    def describe(self, version: int, group: Group, ids: Sequence[str], near: Codes | None) -> dict[str, Row]:
        """Those of the rows that are in these shards."""
        return rows_of(self._at(version, group), ids, near)

    def _at(self, version: int, group: Group) -> Index:
        with self._lock:
            index = self._open.get((version, group))
            if index is None:
                index = open_version(self._store, version, cache_folder(None), threads=1, only=frozenset(group))
                self._open[version, group] = index
            self._open.move_to_end((version, group))
            while len(self._open) > VERSIONS:
                self._open.popitem(last=False)
            return index


def groups_of(shards: Sequence[ShardRecord], most_bytes: int) -> list[Group]:
    """Shards in groups of at most `most_bytes` of codes and ids, in their order; a larger shard is alone."""
    groups, size_bytes = list[list[str]](), most_bytes + 1
    for shard in shards:
        more_bytes = shard.codes.bytes + shard.ids.bytes
        if size_bytes + more_bytes > most_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(shard.ids.name)
        size_bytes += more_bytes
    return [tuple(group) for group in groups]


class Fleet:
    """The actors that hold an index.

    Args:
        name: of the service: every process of it asks the same actors.
        most_bytes: of codes and ids in one actor.
        replicas: actors that hold the same shards.
        wait_s: how long a query waits for shards whose actors do not answer.
        partial: whether a version may be opened without some of its shards.
    """

    def __init__(
        self, name: str, most_bytes: int, replicas: int, cpus: float, wait_s: float, partial: bool = False
    ) -> None:
        self.name, self.most_bytes, self.replicas, self.cpus, self.wait_s = name, most_bytes, replicas, cpus, wait_s
        self.partial = partial
        self._suspects: dict[Any, float] = {}
        self._turn = count()

    def open(self, store: Store, version: int) -> FleetIndex:
        """Let every actor open its shards of a version.

        Raises:
            What `open_version` raises; StoreUnavailable: an actor does not start or open its shards in time.
        """
        head = read_version(store, version)
        groups = groups_of(head.shards, self.most_bytes) or [()]
        actors = [[self._actor(store.url, g, r) for r in range(self.replicas)] for g in range(len(groups))]
        return FleetIndex(self, head, groups, actors, self._open_all(version, groups, actors))

    def _open_all(self, version: int, groups: Sequence[Group], actors: Sequence[Sequence[Any]]) -> list[Opened]:
        """What one actor of each group has opened; the others have a moment more, and are asked last if they need it.

        So a node that is gone holds up no new version while each of its shards has another actor.
        """
        pending = {actor.open.remote(version, groups[g]): (g, actor) for g, some in enumerate(actors) for actor in some}
        opened, errors = dict[int, Opened](), dict[int, Exception]()
        deadline_s = time.monotonic() + OPEN_S
        while pending and (left_s := deadline_s - time.monotonic()) > 0:
            done, _ = ray.wait([*pending], timeout=left_s)
            for reference in done:
                group, actor = pending.pop(reference)
                try:
                    opened[group] = ray.get(reference)
                except RayError as error:
                    errors[group] = error
                    self._suspects[actor] = time.monotonic() + SUSPECT_S
            if len(opened) == len(groups):
                deadline_s = min(deadline_s, time.monotonic() + LATE_S)
        for _, actor in pending.values():
            self._suspects[actor] = time.monotonic() + 10 * LATE_S
        if missing := [group for group in range(len(groups)) if group not in opened]:
            self._require_partial(version, missing, opened, errors)
        return [opened[group] for group in sorted(opened)]

    def _require_partial(
        self, version: int, missing: Sequence[int], opened: Mapping[int, Opened], errors: Mapping[int, Exception]
    ) -> None:
        """Say which groups of shards are missing; raise if the service may not go on without them."""
        known = unwrap(errors[missing[0]]) if missing[0] in errors else None
        if not (self.partial and opened):
            if isinstance(known, HashrayError):
                raise known
            why = f"not in {OPEN_S:g} s: are there CPUs for all actors?" if known is None else str(known)
            raise StoreUnavailable(f"version {version} was not opened: {why}")
        log("shards do not answer", "warning", version=version, groups=len(missing), error=str(known))

    def _actor(self, url: str, group: int, replica: int) -> Any:
        options = {
            "name": f"{self.name}:{url}:{group}:{replica}", "namespace": NAMESPACE, "get_if_exists": True,
            "lifetime": "detached", "max_restarts": -1, "max_task_retries": 0, "num_cpus": self.cpus,
            "max_concurrency": 4, "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        return ray.remote(ShardHolder).options(**options).remote(url)

    def ask(self, actors: Sequence[Sequence[Any]], call: Callable[[int, Any], Any]) -> list[Any | None]:
        """The answer of one actor of each group, None where none answers in time.

        Args:
            actors: of each group.
            call: sends a request to an actor of a group, by the group's number; returns the reference.

        Raises:
            RequestError: an actor says that the request is wrong.
        """
        deadline_s = time.monotonic() + self.wait_s
        order = [self._order(some) for some in actors]
        first = [call(group, order[group][0]) for group in range(len(actors))]
        with suppress(RayError):  # one call for all answers; where one fails or is late, each is looked after
            return list(ray.get(first, timeout=min(FIRST_S, self.wait_s)))
        return [self._answer(group, order[group], first[group], call, deadline_s) for group in range(len(actors))]

    def _order(self, some: Sequence[Any]) -> list[Any]:
        """The actors of a group by turns, those that did not answer a moment ago last."""
        turn, now_s = next(self._turn) % len(some), time.monotonic()
        return sorted([*some[turn:], *some[:turn]], key=lambda actor: self._suspects.get(actor, 0.0) > now_s)

    def _answer(
        self, group: int, actors: Sequence[Any], first: Any, call: Callable[[int, Any], Any], deadline_s: float
    ) -> Any | None:
        pending, asked, broken = {first: actors[0]}, 1, 0
        while (left_s := deadline_s - time.monotonic()) > 0 and broken < len(actors):
            if not pending:  # every actor was lost: Ray starts them again
                time.sleep(min(0.05, left_s))
                pending[call(group, actors[asked % len(actors)])] = actors[asked % len(actors)]
                asked += 1
            done, _ = ray.wait([*pending], timeout=min(left_s, FIRST_S))
            if not done and len(pending) < len(actors):  # too slow: another is asked too
                pending[call(group, actors[asked % len(actors)])] = actors[asked % len(actors)]
                asked += 1
            for reference in done:
                actor = pending.pop(reference)
                try:
                    return ray.get(reference)
                except RayError as error:
                    self._suspects[actor] = time.monotonic() + SUSPECT_S
                    broken += self._judge(error, group)
        return None

    def _judge(self, error: RayError, group: int) -> bool:
        """Whether an actor lives and cannot open its shards; a wrong request is raised."""
        known = unwrap(error)
        if isinstance(known, RequestError):
            raise known from error
        log("shards do not answer", "warning", group=group, error=str(known).strip().partition("\n")[0])
        return not isinstance(error, RayActorError)

    def stop(self) -> None:
        """End all actors of the service."""
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(f"{self.name}:"):
                ray.kill(ray.get_actor(entry["name"], NAMESPACE))


class FleetIndex:
    """A version of an index that actors hold; answers are those of one `Index`, ties and filters too."""

    def __init__(
        self, fleet: Fleet, head: Version, groups: Sequence[Group], actors: Sequence[Sequence[Any]],
        opened: Sequence[Opened],
    ) -> None:  # fmt: skip
        self._fleet, self._groups, self._actors, self._version = fleet, groups, actors, head.number
        self._schema = pa.unify_schemas([one.schema for one in opened], promote_options="permissive")
        names = {field.name: str(field.type) for field in self._schema}
        self.facts = replace(opened[0].facts, rows=head.rows, shards=len(head.shards), attributes=names)

    def search(self, codes: Codes, k: int, where: str | None) -> Nearest:
        """As `Searchable.search`."""
        shared = ray.put(codes) if codes.nbytes > 1 << 16 else codes
        schema = None if where is None else self._schema
        answers = self._fleet.ask(
            self._actors, lambda g, actor: actor.search.remote(self._version, self._groups[g], shared, k, where, schema)
        )
        there, missing = [one for one in answers if one is not None], self._missing(answers)
        if not there:
            return Nearest(np.full((len(codes), k), None, object), np.full((len(codes), k), -1, np.int32), missing)
        return merge_nearest(there, missing)

    def describe(self, ids: Sequence[str], near: Codes | None) -> Described:
        """As `Searchable.describe`."""
        answers = self._fleet.ask(
            self._actors, lambda g, actor: actor.describe.remote(self._version, self._groups[g], list(ids), near)
        )
        rows = {row_id: row for answer in answers if answer is not None for row_id, row in answer.items()}
        return Described(rows, self._missing(answers))

    def _missing(self, answers: Sequence[Any | None]) -> int:
        """How many shards there are in groups that did not answer."""
        return sum(len(group) for group, one in zip(self._groups, answers, strict=True) if one is None)
