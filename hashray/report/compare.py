"""`hashray figures`: evaluations beside each other, drawn from their metrics.json alone. No Ray.

DIR/  precision_recall.png · precision_at.png · scores.png · and for each evaluation codes_NAME.png (t-SNE),
      codeword_distances_NAME.png, codeword_graph_NAME.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from pydantic import Field
from sklearn.manifold import TSNE

from hashray import artifact
from hashray.codes import unpack
from hashray.config import Config
from hashray.errors import InputError, MismatchError
from hashray.progress import Bar, say
from hashray.report import figures
from hashray.storage import join, open_store


class FiguresConfig(Config):
    """Draw evaluations beside each other, from their metrics.json."""

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(description="folders of `hashray evaluate`")
    out: str = Field(description="where the pictures go")
    scenario: str | None = Field(None, description="of a class-split: within, cross or generalised; unset: the first")
    seed: int = Field(0, ge=0, description="of the t-SNE")


def compare(config: FiguresConfig) -> dict[str, str]:
    """Run the stage; return the pictures' places by name.

    Raises:
        InputError: no evaluation, one that is not there, or a scenario that one does not have.
        MismatchError: the evaluations are of different corpora.
    """
    if not config.evaluations:
        raise InputError("hashray figures needs evaluations: hashray figures EVAL [EVAL …] --out DIR")
    runs = {name: read_metrics(url) for name, url in zip(names_of(config.evaluations), config.evaluations, strict=True)}
    for name in ("corpus", "query_split", "database_split", "top_k", "ties"):
        found = {str(metrics["protocol"].get(name)) for metrics in runs.values()}
        if len(found) > 1:
            raise MismatchError(f"the evaluations differ in {name} ({', '.join(sorted(found))}): they do not compare")
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
        store.write(f"{name}.png", figures.png(figure))
    say(f"{len(pictures)} pictures in {config.out}")
    return {name: join(config.out, f"{name}.png") for name in pictures}


def read_metrics(url: str) -> dict[str, Any]:
    """metrics.json of a finished evaluation, its checksum verified."""
    store = open_store(url)
    manifest = artifact.load_manifest(store, "evaluation")
    return json.loads(artifact.read_file(store, manifest.record("metrics.json")))


def names_of(urls: Sequence[str]) -> list[str]:
    """Short names for evaluations: the last parts of their paths that tell them apart.

    >>> names_of(["runs/a/evaluation", "runs/b/evaluation/"]), names_of(["x/e32"])
    (['a_evaluation', 'b_evaluation'], ['e32'])
    """
    parts = [url.rstrip("/").split("/") for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"the same evaluation twice: {', '.join(sorted({u for u in urls if urls.count(u) > 1}))}")


def comparable(runs: Mapping[str, Mapping[str, Any]], scenario: str | None) -> list[dict[str, Any]]:
    """Every run's own method, and the baselines of the first run that has any, of one scenario.

    Raises:
        InputError: a run without the scenario. MismatchError: baselines on different features.
    """
    features = {metrics["protocol"].get("baseline_features") for metrics in runs.values()} - {None}
    if len(features) > 1:
        raise MismatchError(f"baselines on different features ({'; '.join(sorted(features))}): they do not compare")
    lengths = {metrics["results"][0]["num_bits"] for metrics in runs.values()}
    found: list[dict[str, Any]] = []
    baselines: list[dict[str, Any]] = []
    for place, (name, metrics) in enumerate(runs.items()):
        wanted = scenario or metrics["results"][0].get("scenario")
        own = [row for row in metrics["results"] if row.get("scenario") == wanted]
        if not own:
            have = sorted({str(row.get("scenario")) for row in metrics["results"]})
            raise InputError(f"{name} has no scenario {wanted!r}; it has {', '.join(have)}")
        told = f"{own[0]['name']} {name}" if len(runs) > 1 else own[0]["name"]
        bits = f", {own[0]['num_bits']} bits" if len(lengths) > 1 else ""
        found.append({**own[0], "run": place, "label": told + bits})
        baselines = baselines or [{**r, "label": r["name"] + (bits if r["num_bits"] else "")} for r in own[1:]]
    return found + baselines


def embed(codes: Sequence[str], seed: int) -> NDArray[np.floating]:
    """t-SNE [n, 2] of codes given as hexadecimal text, by the distances between their bits."""
    bits = unpack(np.stack([np.frombuffer(bytes.fromhex(code), dtype=np.uint8) for code in codes])).astype(np.float32)
    if len(bits) < 3:
        return np.zeros((len(bits), 2))
    # Squared Euclidean distances of bits in {-1, +1} are four times Hamming's; a little noise parts equal codes.
    bits += np.random.default_rng(seed).normal(0, 1e-3, bits.shape).astype(np.float32)
    perplexity = min(30.0, (len(bits) - 1) / 3)
    return TSNE(init="random", perplexity=perplexity, random_state=seed).fit_transform(bits)
