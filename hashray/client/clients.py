"""The client that waits and the one that is awaited; the sending and the waiting is all in which they differ."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from hashray.client.attempts import Attempts, Reply
from hashray.client.calls import (
    Answer,
    Call,
    Options,
    Query,
    ServiceVersion,
    batch_call,
    image_call,
    search_call,
    version_call,
)
from hashray.errors import InputError, ServiceUnavailable

if TYPE_CHECKING:
    from types import TracebackType

    from hashray.client.calls import Code, Target

T = TypeVar("T")


class _Base:
    """What both clients share: the settings and the calls."""

    def __init__(self, url: str, token: str | None, timeout_s: float, retries: int) -> None:
        try:
            parts = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            text = str(url).rpartition("@")[2][:200]  # a password may stand before it
            raise InputError(f"{text!r} is not the url of a service: {error}; expected http://host:port") from None
        if parts.userinfo or parts.query or parts.fragment:
            raise InputError(f"the url of {parts.host} has a user, ? or #: expected http://host:port, and token=…")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise InputError(f"{url!r} is not the url of a service: expected http://host:port or https://…")
        if not timeout_s > 0 or retries < 0:
            raise InputError(f"timeout_s = {timeout_s}, retries = {retries}: expected more than 0 s, and 0 or more")
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        token = (token or "").strip()  # of a file it ends with a line feed
        if not token.isprintable():  # httpx would name it in its error
            raise InputError("the token has a line feed or another control character inside")
        self._settings: dict[str, Any] = {"headers": {"Authorization": f"Bearer {token}".encode()} if token else {}}

    def _request(self, http: httpx.Client | httpx.AsyncClient, call: Call[Any]) -> httpx.Request:
        # One id for all tries of a call: the service's log lines of a call are searched by it.
        headers = {"X-Request-ID": uuid.uuid4().hex}
        try:
            return http.build_request(call.method, self.url + call.path, headers=headers, **call.arguments)
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError(f"the request cannot be sent: {error}") from error

    def _read(self, call: Call[T], reply: Reply) -> T:
        try:
            return call.read(reply.body)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ServiceUnavailable(
                f"{self.url}{call.path} answered {reply.body[:80]!r}, which is no answer of hashray serve "
                f"({type(error).__name__}: {error}). Look whether the url is that of the service, and what is between"
            ) from error


class Client(_Base):
    """A client that waits for each answer; threads may share it.

    Args:
        url: of the service, http://host:port.
        token: of a service that asks for one.
        timeout_s: seconds for a call with all its retries. A server that sends its answer byte by byte may take twice
            that.
        retries: further tries where the connection fails or the answer is 429, 502, 503 or 504. The waits double from
            0.1 s, with jitter, and are never shorter than the service's Retry-After.
        sleep: waits some seconds between tries. now: the clock of the deadline, in seconds.

    Raises:
        InputError: the url is none.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 10.0,
        retries: int = 4,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(url, token, timeout_s, retries)
        self._sleep, self._now, self._http = sleep, now, httpx.Client(**self._settings)

    def search(
        self,
        query: Target | None = None,
        *,
        id: str | None = None,
        path: str | Path | None = None,
        code: Code | None = None,
        k: int = 10,
        offset: int = 0,
        within: int | None = None,
        where: str | None = None,
        version: int | None = None,
        index: str = "main",
    ) -> Answer:
        """Return the nearest rows of one query, given as exactly one of `query`, `id`, `path` and `code`.

        Args:
            query: a PIL image, the bytes of an image file, a `Path`, or a str. A str is the path of an image where
                such a file exists here, else an id; `id` and `path` leave no doubt.
            id: an id in the index; its neighbours are wanted, itself included.
            path: an image file on this machine.
            code: a packed code: hexadecimal text, bytes, or uint8 [num_bits // 8].
            k: neighbours wanted.
            offset: neighbours to leave out, nearest first.
            within: only rows up to this distance in bits.
            where: only rows for which this is true, such as "class == 'cat'".
            version: of the index; None: the newest.
            index: "main", or "compare" where the service has a second index.

        Raises:
            InputError: not exactly one query, or a file that cannot be read. RequestError: the service refused the
            request; its text says why. ServiceUnavailable: no answer in time, after all retries.
        """
        options = Options(k, offset, within, where, version, index)
        return self._send(search_call(Query(query, id, path, code), options))

    def search_batch(
        self,
        queries: Sequence[Target | Query],
        k: int = 10,
        offset: int = 0,
        within: int | None = None,
        where: str | None = None,
        version: int | None = None,
        index: str = "main",
    ) -> list[Answer]:
        """Return the answer to each query, in their order; one request, so the service's limits hold for all together.

        Args:
            queries: each as `query` of `search`, or a `Query` that names what it is.
            k, offset, within, where, version, index: as for `search`, the same for all.

        Raises:
            As `search`.
        """
        return self._send(batch_call(queries, Options(k, offset, within, where, version, index)))

    def image(self, id: str, size: int = 256) -> bytes:
        """Return a row's image as a JPEG or PNG of `size` pixels (16 to 1024, longest side); 0: the original bytes.

        Raises:
            As `search`; RequestError too where the service has no such image.
        """
        return self._send(image_call(id, size))

    def version(self) -> ServiceVersion:
        """Return what the service serves.

        Raises:
            As `search`.
        """
        return self._send(version_call())

    def ready(self) -> bool:
        """Return whether the service answers queries now. One try; False too where nothing can be reached."""
        try:
            return self._http.get(self.url + "/ready", timeout=self.timeout_s).is_success
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        attempts = Attempts(self.url, self.timeout_s, self.retries, self._now)
        request = self._request(self._http, call)
        while True:
            outcome: Reply | httpx.HTTPError
            try:
                outcome = self._try(request, attempts)
            except httpx.HTTPError as error:
                outcome = error
            wait_s = attempts.wait_s(outcome)
            if wait_s is None and isinstance(outcome, Reply):
                return self._read(call, outcome)
            self._sleep(wait_s or 0.0)

    def _try(self, request: httpx.Request, attempts: Attempts) -> Reply:
        request.extensions["timeout"] = httpx.Timeout(attempts.left_s()).as_dict()
        response = self._http.send(request, stream=True)
        try:
            body = bytearray()
            for chunk in response.iter_bytes():
                attempts.left_s()  # httpx allows the timeout for each chunk, this allows it for all
                body += chunk
            return Reply(response.status_code, response.headers, bytes(body))
        finally:
            response.close()


