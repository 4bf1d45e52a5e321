"""Plain English: words that are gone stay gone, and a variable is named for what it holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = (
    "hashray/**/*.py", "hashray/**/*.html", "jobs/**/*.py", "jobs/**/*.toml", "benchmarks/*.py", "tests/**/*.py",
    "docs/*.md", "*.md", "cluster/*", "Makefile",
)  # fmt: skip
# What is gone, and the word that took its place.
GONE = {
    r"\bstretch(es)?\b": "segment",
    r"\bpass(es)? over\b": "epoch, or scan",
    r"\b(last|second|every|each) pass\b": "epoch, or scan",
    r"\bcrews?\b": "worker group",
    r"\b(?-i:Board|refuse_taken|reached_by|already_made|run_units)\b": "MetricsQueue, require_free, …",
    r"\banew\b": "again",
    r"\btill\b": "until",
    r"\bfor ever\b": "forever, without end",
    r"\b(whoever|whomever|whosoever)\b": "name the thing",
    r"\b(is|was|are|were|be|been) told\b": "say what is reported, and to whom",
    r"\b(as|what) it came\b": "as it is",
    r"\bof two (tries|checkpoints)\b": "mixes two attempts, comes from different checkpoints",
    r"\bsettled\b": "decided, or the active verb",
    r"\bnothing (is|was) to be\b": "an active sentence",
    r"\bwhat is to be\b": "an active sentence",
    r"\bso many\b": "give the number, or leave it out",
    r"\bno more (is|than once)\b": "at most once",
    r"\bat whose\b": "whose is for people",
    r"\bheld against\b": "compared with",
    r"\bby now\b": "so far",
}
RETIRED_NAMES = {"found", "own", "made", "told"}


def files() -> list[Path]:
    paths = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file()})
    return [path for path in paths if path.suffix not in (".png", ".pyc") and path != Path(__file__).resolve()]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_are_gone(path: Path) -> None:
    text = path.read_text()
    hits = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write {better}"
        for pattern, better in GONE.items()
        for match in re.finditer(pattern, text, re.I)
    ]
    assert not hits, hits


def names(tree: ast.AST) -> list[tuple[int, str]]:
    stored = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            stored.append((node.lineno, node.arg))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            stored.append((node.lineno, node.attr))
    return stored


@pytest.mark.parametrize(
    "path", [path for path in files() if path.suffix == ".py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_variable_is_named_for_what_it_holds(path: Path) -> None:
    hits = [f"line {line}: {name}" for line, name in names(ast.parse(path.read_text())) if name in RETIRED_NAMES]
    assert not hits, hits
