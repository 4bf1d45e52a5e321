"""Ctrl-C that is never lost: an interrupt that Python would drop comes again a moment later.

Python drops a KeyboardInterrupt that is raised in a callback (a fork's, a finalizer's), and prints it. Ray's start
forks some ten times, and logging has a callback around each fork that takes and releases its lock: an interrupt there
is lost, and leaves the lock taken, so that the next thread that logs waits without end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

AGAIN_S = 0.02
_forking = False


def never_lose() -> None:
    """Raise KeyboardInterrupt in the main thread for each SIGINT, but after a fork, not within it; SIGALRM is taken."""
    signal.signal(signal.SIGALRM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
    sys.unraisablehook = _not_raised


def ignore() -> None:
    """Let no interrupt, late or new, change anything from here on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _forking:
        _again()
    else:
        raise KeyboardInterrupt


def _again() -> None:
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)


def _not_raised(dropped: sys.UnraisableHookArgs) -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        _again()
    else:
        sys.__unraisablehook__(dropped)


# Callbacks before a fork run last registered first, those after it first registered first: these enclose logging's.
def _before_fork() -> None:
    _set_forking(True)


def _after_fork() -> None:
    _set_forking(False)


def _set_forking(forking: bool) -> None:
    global _forking
    if threading.current_thread() is threading.main_thread():  # signals are handled there; other threads fork freely
        _forking = forking
