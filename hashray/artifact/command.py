"""`hashray describe`: print what an artifact is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray.artifact.verify import describe as summarise
from hashray.config import Config
from hashray.storage.requests import counting


class ArtifactConfig(Config):
    """Print the kind, parents and size of an artifact, and whether its files are there."""

    artifact: Annotated[str, tyro.conf.Positional] = Field(description="Local folder or s3:// url")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON")


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
