"""The search page: one HTML file with everything inside, no request to another host. No Ray."""

from __future__ import annotations

from importlib.resources import files

CONTENT_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page() -> str:
    """The HTML of the page."""
    return files(__name__).joinpath("index.html").read_text("utf-8")
