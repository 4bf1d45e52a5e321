"""Clients of the service in a process of their own: python service_load.py PORT FILE, until it is ended.

Each answer is a line of JSON: the status (0: no connection), the version, the ids, the milliseconds.
"""

from __future__ import annotations

import http.client
import json
import signal
import sys
import threading
import time
from typing import Any

CLIENTS, K, CODES = 4, 7, 8


def client(port: int, number: int, sink: Any, lock: threading.Lock) -> None:
    """Ask without end; write down each answer, or the error of the connection."""
    connection, turn = http.client.HTTPConnection("127.0.0.1", port, timeout=60), number
    while True:
        turn += 1
        code = turn % CODES
        body = json.dumps({"code": f"{code * 31:02x}" * 2, "k": K})
        start_s, seen = time.perf_counter(), {"code": code}
        try:
            connection.request("POST", "/search", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            seen["status"] = answer.status
            if answer.status == 200:
                whole = json.loads(text)
                seen |= {"version": whole["version"], "ids": [hit["id"] for hit in whole["hits"]]}
                seen["degraded"] = whole["degraded"]
        except (OSError, http.client.HTTPException) as error:
            seen |= {"status": 0, "error": repr(error)}
            connection.close()
        seen["ms"] = (time.perf_counter() - start_s) * 1e3
        with lock:
            sink.write(json.dumps(seen) + "\n")
            sink.flush()


if __name__ == "__main__":
    with open(sys.argv[2], "w") as shared:  # noqa: PTH123
        writing = threading.Lock()
        for each in range(CLIENTS):
            threading.Thread(target=client, args=(int(sys.argv[1]), each, shared, writing), daemon=True).start()
        signal.pause()
