"""`hashray describe` and `hashray verify`: one artifact, looked at."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray.artifact.verify import describe as summarise
from hashray.artifact.verify import verify as find_problems
from hashray.config import Config
from hashray.progress import say


class ArtifactConfig(Config):
    """Look at one artifact: corpus, features, pseudo-labels, model, codes, index, evaluation or sweep."""

    artifact: Annotated[str, tyro.conf.Positional] = Field(description="Local folder or s3:// url")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON")


def describe(config: ArtifactConfig) -> None:
    """Print what an artifact is."""
    summary = summarise(config.artifact)
    if config.json_:
        print(json.dumps(summary))
        return
    for key, value in summary.items():
        text = json.dumps(value) if isinstance(value, dict | list) else f"{value:,}" if _is_count(value) else str(value)
        print(f"{key:<16} {text}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def verify(config: ArtifactConfig) -> int:
    """Check everything about an artifact; print what is wrong, exit 1 if anything is."""
    problems = find_problems(config.artifact)
    if config.json_:
        print(json.dumps({"artifact": config.artifact, "whole": not problems, "problems": problems}))
    elif not problems:
        print(f"{config.artifact} is whole")
    for problem in problems:
        say(f"error: {problem}")
    return 1 if problems else 0
