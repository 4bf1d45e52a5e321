"""[Ray] `hashray serve`: in this process where the index fits, else on Ray Serve with a fleet of actors."""

from __future__ import annotations

from hashray.engine.session import runs_here
from hashray.search.local import serve_here
from hashray.search.opening import ServeConfig

__all__ = ["ServeConfig", "serve"]


def serve(config: ServeConfig) -> int:
    """Answer requests until SIGTERM or Ctrl-C."""
    if runs_here(config.fleet.ray, short=True):
        return serve_here(config)
    raise NotImplementedError
