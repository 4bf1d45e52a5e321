"""cluster/grafana.json asks for metrics, labels and values that the service has, and shows every metric."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.metrics import MetricWrapperBase
from serving import behind_socket, config_of, write_all

from hashray.search.metrics import Metrics

BOARD: dict[str, Any] = json.loads((Path(__file__).resolve().parents[2] / "cluster/grafana.json").read_text())
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OF_PROMETHEUS = {"instance", "job"}  # labels that the scrape adds
WORDS = {"by", "or", "sum", "min", "max", "rate", "increase", "vector", "histogram_quantile"}


def series() -> dict[str, tuple[str, set[str]]]:
    """Every series that the service can have: its metric's kind, and its labels."""
    names: dict[str, tuple[str, set[str]]] = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            for suffix in SUFFIXES[family.type]:
                labels = {*metric._labelnames, *(["le"] if suffix == "_bucket" else [])}
                names[family.name + suffix] = (family.type, labels)
    return names


def queries() -> list[str]:
    panels = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    variables = [entry["definition"] for entry in BOARD["templating"]["list"] if entry["type"] == "query"]
    assert len(panels) > 15 and len(variables) == 2
    return panels + variables


@pytest.mark.parametrize("query", queries())
def test_a_query_names_only_what_is_there(query: str) -> None:
    known = series()
    named = re.findall(r"\bhashray_\w+", query)
    assert named and set(named) <= set(known), query
    groups = [word.strip() for group in re.findall(r"by \(([^)]*)\)", query) for word in group.split(",")]
    for name in named:
        kind, labels = known[name]
        matchers = " ".join(re.findall(rf"{name}\{{([^}}]*)\}}", query))
        assert set(re.findall(r"(\w+)=", matchers)) | set(groups) <= labels | OF_PROMETHEUS, (query, name)
        over_time = re.search(rf"(rate|increase)\({name}(\{{[^}}]*\}})?\[", query) is not None
        assert over_time == (kind != "gauge") or query.startswith("label_values("), query
        if name.endswith("_bucket"):
            assert "le" in groups and query.startswith("histogram_quantile(0."), query
    assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
    left = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\([\w, ]*\)|\$\w+', "", query)
    if not query.startswith("label_values("):
        assert set(re.findall(r"[a-z_]{2,}", left)) <= WORDS | set(named), query


def test_every_metric_is_shown() -> None:
    text = "\n".join(queries())
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            assert any(family.name + suffix in text for suffix in SUFFIXES[family.type]), family.name


def test_values_in_matchers_are_those_of_a_running_service(tmp_path: Path) -> None:
    at = write_all(tmp_path)
    with behind_socket(config_of(at)) as (url, _), httpx.Client(base_url=url) as client:
        assert client.post("/search", json={"id": "0007"}).status_code == 200
        for _ in range(2):
            assert Image.open(io.BytesIO(client.get("/image/0007?size=32").content)).size == (16, 16)
        scraped = client.get("/metrics").text
    exact = {pair for query in queries() for pair in re.findall(r'\w+="[^"$]*"', query)}
    assert exact == {'result="hit"'} and all(pair in scraped for pair in exact)
    running = {line.partition("{")[0].partition(" ")[0] for line in scraped.splitlines() if line.startswith("hashray_")}
    unlabelled = {name for name, (_, labels) in series().items() if not labels}
    assert unlabelled <= running and running - set(series()) == {n for n in running if n.endswith("_created")}


def test_the_dashboard_can_be_imported() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24  # nothing overlaps
    assert all(panel["description"] and panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    variables = {entry["name"] for entry in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables
