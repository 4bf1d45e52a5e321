"""The service in this process, by uvicorn. No Ray."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hashray.errors import ConfigError
from hashray.progress import say
from hashray.search.app import create_app
from hashray.search.connections import Connection
from hashray.search.metrics import log
from hashray.search.opening import LOOPBACK, Follower, ServeConfig, open_service
from hashray.search.service import Service

LEAVE_S = 30  # in which requests that are at work may end


def serve_here(config: ServeConfig) -> int:
    """Answer requests until SIGTERM or Ctrl-C; requests at work are answered first."""
    listener = listen(config)
    token = config.hosts.token()
    service = open_service(config)
    app = create_app(service, config.hosts, token)
    with listener, Follower(service, config.poll_s):
        asyncio.run(_Server(settings_of(app), service, config).serve([listener]))
    return 0


def settings_of(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs the app."""
    return uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=LEAVE_S,
        http=Connection, ws="none", loop="uvloop", timeout_keep_alive=30,
    )  # fmt: skip


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens at the config's address.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Without, head and body of an answer wait for each other: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen at {config.host}:{config.port}: {error}. Choose another --port") from error
    return listener


def announce(config: ServeConfig, port: int) -> None:
    """Say where the service is."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    if config.host not in LOOPBACK and config.hosts.token() is None:
        say(f"note: {config.host} is open to the network, and no token is asked for: --token-file FILE sets one")
    say(f"the page: http://{host}:{port}/ (Ctrl-C ends it)")
    log("ready", host=config.host, port=port)


class _Server(uvicorn.Server):
    """uvicorn's server, which says that it ends before it stops to listen, and does not raise the signal again."""

    def __init__(self, settings: uvicorn.Config, service: Service, config: ServeConfig) -> None:
        super().__init__(settings)
        self._service, self._options = service, config

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and only then say so: from here on a signal is handled, and a connection is taken."""
        await super().startup(sockets)
        for listener in sockets or []:
            announce(self._options, listener.getsockname()[1])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT here while the server runs."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain: /ready says 503 for `drain_s`, then requests at work are answered, then the server ends."""
        if self._service.draining or not self._options.drain_s or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
        else:
            asyncio.get_running_loop().call_later(self._options.drain_s, super().handle_exit, sig, frame)
        if not self._service.draining:
            self._service.draining = True
            log("draining", signal=signal.Signals(sig).name)
