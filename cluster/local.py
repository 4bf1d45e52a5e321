"""A cluster of several Ray nodes on this machine, with an S3 server beside it, to try the submit lines.

    python cluster/local.py up --nodes 4 --s3      a head without CPUs, four nodes of one CPU, a bucket s3://hashray
    python cluster/local.py add                    one more node
    python cluster/local.py remove n2              ends a node as Kubernetes does: SIGTERM, and Ray drains it first
    python cluster/local.py kill n1                ends a node as a power cut does: SIGKILL for all its processes
    python cluster/local.py status                 the nodes, and what to export
    python cluster/local.py down                   ends what `up` and `add` started, and nothing else

What to export goes to standard output, for `eval "$(python cluster/local.py up)"`; the rest to standard error.

A node is a process of its own session, and what it starts stays in that session, so its id finds all of them, also
after a crash. The start time of a session's first process, or a variable in the environment of another, proves that
the session is the one that was started: a reused id is never killed. The state is one file, <state>/cluster.json. All
ports are on the loopback address, and Ray asks for a token, which is in that file.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil

LOOPBACK = "127.0.0.1"
MARK = "HASHRAY_LOCAL_CLUSTER"
BUCKET = "hashray"
READY = "joined"  # a file that a node writes
LONGEST_FOLDER = 44  # of a node: Ray adds 63 characters, and the path of a Unix socket ends at 107
START_S, END_S, POLL_S, CLOCK_S = 180, 60, 0.1, 2
DRAIN_S = 10  # a node that is removed may finish what it does for so long
KEY, REGION = "testing", "us-east-1"  # of the S3 server, which takes any


class ClusterError(Exception):
    """A request that cannot be met."""


@dataclass
class Member:
    """A node or the S3 server, as the first process of its session."""

    name: str
    pid: int
    start_s: float  # since the epoch, as psutil gives it
    cpus: float = 0.0
    state: str = "up"  # or how it ended: "killed", "removed"


@dataclass
class State:
    """What the state file holds."""

    cluster: str
    token: str
    port: int
    dashboard_port: int
    object_store_bytes: int
    s3_endpoint: str = ""
    members: list[Member] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """What a client must export. Ray's name for the last one is odd: with 0 its processes use the loopback."""
        out = {
            "RAY_ADDRESS": f"{LOOPBACK}:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{self.dashboard_port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY, "AWS_DEFAULT_REGION": REGION}
        return out | ({"AWS_ENDPOINT_URL": self.s3_endpoint} | keys if self.s3_endpoint else {})

    def nodes(self) -> dict[str, Member]:
        """The worker nodes that were started and not ended, by name."""
        return {m.name: m for m in self.members if m.state == "up" and m.name.startswith("n")}

    def node(self, name: str) -> Member:
        """The worker node of this name."""
        if name not in self.nodes():
            raise ClusterError(f"no node {name!r} is up; up are: {', '.join(self.nodes()) or 'none'}")
        return self.nodes()[name]


class Cluster:
    """The cluster whose state is in a folder, which one command at a time may change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "cluster.json"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let other commands on this folder wait until the block has ended."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise ClusterError(f"{self.folder} is another user's; name a folder: --state DIR")
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self) -> State:
        """The state of the running cluster."""
        if not self.file.exists():
            raise ClusterError(f"no cluster is up in {self.folder}; start one: python cluster/local.py up")
        raw = json.loads(self.file.read_text())
        try:
            return State(**raw | {"members": [Member(**member) for member in raw["members"]]})
        except TypeError as error:
            raise ClusterError(f"another version of this file wrote {self.file}: use that one ({error})") from error

    def write(self, state: State) -> None:
        """Keep a state; a crash leaves the one before or this one."""
        new = self.file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(json.dumps(asdict(state), indent=1))
        new.replace(self.file)

    def up(self, nodes: int, cpus: float, head_cpus: float, s3: bool, object_store_bytes: int) -> State:
        """Start a head, `nodes` worker nodes and, if wanted, the S3 server; undo it all where one does not start."""
        if self.file.exists():
            raise ClusterError(
                f"a cluster is up already in {self.folder}: use it (python cluster/local.py status), end it first "
                "(python cluster/local.py down), or start another one in another folder (--state DIR)"
            )
        if (length := len(str(self.folder / "head"))) > LONGEST_FOLDER:
            raise ClusterError(
                f"{self.folder / 'head'} has {length} characters, the sockets of Ray allow {LONGEST_FOLDER}; "
                "name a shorter folder: --state /tmp/c"
            )
        state = State(secrets.token_hex(8), secrets.token_hex(16), free_port(), free_port(), object_store_bytes)
        self.write(state)
        try:
            if s3:
                self._start_s3(state)
            self._start_nodes(state, [("head", head_cpus)])
            self.add(cpus, nodes)
        except BaseException:
            self.down()
            raise
        return self.read()

    def add(self, cpus: float, count: int = 1) -> list[str]:
        """Start more worker nodes; return their names."""
        state = self.read()
        first = sum(member.name.startswith("n") for member in state.members) + 1
        names = [f"n{number}" for number in range(first, first + count)]
        self._start_nodes(state, [(name, cpus) for name in names])
        return names

    def kill(self, name: str, how: str = "killed") -> None:
        """End a worker node with SIGKILL: it says nothing to anybody."""
        state = self.read()
        end_all(state.cluster, [state.node(name)])
        state.node(name).state = how
        self.write(state)

    def remove(self, name: str) -> None:
        """End a worker node with SIGTERM: Ray drains it, and ends it when its work is done or after DRAIN_S."""
        member = self.read().node(name)
        if is_running(member):
            process = psutil.Process(member.pid)
            process.terminate()
            psutil.wait_procs([process], timeout=DRAIN_S + END_S)
        self.kill(name, "removed")

    def down(self) -> int:
        """End everything that was started here; return how many processes that were."""
        state = self.read()
        count = end_all(state.cluster, state.members)
        for member in state.members:
            shutil.rmtree(self.folder / member.name, ignore_errors=True)
        self.file.unlink()
        return count

    def _start_s3(self, state: State) -> None:
        port = free_port()
        state.s3_endpoint = f"http://{LOOPBACK}:{port}"
        words = [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)]
        probe = (LOOPBACK, port)
        self._wait(self._start(state, "s3", words), lambda: socket.socket().connect_ex(probe) == 0)
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": KEY}
        boto3.client("s3", REGION, endpoint_url=state.s3_endpoint, **keys).create_bucket(Bucket=BUCKET)

    def _start_nodes(self, state: State, wanted: Sequence[tuple[str, float]]) -> None:
        """Start nodes at the same time, and wait until each has joined."""
        started = []
        for name, cpus in wanted:
            # In a folder of its own: of one that it shares, a node deletes the jobs' files at its end.
            options: dict[str, Any] = {
                "node_ip_address": LOOPBACK, "temp_dir": str(self.folder / name), "num_cpus": cpus, "num_gpus": 0,
                "object_store_memory": state.object_store_bytes, "min_worker_port": 0, "max_worker_port": 0,
                "dashboard_agent_listen_port": free_port(), "node_name": name, "resources": {name: 1},
            }  # fmt: skip
            options |= (
                {"gcs_server_port": state.port, "include_dashboard": True, "dashboard_port": state.dashboard_port}
                if name == "head"
                else {"gcs_address": f"{LOOPBACK}:{state.port}", "include_log_monitor": False}
            )
            words = [sys.executable, str(Path(__file__).resolve()), "serve-node", json.dumps(options)]
            started.append((self._start(state, name, words, cpus), words))
        for member, words in started:
            ready = (self.folder / member.name / READY).exists
            try:
                self._wait(member, ready)
            except ClusterError:  # Ray gives up after 30 s, which a busy machine may need
                end_all(state.cluster, [member])
                state.members.remove(member)
                self._wait(self._start(state, member.name, words, member.cpus), ready)

    def _start(self, state: State, name: str, words: list[str], cpus: float = 0.0) -> Member:
        """Start the first process of a session, and keep its id at once."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=node_environment(state, name) | {"RAY_TMPDIR": str(folder)},
            )  # fmt: skip
        member = Member(name, process.pid, psutil.Process(process.pid).create_time(), cpus)
        state.members.append(member)
        self.write(state)
        return member

    def _wait(self, member: Member, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_S
        while not ready():
            if time.monotonic() > end or not is_running(member):
                log = (self.folder / member.name / "log").read_text(errors="replace")[-3000:]
                raise ClusterError(f"{member.name} does not start; its log ends with:\n{log}")
            time.sleep(POLL_S)


def node_environment(state: State, name: str) -> dict[str, str]:
    """The environment of a node's processes: ours, without what belongs to another cluster, account or checkout."""
    drop = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "RAY_JOB_", "RAY_TMPDIR", "AWS_", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    client = {key: value for key, value in state.environment().items() if key != "RAY_ADDRESS"}
    # The `python` of a job is the one that runs this.
    return kept | client | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
        "AWS_EC2_METADATA_DISABLED": "true", MARK: f"{state.cluster}/{name}",
    }  # fmt: skip


