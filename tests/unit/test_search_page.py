"""The search page as one file: everything inside, and a policy that allows exactly that."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from hashray.search import page as module
from hashray.search.page import content_policy, page

FOLDER = Path(module.__file__).parent


def test_every_script_and_style_stands_inside_once():
    html = page()
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import", html)
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".js", ".css"):
            assert html.count(path.read_text()) == 1, path
            assert len(path.read_text().splitlines()) <= 400, path


def test_the_policy_allows_what_is_inside_and_nothing_else():
    html, policy = page(), content_policy()
    assert "unsafe" not in policy and "default-src 'none'" in policy
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts}
        assert hashes == set(re.search(f"{directive} ([^;]*)", policy)[1].split())
    # What the policy would stop without a word: handlers and styles in attributes.
    assert not re.search(r"<[a-z][^>]*\s(on[a-z]+|style)=", re.sub(r"<script>.*?</script>", "", html, flags=re.S))


def test_no_text_of_the_server_is_ever_parsed_as_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", page())
