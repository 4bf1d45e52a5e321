"""The cluster files have the form that their tools read, and name what exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from hashray.cli import COMMANDS, Command
from hashray.config import parse, validate
from hashray.search.opening import ServeConfig

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def test_the_rayjob_runs_a_job_that_exists_with_arguments_that_parse() -> None:
    spec = load("rayjob.yaml")["spec"]
    words = spec["entrypoint"].split()
    job = Path(words[1]).relative_to("/app")
    assert (ROOT / job).exists() and spec["shutdownAfterJobFinishes"]
    command = COMMANDS[job.stem]
    assert isinstance(command, Command)
    module, _, name = command.config.partition(":")
    parsed = parse(getattr(importlib.import_module(module), name), words[2:], "rayjob")
    assert (ROOT / Path(parsed.config).relative_to("/app")).exists()
    pins = (ROOT / "constraints.txt").read_text()
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}" in pins
    for group in [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]:
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_rayservice_imports_an_application_whose_arguments_validate() -> None:
    documents = list(yaml.safe_load_all((ROOT / "cluster/rayservice.yaml").read_text()))
    spec = documents[0]["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    (app,) = serve["applications"]
    module, _, name = app["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = validate(ServeConfig, app["args"], "rayservice")
    assert config.host == serve["http_options"]["host"] and config.port == serve["http_options"]["port"]
    cluster = spec["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text()
    redis = next(one for one in documents if one["kind"] == "Service")
    place = f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == place


def test_the_ray_up_file_is_one_cluster_of_known_node_types() -> None:
    spec = load("ray-up.yaml")
    assert spec["head_node_type"] in spec["available_node_types"]
    assert spec["max_workers"] >= sum(t.get("min_workers", 0) for t in spec["available_node_types"].values())


def test_the_image_copies_what_exists_and_installs_an_extra_that_exists() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    for words in re.findall(r"^COPY (.+)$", text, re.M):
        for path in words.split()[:-1]:
            assert (ROOT / path).exists(), path
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.search(r"ARG EXTRA=(\w+)", text)[1] in extras  # type: ignore[index]


def test_the_cluster_on_one_machine_takes_the_commands_that_the_documents_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ROOT / "cluster" / "local.py"
    spec = importlib.util.spec_from_file_location("cluster_on_one_machine", path)
    assert spec is not None and spec.loader is not None
    local = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, local)  # where dataclasses look
    spec.loader.exec_module(local)
    text = path.read_text() + (ROOT / "docs/CLUSTER.md").read_text()
    shown = re.findall(r"python cluster/local\.py ((?:up|add|remove|kill|status|down)\b[^\n\"`)]*)", text)
    commands = {local.parsed(line.split("   ")[0].split()).command for line in shown}
    assert commands == {"up", "add", "remove", "kill", "status", "down"}
    assert len(path.read_text().splitlines()) <= 400
