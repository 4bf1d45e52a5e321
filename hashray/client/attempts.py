"""When a request is sent again: after a lost connection or a busy server, with growing waits, before a deadline."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from hashray.errors import RequestError, ServiceUnavailable

RETRIED = {429, 502, 503, 504}
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0


@dataclass(frozen=True)
class Reply:
    """What a server answered, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Attempts:
    """Decides after each try of a request: it is answered, it has failed, or it is sent again after a wait.

    Args:
        url: what the texts of errors name.
        timeout_s: seconds for all tries and waits together.
        retries: tries after the first.
        now: a clock in seconds.
    """

    def __init__(self, url: str, timeout_s: float, retries: int, now: Callable[[], float]) -> None:
        self.url, self.timeout_s, self.retries, self.now = url, timeout_s, retries, now
        self.start_s, self.tries = now(), 0

    def left_s(self) -> float:
        """Seconds until the deadline.

        Raises:
            httpx.ReadTimeout: none are left.
        """
        left_s = self.start_s + self.timeout_s - self.now()
        if left_s <= 0:
            raise httpx.ReadTimeout(f"no whole answer in {self.timeout_s:g} s")
        return left_s

    def wait_s(self, outcome: Reply | httpx.HTTPError) -> float | None:
        """Return seconds to wait before the next try, or None where `outcome` is a good answer.

        Raises:
            RequestError: the server refused the request. ServiceUnavailable: no further try makes sense.
        """
        self.tries += 1
        asked_s = 0.0
        if isinstance(outcome, Reply):
            if 200 <= outcome.status < 300:
                return None
            if 400 <= outcome.status < 500 and outcome.status not in RETRIED:
                raise RequestError(f"{self.url} refused the request ({outcome.status}): {said(outcome)}")
            why, again = f"answered {outcome.status}: {said(outcome)}", outcome.status in RETRIED
            asked_s = _seconds(outcome.headers.get("retry-after", ""))
        else:
            why = f"does not answer: {outcome or type(outcome).__name__}"
            again = isinstance(outcome, httpx.TransportError) and not isinstance(outcome, httpx.UnsupportedProtocol)
        longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self.tries - 1))
        wait_s = asked_s + random.uniform(0.5, 1.0) * longest_s  # clients that fail together do not return together
        spent_s = self.now() - self.start_s
        if not again or self.tries > self.retries or spent_s + wait_s >= self.timeout_s:
            raise ServiceUnavailable(
                f"{self.url} {why} ({self.tries} {'try' if self.tries == 1 else 'tries'} in {spent_s:.1f} of "
                f"{self.timeout_s:g} s). Look whether hashray serve runs there and what its log says; a longer "
                "timeout_s and more retries wait longer for it"
            ) from (outcome if isinstance(outcome, httpx.HTTPError) else None)
        return wait_s


def said(reply: Reply) -> str:
    """The server's text about an error, with the id of the request where it gives one."""
    try:
        answer = json.loads(reply.body)
        text = str(answer["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        place = f" (it redirects to {reply.headers['location']})" if "location" in reply.headers else ""
        return (reply.body[:200].decode("utf-8", "replace").strip() or "an empty body") + place
    return f"{text} (request {answer['request_id']})" if answer.get("request_id") else text


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header; 0 for one that gives a date, or none.

    >>> _seconds("3"), _seconds("Wed, 21 Oct 2026 07:28:00 GMT"), _seconds("")
    (3.0, 0.0, 0.0)
    """
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
