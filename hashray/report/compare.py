"""`hashray figures` draws several evaluations beside each other, from their metrics.json alone. No Ray.

DIR/  precision_recall.png · precision_at.png · scores.png · and for each evaluation codes_NAME.png (t-SNE),
      codeword_distances_NAME.png, codeword_graph_NAME.png; each also as .svg
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray import artifact
from hashray.config import Config
from hashray.engine.stage import require_no_artifact
from hashray.errors import InputError, MismatchError
from hashray.progress import Bar, say
from hashray.report import figures
from hashray.report.bits import embed
from hashray.report.drawn import Drawn, draw
from hashray.storage import join, open_store


class FiguresConfig(Config):
    """Draw evaluations beside each other, from their metrics.json."""

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(
        description="Output folders of `hashray evaluate`"
    )
    out: str = Field(description="Folder for the pictures")
    scenario: str | None = Field(
        None, description="Scenario of a class split: within, cross or generalised; unset: the first"
    )
    seed: int = Field(0, ge=0, description="Seed of the t-SNE")


def compare(config: FiguresConfig) -> dict[str, str]:
    """Run the stage and return the path of each picture by name.

    Raises:
        InputError: there is no evaluation, one does not exist, or one lacks the scenario.
        MismatchError: the evaluations differ in corpus or protocol.
    """
    if not config.evaluations:
        raise InputError("hashray figures needs evaluations: hashray figures EVAL [EVAL …] --out DIR")
    require_no_artifact(open_store(config.out), "pictures")
    runs = {name: read_metrics(url) for name, url in zip(names_of(config.evaluations), config.evaluations, strict=True)}
    for name in ("corpus", "query_split", "database_split", "top_k", "ties"):
        values = {str(metrics["protocol"].get(name)) for metrics in runs.values()}
        if len(values) > 1:
            raise MismatchError(
                f"the evaluations differ in {name} ({', '.join(sorted(values))}), so their scores do not compare; "
                f"evaluate the models with the same {name}"
            )
    results = comparable(runs, config.scenario)
    pictures = {
        "scores": figures.scores(results),
        "precision_recall": figures.precision_recall(results),
        "precision_at": figures.precision_at(results),
    }
    with Bar("figures", len(runs), "evaluations") as bar:
        for name, metrics in runs.items():
            sample = metrics["sample"]
            points = embed(sample["codes"], config.seed)
            ours = metrics["results"][0]
            title = f"t-SNE of {len(points):,} query codes: {ours['name']}, {ours['num_bits']} bits"
            pictures[f"codes_{name}"] = figures.code_map(points, sample["labels"], metrics["classes"], title)
            if "codewords" in metrics:
                pictures[f"codeword_distances_{name}"] = figures.codeword_distances(metrics["codewords"])
                pictures[f"codeword_graph_{name}"] = figures.codeword_graph(metrics["codewords"])
            bar.add(1)
    store = open_store(config.out)
    for name, figure in pictures.items():
        for kind, data in zip(Drawn._fields, draw(figure), strict=True):
            store.write(f"{name}.{kind}", data)
    say(f"{len(pictures)} pictures in {config.out}")
    return {name: join(config.out, f"{name}.png") for name in pictures}


def read_metrics(url: str) -> dict[str, Any]:
    """Read metrics.json of a finished evaluation and check it against its checksum."""
    store = open_store(url)
    manifest = artifact.load_manifest(store, "evaluation")
    return json.loads(artifact.read_file(store, manifest.record("metrics.json")))


def names_of(urls: Sequence[str]) -> list[str]:
    """Short names for evaluations: as many last parts of their paths as tell them apart.

    >>> names_of(["runs/a/evaluation", "runs/b/evaluation/"]), names_of(["x/e32"])
    (['a_evaluation', 'b_evaluation'], ['e32'])
    """
    parts = [url.rstrip("/").split("/") for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = ", ".join(sorted({url for url in urls if urls.count(url) > 1}))
    raise InputError(f"the same evaluation is named twice: {twice}; name each once")


def comparable(runs: Mapping[str, Mapping[str, Any]], scenario: str | None) -> list[dict[str, Any]]:
    """The learned method of every run, and the baselines of the first run that has any, in one scenario.

    Raises:
        InputError: a run lacks the scenario.
        MismatchError: the runs computed their baselines on different features.
    """
    features = {metrics["protocol"].get("baseline_features") for metrics in runs.values()} - {None}
    if len(features) > 1:
        raise MismatchError(
            f"the baselines use different features ({'; '.join(sorted(features))}), so they do not compare; "
            "evaluate all runs but one with --no-baselines"
        )
    lengths = {metrics["results"][0]["num_bits"] for metrics in runs.values()}
    learned: list[dict[str, Any]] = []
    baselines: list[dict[str, Any]] = []
    for number, (name, metrics) in enumerate(runs.items()):
        wanted = scenario or metrics["results"][0].get("scenario")
        rows = [row for row in metrics["results"] if row.get("scenario") == wanted]
        if not rows:
            present = sorted({str(row.get("scenario")) for row in metrics["results"]})
            raise InputError(f"{name} has no scenario {wanted!r}; it has {', '.join(present)}")
        label = f"{rows[0]['name']} {name}" if len(runs) > 1 else rows[0]["name"]
        bits = f", {rows[0]['num_bits']} bits" if len(lengths) > 1 else ""
        learned.append({**rows[0], "run": number, "label": label + bits})
        baselines = baselines or [{**row, "label": row["name"] + (bits if row["num_bits"] else "")} for row in rows[1:]]
    return learned + baselines