class AsyncClient(_Base):
    """`Client` for asyncio: the same arguments and methods, each awaited; one event loop may share it.

    Args:
        url, token, timeout_s, retries, sleep, now: as for `Client`; `sleep` is awaited.

    Raises:
        InputError: the url is none.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 10.0,
        retries: int = 4,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(url, token, timeout_s, retries)
        self._sleep, self._now, self._http = sleep, now, httpx.AsyncClient(**self._settings)

    async def search(
        self,
        query: Target | None = None,
        *,
        id: str | None = None,
        path: str | Path | None = None,
        code: Code | None = None,
        k: int = 10,
        offset: int = 0,
        within: int | None = None,
        where: str | None = None,
        version: int | None = None,
        index: str = "main",
    ) -> Answer:
        """As `Client.search`."""
        options = Options(k, offset, within, where, version, index)
        return await self._send(search_call(Query(query, id, path, code), options))

    async def search_batch(
        self,
        queries: Sequence[Target | Query],
        k: int = 10,
        offset: int = 0,
        within: int | None = None,
        where: str | None = None,
        version: int | None = None,
        index: str = "main",
    ) -> list[Answer]:
        """As `Client.search_batch`."""
        return await self._send(batch_call(queries, Options(k, offset, within, where, version, index)))

    async def image(self, id: str, size: int = 256) -> bytes:
        """As `Client.image`."""
        return await self._send(image_call(id, size))

    async def version(self) -> ServiceVersion:
        """As `Client.version`."""
        return await self._send(version_call())

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return (await self._http.get(self.url + "/ready", timeout=self.timeout_s)).is_success
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        attempts = Attempts(self.url, self.timeout_s, self.retries, self._now)
        request = self._request(self._http, call)
        while True:
            outcome: Reply | httpx.HTTPError
            try:
                outcome = await self._try(request, attempts)
            except httpx.HTTPError as error:
                outcome = error
            wait_s = attempts.wait_s(outcome)
            if wait_s is None and isinstance(outcome, Reply):
                return self._read(call, outcome)
            await self._sleep(wait_s or 0.0)

    async def _try(self, request: httpx.Request, attempts: Attempts) -> Reply:
        request.extensions["timeout"] = httpx.Timeout(attempts.left_s()).as_dict()
        response = await self._http.send(request, stream=True)
        try:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                attempts.left_s()
                body += chunk
            return Reply(response.status_code, response.headers, bytes(body))
        finally:
            await response.aclose()
