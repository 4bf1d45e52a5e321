"""A connection of the service: what a client sends before a request is whole has a size and a time. No Ray.

uvicorn limits neither: 200 MB of headers stayed in memory, and a connection that never sends stayed open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 << 10  # of the line and the headers of a request
HEAD_S = 30.0  # without a request at work


class Connection(HttpToolsProtocol):
    """Closes a connection that sends a head without end, or no whole head in time."""

    head_s = HEAD_S

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0  # that came since the last head, or piece of a body
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse a head that is too long."""
        self._head_bytes += len(data)
        super().data_received(data)
        self._watch()
        if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            if self._is_busy():
                self.transport.close()
            else:
                self.send_400_response(f"The head of the request has more than {HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body, whose size and time the guard watches."""
        self._head_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """An answer is sent: wait for the next request, or for the rest of a body that nobody reads."""
        super().on_response_complete()
        self._watch()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        if self._is_busy():
            self._forget()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.head_s, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
