"""`hashray serve`: its config, and the service that it opens. No Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from hashray.config import Config
from hashray.data.corpus import open_corpus
from hashray.errors import MismatchError
from hashray.model import Model, load_model
from hashray.search.groups import Groups
from hashray.search.guard import SafetyConfig
from hashray.search.limits import LimitsConfig
from hashray.search.metrics import Metrics, log
from hashray.search.nearest import OpenIndex, Searchable
from hashray.search.pictures import Pictures
from hashray.search.reader import open_version
from hashray.search.served import Served
from hashray.search.service import Service
from hashray.storage import Store, open_store
from hashray.storage.cache import cache_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Opens a version of the index in a store by its number.
Opens = Callable[[Store, int], Searchable]


class FleetConfig(Config):
    """Where the shards are: in the process that answers, or in Ray actors."""

    ray: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether Ray Serve answers; auto: on a cluster, or where the index does not fit here"
    )
    memory_gib: float = Field(4.0, gt=0, description="Most GiB of codes and ids in one process; more take a fleet")
    replicas: int = Field(1, ge=1, description="Actors that hold each shard; 2 or more always take a fleet")
    cpus_per_holder: float = Field(1.0, gt=0, description="Logical CPUs of each actor; it searches with one thread")
    proxies: int = Field(1, ge=1, description="Processes that take requests, encode images and ask the actors")
    listen_at: Literal["head", "every-node"] = Field("every-node", description="Nodes that listen at the port")
    partial: bool = Field(False, description="Answer without shards that do not answer, and say so; unset: 503")


class ServeConfig(Config):
    """Serve an index over HTTP, with a page to search it."""

    index: Annotated[str, tyro.conf.Positional] = Field(description="Index, local folder or s3:// url")
    model: str = Field(description="Model that made the index's codes")
    corpus: str | None = Field(None, description="Corpus of the images, for the page")
    duplicates: str | None = Field(None, description="Duplicates report, for the page")
    compare: str | None = Field(None, description="Second index, to compare the first one with")
    compare_model: str | None = Field(None, description="Model of the second index; unset: the same model")
    version: int | None = Field(None, ge=1, description="Version of the index; unset: always the newest")
    host: str = Field("127.0.0.1", description="Address to listen at; 0.0.0.0: every address of this machine")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0: any free one")
    poll_s: float = Field(2.0, gt=0, description="Seconds between two looks for a newer version")
    drain_s: float = Field(1.0, ge=0, description="Seconds after SIGTERM in which /ready says 503 and queries go on")
    limits: LimitsConfig = LimitsConfig()
    safety: Annotated[SafetyConfig, tyro.conf.arg(name="")] = SafetyConfig()
    fleet: Annotated[FleetConfig, tyro.conf.arg(name="")] = FleetConfig()

    @model_validator(mode="after")
    def _whole(self) -> ServeConfig:
        if self.compare_model is not None and self.compare is None:
            raise ValueError("compare_model is of a second index: give --compare too")
        return self

    @property
    def hosts(self) -> SafetyConfig:
        """Who may ask, with the host names that `host` implies."""
        if self.safety.allowed_hosts or self.host not in LOOPBACK:
            return self.safety
        return self.safety.model_copy(update={"allowed_hosts": ("127.0.0.1", "localhost", "[::1]", "::1")})


def open_here(store: Store, version: int) -> Searchable:
    """Open a version in this process."""
    return OpenIndex(open_version(store, version, cache_folder(None)))


def open_service(config: ServeConfig, opens: Opens = open_here, lanes: int = 1) -> Service:
    """Open everything that the service answers from; what is wrong is said before a request is taken.

    Args:
        opens: where the shards of a version are opened.
        lanes: as for `Service`.

    Raises:
        InputError: something is not there. MismatchError: a model is not its index's. CorruptArtifact: a file is not
            what was published.
    """
    metrics = Metrics()
    model = load_model(config.model)
    indexes = {"main": _follow("main", config.index, opens, metrics, config.version)}
    models = {"main": model}
    if config.compare is not None:
        indexes["compare"] = _follow("compare", config.compare, opens, metrics, None)
        models["compare"] = load_model(config.compare_model) if config.compare_model else model
    for name, served in indexes.items():
        _require_its_model(served, models[name])
    pictures = None
    if config.corpus is not None:
        pictures = Pictures(open_corpus(config.corpus), cache_folder(None), metrics, config.limits.pixels)
    groups = None if config.duplicates is None else Groups(config.duplicates)
    return Service(indexes, models, config.limits, metrics, pictures, groups, config.fleet.partial, lanes)


def _follow(name: str, url: str, opens: Opens, metrics: Metrics, version: int | None) -> Served:
    store = open_store(url)
    return Served(name, store, lambda number: opens(store, number), metrics, version)


def _require_its_model(served: Served, model: Model) -> None:
    facts = served.at().facts
    if facts.num_bits != model.num_bits or facts.fingerprint not in (None, model.fingerprint):
        raise MismatchError(
            f"{served.store.url} holds codes of another model than {model.url}: their bits mean different things; "
            "name the model that the index was made with"
        )


class Follower:
    """A thread that looks for newer versions, while the service runs."""

    def __init__(self, service: Service, poll_s: float) -> None:
        self._service, self._poll_s, self._end = service, poll_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name="hashray-follow", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._poll_s):
            for served in self._service.indexes.values():
                try:
                    served.refresh()
                except Exception as error:  # the thread must go on: the next look may be luckier
                    log("reload failed", "error", index=served.name, error=repr(error))
