"""[Ray] Joining or starting Ray, and the size of a pool of workers."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import socket
import tempfile
from typing import Any, Literal

import grpc
import ray
from pydantic import Field
from ray.exceptions import RayTaskError

from hashray.config import Config
from hashray.errors import HashrayError, InputError, RunError
from hashray.progress import say

# A worker must look for objects where the driver does; credentials come from the node, never from here.
CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", *CHECKSUMS)
API_SERVER, NOBODY = "RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9"
CONNECT_TIMEOUT_S = 10
LONGEST_TEMP_PATH = 35  # Ray adds some 70 characters to it, and a Unix socket's path ends at 107
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


class WorkersConfig(Config):
    """How many workers, and what each of them takes."""

    workers: int | None = Field(None, ge=1, description="Most workers at a time; unset: one a CPU or GPU")
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs of each worker")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each worker; above 0 the trunk runs there")
    ray: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether workers are Ray's; auto: short work on one machine runs in this process"
    )

    def runs_here(self, short: bool) -> bool:
        """Whether work runs in this process: where it is `short` and no cluster is joined, or if `ray` is "never"."""
        return runs_here(self.ray, short)

    def most(self) -> int:
        """The largest useful pool on the cluster as it is now, at least 1."""
        if self.workers is not None:
            return self.workers
        total = ray.cluster_resources()
        if not self.gpus_per_worker and is_local():
            # A local instance counts more logical CPUs than there are cores; more workers than cores only wait.
            total = {**total, "CPU": min(total.get("CPU", 1), os.cpu_count() or 1)}
        return max(1, _workers_in(total, self.cpus_per_worker, self.gpus_per_worker))


def runs_here(choice: Literal["auto", "always", "never"], short: bool) -> bool:
    """Whether work runs in this process, without Ray: by choice, or where it is short and no cluster is joined."""
    if choice != "auto":
        return choice == "never"
    return short and not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def require_room(cpus: float, gpus: float, at_once: int = 1) -> None:
    """Fail on one machine that cannot hold the workers, where Ray would wait silently.

    On a cluster, which may scale up, only warn.

    Raises:
        InputError: `at_once` workers, each with these CPUs and GPUs, do not fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if sum(_workers_in(node, cpus, gpus) for node in nodes) >= at_once:
        return
    total = ray.cluster_resources()
    there = f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
    text = f"{at_once} workers of {cpus:g} CPUs and {gpus:g} GPUs each were asked for, and there are {there}"
    if not os.environ.get("RAY_ADDRESS"):
        raise InputError(f"{text} on this machine: ask for fewer, or run on a cluster that has them")
    say(f"note: {text} in {len(nodes)} nodes so far: waiting for the cluster to scale up")


def _workers_in(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """How many workers with these CPUs and GPUs the resources hold; Ray counts them in ten-thousandths."""
    fits = [int(resources.get(name, 0) / each + 1e-6) for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return min(fits, default=1)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), else start Ray on this machine.

    A local instance has at least four logical CPUs: on two, a training run and the pipeline that feeds it
    wait for each other without end.

    Raises:
        RunError: nothing answers at RAY_ADDRESS, or Ray does not start here.
    """
    if ray.is_initialized():
        return
    _spare_checksums()
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if address := os.environ.get("RAY_ADDRESS"):
        _require_listener(address)
        try:
            ray.init(runtime_env={"env_vars": forwarded}, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises its own, gRPC's and built-in errors, by the state of the cluster
            raise RunError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({_first_line(error)}). Start it, or unset it"
            ) from error
    else:
        try:
            start_local(num_cpus=max(4, os.cpu_count() or 1), logging_level=logging.WARNING)
        except Exception as error:  # as above: a socket path that is too long, a time-out, a full disk
            raise RunError(_why_ray_did_not_start(error)) from error
    _quiet_data()


def _require_listener(address: str) -> None:
    """Ask once whether a cluster answers at an address: Ray itself asks for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto", "local": not an address
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            with grpc.insecure_channel(f"{host}:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
    except (OSError, grpc.FutureTimeoutError) as error:
        why = str(error) or "something listens there, but it does not answer"
        text = f"no Ray cluster answers at RAY_ADDRESS={address} ({why}). Start it, or unset RAY_ADDRESS"
        raise RunError(text) from error


def _why_ray_did_not_start(error: Exception) -> str:
    folder = tempfile.gettempdir()
    if "AF_UNIX" in str(error):
        return (
            f"Ray cannot start below TMPDIR={folder}: the path has {len(folder)} characters, Ray's sockets allow "
            f"{LONGEST_TEMP_PATH}. Set TMPDIR to a shorter folder, such as /tmp"
        )
    return (
        f"Ray does not start on this machine ({_first_line(error)}). Another Ray may be starting at the same time, or "
        f"memory or {folder} may be full: check both, then run the same command again"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def start_local(**options: Any) -> None:
    """Start Ray on this machine, without its dashboard; `options` are ray.init's.

    Ray Train asks the dashboard whether its controller is alive. Where there is none, the question looks 40 s for an
    address, and every training waits 12 s of them at its end. An address at which nothing listens answers at once.
    """
    _spare_checksums()
    before = os.environ.get(API_SERVER)
    os.environ.setdefault(API_SERVER, NOBODY)
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)
    finally:
        if before is None:  # Ray's own processes have it now; `ray job submit` from this one would believe it
            del os.environ[API_SERVER]


def _spare_checksums() -> None:
    """Let Arrow's S3 client, which writes Ray Train's checkpoints, send no trailing checksums to servers but Amazon's.

    Ceph RADOS Gateway answers 411 to an upload that has one.
    """
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        for name in CHECKSUMS:
            os.environ.setdefault(name, "when_required")


def keep_memory() -> None:
    """Let glibc keep what this process frees, as `memory_environment` does for a process that starts."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 << 20)):
            mallopt(option, value)


def memory_environment() -> dict[str, str]:
    """The environment of a process that runs a trunk on CPUs: glibc keeps what is freed, in huge pages.

    By default every large tensor of every step is given back to the kernel and faulted in again, page by page: 40 % of
    the time on two cores. Training MobileNetV2 at 128 pixels, batches of 128: 46 images/s without this, 85 to 95 with
    it; inference on one core, batches of 64, for each second of the core: 98 to 102 without, 183 to 201 with it.
    """
    # One tunable only: glibc 2.36 cuts the list after the first for whatever the process starts, and Ray starts through
    # a shell. The others have names of their own.
    wanted = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(256 << 20),
        "MALLOC_ARENA_MAX": "1",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def quicken_on_one_machine() -> None:
    """Where there is one node only, let Ray Train poll its workers more often, and watch for no lost nodes.

    A worker's report waits for the next poll, 2 s apart by default: a short run is nothing but that wait.
    """
    if is_local():
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def is_local() -> bool:
    """Whether Ray runs on this machine alone, started by this process: no node comes or goes."""
    return not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1


def _quiet_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def unwrap(error: BaseException) -> BaseException:
    """The hashray error inside a Ray error, if there is one, else the error itself."""
    seen: BaseException | None = error
    visited: set[int] = set()  # `raise error from error` makes a chain of one that never ends
    while seen is not None and id(seen) not in visited:
        visited.add(id(seen))
        cause = getattr(seen, "cause", None)
        failures = getattr(seen, "worker_failures", {})  # Ray Train's, by rank
        for candidate in (cause, seen, *failures.values()):
            if isinstance(candidate, HashrayError) and not isinstance(candidate, RayTaskError):
                return candidate
        seen = cause or seen.__cause__
    return error
