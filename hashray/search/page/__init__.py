"""The search page: one HTML file with its styles and scripts inside. No Ray, no network."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

STYLE = re.compile(r'<link rel="stylesheet" href="([\w-]+\.css)">')
SCRIPT = re.compile(r'<script src="([\w-]+\.js)"></script>')


@cache
def page() -> str:
    """The page as one file: what index.html links to stands inside it."""
    html = _text("index.html")
    html = STYLE.sub(lambda match: f"<style>\n{_text(match[1])}</style>", html)
    return SCRIPT.sub(lambda match: f"<script>\n{_text(match[1])}</script>", html)


@cache
def content_policy() -> str:
    """The page's Content-Security-Policy: its own scripts and styles by their hash, this server, nothing else."""
    html = page()
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(html, 'script')}",
            f"style-src {_hashes(html, 'style')}",
            "connect-src 'self'",
            "img-src 'self' blob: data:",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )


def _text(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hashes(html: str, tag: str) -> str:
    """The sources of the elements of a tag, as the policy writes them."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