def serve_node(options: dict[str, Any]) -> None:
    """Be a Ray node until SIGTERM, or until one of its processes has died.

    `ray start` opens every port to the network on Linux. These are the classes that it uses.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.utils import write_ray_address

    node = Node(RayParams(**options), head="gcs_server_port" in options, shutdown_at_exit=True, spawn_reaper=True)
    write_ray_address(node.gcs_address, options["temp_dir"])  # or a job joins any cluster of this machine
    (Path(options["temp_dir"]) / READY).touch()
    while not node.dead_processes():
        time.sleep(1)
    raise SystemExit(f"processes of the node have died: {[name for name, _ in node.dead_processes()]}")


def is_running(member: Member) -> bool:
    """Whether the first process of a session is alive: the process that was started, not another of the same id."""
    try:
        process = psutil.Process(member.pid)
        # A clock that is set right moves all start times by a little.
        same = abs(process.create_time() - member.start_s) < CLOCK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(cluster: str, members: Sequence[Member]) -> list[psutil.Process]:
    """Every process of some members, and of the jobs that were submitted to them, which have sessions of their own."""
    marks = {f"{cluster}/{member.name}": member for member in members}
    sessions: dict[int, list[psutil.Process]] = {member.pid: [] for member in members}
    proven = {member.pid for member in members if is_running(member)}
    out: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            session = os.getsid(process.pid)
            mark = process.environ().get(MARK)
        except (psutil.Error, OSError):  # it has ended, or is not ours
            continue
        if mark in marks:  # Ray's workers have a title over their environment, and no mark
            out[process.pid] = process
            proven |= {session} & {marks[mark].pid}
        if session in sessions:
            sessions[session].append(process)
    for session in proven:
        out |= {process.pid: process for process in sessions[session]}
    return [process for process in out.values() if process.pid != os.getpid()]


def end_all(cluster: str, members: Sequence[Member]) -> int:
    """SIGKILL every process of some members, until none is left; return how many those were."""
    ended: set[int] = set()
    end = time.monotonic() + END_S
    while processes := processes_of(cluster, members):
        if time.monotonic() > end:
            raise ClusterError(f"processes do not end: {[process.pid for process in processes]}")
        # The first process of a node before those that it would start again.
        for process in sorted(processes, key=lambda process: process.create_time()):
            try:
                process.send_signal(signal.SIGKILL)
                ended.add(process.pid)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=POLL_S * 10)
    return len(ended)


def free_port() -> int:
    """A port of the loopback that nothing listens at now."""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        return int(taken.getsockname()[1])


def show(state: State) -> None:
    """Print the nodes on standard error, what to export on standard output."""
    for member in state.members:
        alive = member.state if member.state != "up" or is_running(member) else "ended by itself"
        cpus = "" if member.name == "s3" else f"  {member.cpus:g} CPUs"
        print(f"# {member.name:<5} pid {member.pid:<8} {alive}{cpus}", file=sys.stderr)
    for name, value in state.environment().items():
        print(f"export {name}={value}")
    out = f"s3://{BUCKET}/corpus" if state.s3_endpoint else "/tmp/corpus"
    print("# Then, for a folder of images with one folder a class:", file=sys.stderr)
    print(f"#   ray job submit --working-dir . -- python jobs/ingest.py IMAGES --out {out}", file=sys.stderr)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(tempfile.gettempdir()) / f"hashray-cluster-{os.getuid()}"
    parser.add_argument("--state", type=Path, default=folder, metavar="DIR", help=f"default: {folder}")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster")
    up.add_argument("--nodes", type=int, default=2, help="worker nodes (default 2)")
    up.add_argument("--cpus", type=float, default=1, help="logical CPUs of each worker node (default 1)")
    up.add_argument("--head-cpus", type=float, default=0, help="logical CPUs of the head (default 0)")
    up.add_argument("--s3", action="store_true", help=f"start an S3 server with the bucket {BUCKET}")
    up.add_argument("--object-store-mib", type=int, default=200, help="shared memory of each node (default 200)")
    commands.add_parser("add", help="add a worker node").add_argument("--cpus", type=float, default=1)
    for name, what in (("kill", "SIGKILL a worker node"), ("remove", "drain and end a worker node")):
        commands.add_parser(name, help=what).add_argument("node", help="its name, as `status` shows it")
    for name, what in (("status", "show the nodes and what to export"), ("down", "end the cluster")):
        commands.add_parser(name, help=what)
    commands.add_parser("serve-node").add_argument("options", type=json.loads)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command."""
    wanted = parsed(words)
    if wanted.command == "serve-node":
        serve_node(wanted.options)
    cluster, start_s = Cluster(wanted.state.absolute()), time.monotonic()
    try:
        with cluster.changing():
            if wanted.command == "up":
                options = wanted.nodes, wanted.cpus, wanted.head_cpus, wanted.s3, wanted.object_store_mib << 20
                show(cluster.up(*options))
                print(f"# up in {time.monotonic() - start_s:.0f} s", file=sys.stderr)
            elif wanted.command == "status":
                show(cluster.read())
            elif wanted.command == "down":
                print(f"# ended {cluster.down()} processes", file=sys.stderr)
            elif wanted.command == "add":
                print(f"# {cluster.add(wanted.cpus)[0]} is up", file=sys.stderr)
            else:
                (cluster.kill if wanted.command == "kill" else cluster.remove)(wanted.node)
                print(f"# {wanted.node} is gone", file=sys.stderr)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
