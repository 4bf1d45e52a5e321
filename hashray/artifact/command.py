"""`hashray describe` and `hashray verify`: print what an artifact is, and check it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray.artifact.verify import describe as summarise
from hashray.artifact.verify import verify as find_problems
from hashray.config import Config
from hashray.progress import say
from hashray.storage.requests import counting


class ArtifactConfig(Config):
    """Print the kind, parents and size of an artifact, and whether its files are there."""

    artifact: Annotated[str, tyro.conf.Positional] = Field(description="Local folder or s3:// url")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON")


class VerifyConfig(ArtifactConfig):
    """Check every byte, every row count and every id of an artifact; exit code 1 where one is wrong."""


def describe(config: ArtifactConfig) -> None:
    """Print what an artifact is."""
    with counting("describe"):
        summary = summarise(config.artifact)
    if config.json_:
        print(json.dumps(summary))
        return
    for key, value in summary.items():
        text = json.dumps(value) if isinstance(value, dict | list) else f"{value:,}" if _is_count(value) else str(value)
        print(f"{key:<16} {text}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def verify(config: VerifyConfig) -> int:
    """Check every file of an artifact, print each problem, and return 1 if there is one."""
    with counting("verify"):
        problems = find_problems(config.artifact)
    if config.json_:
        print(json.dumps({"artifact": config.artifact, "whole": not problems, "problems": problems}))
    elif not problems:
        print(f"{config.artifact} is whole")
    for problem in problems:
        say(f"error: {problem}")
    return 1 if problems else 0
