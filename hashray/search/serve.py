"""[Ray] `hashray serve`: in this process where the index fits, else on Ray Serve, with a fleet where it does not.

`application` is what a RayService names in its `import_path` (cluster/rayservice.yaml).
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve as ray_serve

from hashray.artifact import canonical, sha256_hex
from hashray.config import validate
from hashray.engine.session import connect, runs_here
from hashray.index.log import newest, read_version
from hashray.search.app import create_app
from hashray.search.fleet import Fleet
from hashray.search.local import announce, listen, serve_here
from hashray.search.opening import Follower, ServeConfig, open_service
from hashray.storage import open_store

NAME = "hashray"
LEAVE_S = 30
LANES = 4  # batches that wait for the fleet at a time
GIB = 1 << 30
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


def serve(config: ServeConfig) -> int:
    """Answer requests until SIGTERM or Ctrl-C; requests at work are answered first.

    Raises:
        InputError, MismatchError, CorruptArtifact: as `open_service`. ConfigError: the address is taken.
    """
    small = fits(config) and config.fleet.replicas == config.fleet.proxies == 1
    if runs_here(config.fleet.ray, short=small):
        return serve_here(config)
    return _serve_on_ray(config)


def fits(config: ServeConfig) -> bool:
    """Whether one process may hold the codes and ids of every index."""
    size_bytes = 0
    for url in filter(None, (config.index, config.compare)):
        store = open_store(url)
        head = newest(store) if config.version is None or url != config.index else read_version(store, config.version)
        size_bytes += sum(shard.codes.bytes + shard.ids.bytes for shard in head.shards)
    return size_bytes <= config.fleet.memory_gib * GIB


def application(args: ServeConfig | dict[str, Any]) -> Any:
    """The Ray Serve application of a service; every process of it asks the same actors.

    Args:
        args: the config, or its fields, as a RayService's YAML has them.

    Raises:
        ConfigError: a field does not validate.
    """
    config = args if isinstance(args, ServeConfig) else validate(ServeConfig, args, "the application's args")
    return _application(config, _fleet(config))


def _application(config: ServeConfig, fleet: Fleet | None) -> Any:
    token = config.hosts.token()  # read here: the file or the variable may not be where a replica runs

    def build() -> FastAPI:
        service = open_service(config) if fleet is None else open_service(config, fleet.open, LANES)
        Follower(service, config.poll_s).__enter__()  # it ends with the process
        return create_app(service, config.hosts, token, names=False)

    limits = config.limits
    deployment: Any = ray_serve.deployment(
        ray_serve.ingress(build)(),
        name="search",
        num_replicas=config.fleet.proxies,
        # The service itself refuses what is too much, with 429; what gets past this waits in Ray's proxy.
        max_ongoing_requests=4 * limits.queries,
        max_queued_requests=limits.queries,
        graceful_shutdown_timeout_s=LEAVE_S,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": 1},
        logging_config=QUIET,
    )
    return deployment.bind()


def _fleet(config: ServeConfig) -> Fleet | None:
    """The actors of the service; None where its processes hold the index themselves."""
    if fits(config) and config.fleet.replicas == 1:
        return None
    name = sha256_hex(canonical(config.model_dump(mode="json", include={"index", "compare", "port"})))[:12]
    most_bytes, wait_s = int(config.fleet.memory_gib * GIB), config.limits.timeout_s / 2
    return Fleet(name, most_bytes, config.fleet.replicas, config.fleet.cpus_per_holder, wait_s, config.fleet.partial)


def _serve_on_ray(config: ServeConfig) -> int:
    """Run the application until a signal comes; then let it drain, and end its actors."""
    with listen(config) as probe:
        config = config.model_copy(update={"port": probe.getsockname()[1]})
    connect()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    location = "HeadOnly" if config.fleet.listen_at == "head" else "EveryNode"
    options = {"host": config.host, "port": config.port, "location": location, "request_timeout_s": None}
    fleet, ended, before = _fleet(config), threading.Event(), {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda *_: ended.set())
    try:
        ray_serve.start(http_options=options, logging_config=QUIET)
        ray_serve.run(_application(config, fleet), name=NAME, route_prefix="/")
        announce(config, config.port)
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ray_serve.shutdown()
        if fleet is not None:
            fleet.stop()
        ray.shutdown()
    return 0
