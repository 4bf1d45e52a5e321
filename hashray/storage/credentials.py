"""Tokens that expire: a request that is refused with an old one is sent again with its successor.

boto3 asks its provider again some minutes before a token expires, but a token may also expire between that question and
the request, or the server's clock may be ahead. boto3 does not retry such a refusal.
"""

from __future__ import annotations

from typing import Any

# Amazon says 400 to an expired token, others 403; the answer to a HEAD has no more than that.
REFUSALS = (400, 401, 403)
MOST_ATTEMPTS = 10
TOKEN = "hashray-token"


def renew(client: Any, credentials: Any) -> None:
    """Let a boto3 client send a refused request again where its provider has another token than the one it sent.

    Args:
        credentials: of the client's session; None where it has none.
    """

    def signed(request: Any, **_: Any) -> None:
        request.context[TOKEN] = request.headers.get("X-Amz-Security-Token")

    def retry(response: Any, attempts: int, request_dict: Any, **_: Any) -> int | None:
        if response is None or attempts >= MOST_ATTEMPTS:
            return None
        status = response[1].get("ResponseMetadata", {}).get("HTTPStatusCode")
        token = request_dict["context"].get(TOKEN)
        if status not in REFUSALS or token is None or token == credentials.get_frozen_credentials().token:
            return None
        return 0  # seconds

    if credentials is not None:
        client.meta.events.register_last("request-created.s3", signed)  # after the handler that signs it
        client.meta.events.register("needs-retry.s3", retry)
