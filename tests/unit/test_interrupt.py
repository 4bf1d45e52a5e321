"""An interrupt where Python would drop it: in a callback of a fork, in a finalizer, in the child of a fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAD = """
import os, signal, subprocess, threading
from hashray import interrupt

def press():
    signal.raise_signal(signal.SIGINT)

def wait():
    try:
        threading.Event().wait(60)
        print("lost")
    except KeyboardInterrupt:
        print("interrupted")
"""
PLACES = {
    "after a fork": """
        os.register_at_fork(after_in_parent=press)  # before never_lose, as logging registers its lock's release
        interrupt.never_lose()
        subprocess.run(["true"], preexec_fn=os.getpid)  # with a function to run, Python forks and runs the callbacks
        wait()
    """,
    "before a fork": """
        os.register_at_fork(before=press)
        interrupt.never_lose()
        subprocess.run(["true"], preexec_fn=os.getpid)
        wait()
    """,
    "in a finalizer": """
        class Held:
            def __del__(self):
                press()
        interrupt.never_lose()
        Held()
        wait()
    """,
    "in the child of a fork": """
        interrupt.never_lose()
        if os.fork() == 0:
            try:
                press()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            os._exit(0)
        os.wait()
    """,
    "in plain code": """
        interrupt.never_lose()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        wait()
    """,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_arrives(place: str) -> None:
    code = HEAD + textwrap.dedent(PLACES[place])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "interrupted\n" and done.stderr == ""


def test_other_dropped_errors_are_still_printed() -> None:
    code = HEAD + textwrap.dedent("""
        class Held:
            def __del__(self):
                raise ValueError("dropped")
        interrupt.never_lose()
        Held()
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert "ValueError: dropped" in done.stderr
