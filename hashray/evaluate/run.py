"""[Ray] `hashray evaluate`: a whole evaluation -> metrics.json, figures and one self-contained page.

DIR/  metrics.json · report.html · figures/*.png · codes/query, codes/database (artifacts) · manifest.json

The queries and the database are encoded (rerun = resume), scored, and put beside the baselines on the
same features of the same rows: the features of the model's frozen or pretrained trunk, or, for a trunk that
was trained from scratch, the images' own pixels; a trained trunk's features would already hold the labels.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import ray
import torch
import tyro
from numpy.typing import NDArray
from pydantic import Field, field_validator

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical
from hashray.codes import Codes, binarize, hamming
from hashray.config import Config
from hashray.data.corpus import Corpus, Rows, open_corpus, read_table
from hashray.encode import EncodeConfig, encode
from hashray.errors import InputError, MismatchError, perhaps
from hashray.evaluate import figures, report
from hashray.evaluate.baselines import fit_baselines
from hashray.evaluate.metrics import (
    TIES,
    Ranking,
    average_precisions,
    code_health,
    mean_average_precision_float,
    rank,
)
from hashray.index.build import code_matrix
from hashray.methods.backbone import BackboneConfig
from hashray.model import Model, load_model
from hashray.progress import Bar, say, show_table
from hashray.runtime import WorkersConfig, connect
from hashray.storage import join, open_store
from hashray.train.features import compute_features, features_of_model

PIXEL_SIZE = 32
HEALTH_ROWS = 256
GALLERY_NEIGHBOURS = 10


class EvaluateConfig(Config):
    """Score a model on a corpus, beside the baselines, and write a page about it."""

    model: str = Field(description="model, local folder or s3:// url")
    corpus: str = Field(description="corpus, local folder or s3:// url")
    out: str = Field(description="where metrics.json and report.html go")
    top_k: int | None = Field(None, description="R of mAP@R; unset: the whole ranking")
    ties: str = Field("expected", description=f"convention for equal distances: {', '.join(TIES)}")
    query_split: str = "query"
    database_split: str = "database"
    codes: str | None = Field(None, description="codes of the database split, if they exist already")
    baselines: bool = Field(True, description="random, LSH, PCA-sign, ITQ, class code and float cosine, same features")
    baseline_limit: int = Field(200_000, ge=1, description="rows above which baselines are left out")
    baseline_train_rows: int = Field(20_000, ge=1, description="train rows that baselines are fitted on, at most")
    gallery: int = Field(12, ge=0, description="queries shown on the page, a quarter of them the hardest")
    seed: int = Field(0, ge=0)
    max_bad: float = Field(0.05, ge=0, le=1, description="share of rows that may be quarantined")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()

    @field_validator("ties")
    @classmethod
    def _known_ties(cls, value: str) -> str:
        if value not in TIES:
            raise ValueError(f"no convention is called {value!r}{perhaps(value, TIES)} Known: {', '.join(TIES)}")
        return value

    @field_validator("top_k")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1 and value != -1:
            raise ValueError("R must be at least 1 (or -1, as deephash_pytorch writes the whole ranking)")
        return value


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the stage; return what metrics.json holds.

    Raises:
        InputError: no query or database rows, or a ties name that is not known.
    """
    if artifact.is_finished(open_store(config.out)):
        artifact.load_manifest(config.out, "evaluation")  # refuses to write over anything else
    corpus = open_corpus(config.corpus)
    if not corpus.num_classes:
        raise InputError(f"{config.corpus} has no labels, and without them no row is relevant to any; ingest them too")
    if config.baselines and not corpus.count("train"):
        raise InputError(f"{config.corpus} has no train rows to fit the baselines on; give --no-baselines")
    for split in (config.query_split, config.database_split):
        corpus.require(split, "evaluation")
    model = load_model(config.model, device="cpu")
    connect()
    features = features_of_model(config.model, config.corpus, config.pool, config.max_bad)
    query_codes, query = _encoded(config, corpus, config.query_split, features, None)
    database_codes, database = _encoded(config, corpus, config.database_split, features, config.codes)
    name = str(model.method.config.kind)
    ranking = rank(query_codes, query.labels, database_codes, database.labels)
    results = [_score(name, model.num_bits, query_codes, query.labels, database_codes, database.labels, config)]
    results[0]["code_health"] |= _logit_health(model, corpus, config.query_split)
    protocol = _protocol(config, model, corpus, query, database)
    if config.baselines and len(database.ids) + len(query.ids) <= config.baseline_limit:
        values = _Features(config, model, corpus, features)
        protocol["baseline_features"] = values.name
        results += _baselines(config, model.num_bits, values, query, database)
    elif config.baselines:
        say(f"baselines left out: more than --baseline-limit {config.baseline_limit:,} rows")
    metrics: dict[str, Any] = {
        "protocol": protocol,
        "environment": environment(),
        "results": results,
        "distances": _distance_shares(ranking),
        "gallery": _gallery(config, corpus, ranking, query_codes, query, database_codes, database),
    }
    _write(config, corpus, model, metrics)
    rows = [[r["name"], str(r["num_bits"] or "float"), f"{r['mAP']:.4f}"] for r in results]
    depth = f"mAP@{config.top_k}" if config.top_k else "mAP"
    show_table(f"{len(query.ids):,} queries, {len(database.ids):,} rows", ["method", "bits", depth], rows)
    say(f"the page: {join(config.out, 'report.html')}")
    return metrics


def _encoded(
    config: EvaluateConfig, corpus: Corpus, split: str, features: str | None, given: str | None
) -> tuple[Codes, Rows]:
    """Codes of a split, with the ids and labels of exactly the rows that have one, in the codes' order."""
    out = given or join(config.out, "codes", split)
    if given is None:
        encode(
            EncodeConfig(
                model=config.model, corpus=config.corpus, out=out, split=split, features=features,
                max_bad=config.max_bad, pool=config.pool,
            )
        )  # fmt: skip
    store = open_store(out)
    manifest = artifact.load_manifest(store, "codes")
    made_from = (manifest.parents["model"], manifest.parents["corpus"], manifest.info["split"])
    wanted = (artifact.load_manifest(config.model, "model").id, corpus.manifest.id, split)
    if made_from != wanted:
        raise MismatchError(f"{out} are not the codes of the {split!r} rows of {config.corpus} by {config.model}")
    tables = [read_table(store, record) for record in manifest.files if record.name.startswith("parts/")]
    table = pa.concat_tables(tables)
    ids = table.column("id").to_pylist()
    codes = code_matrix(table.column("code"), int(manifest.info["num_bits"]))
    rows = corpus.rows(split)
    place = {row_id: i for i, row_id in enumerate(rows.ids)}
    return codes, Rows(ids, rows.labels[[place[row_id] for row_id in ids]])


def _score(
    name: str, num_bits: int, query_codes: Codes, query_labels: NDArray[np.uint8], database_codes: Codes,
    database_labels: NDArray[np.uint8], config: EvaluateConfig,
) -> dict[str, Any]:  # fmt: skip
    labelled = query_codes, query_labels, database_codes, database_labels
    scores = average_precisions(*labelled, config.top_k, config.ties)
    ranking = rank(*labelled)
    curve = ranking.precision_recall_curve()
    return {
        "name": name,
        "num_bits": num_bits,
        "top_k": config.top_k,
        "ties": config.ties,
        "mAP": scores.mean,
        "queries_without_relevant": scores.num_without_relevant,
        "precision_at": {str(n): value for n, value in ranking.precision_at().items()},
        "precision_radius_2": ranking.precision_within_radius(2),
        "pr_curve": {"precision": curve.precision.tolist(), "recall": curve.recall.tolist()},
        "code_health": code_health(database_codes, labels=database_labels),
    }


class _Features:
    """Baseline features of any split: cached trunk features, or pixels."""

    def __init__(self, config: EvaluateConfig, model: Model, corpus: Corpus, frozen_url: str | None) -> None:
        trained = dict(model.manifest.config["backbone"]) if model.manifest else {}
        backbone = BackboneConfig.model_validate(trained)
        self.cached: Corpus | None = None
        self.corpus = corpus
        if backbone.weights is None and frozen_url is None:
            self.name = f"pixels, {PIXEL_SIZE} x {PIXEL_SIZE} x 3"
            return
        # A frozen trunk is in the model, whatever became of the weights file; a trained one started from the file.
        start = backbone.model_copy(update={"frozen": True})
        url = frozen_url or compute_features(config.corpus, start, None, config.pool, config.max_bad)
        self.cached = open_corpus(url, "features")
        self.name = f"{backbone.name}, {backbone.image_size} px, pretrained"

    def of(self, split: str, ids: list[str]) -> NDArray[np.float32]:
        """Features float32 [n, d] of some rows of a split, in the order of `ids`."""
        source = self.cached or self.corpus
        wanted = {row_id: i for i, row_id in enumerate(ids)}
        out: NDArray[np.float32] | None = None
        for record in source.parts:
            if not source.count_part(record, split):
                continue
            table = source.read_part(record, split)
            own = table.column("id").to_pylist()
            kept = [i for i, row_id in enumerate(own) if row_id in wanted]
            table = table.take(pa.array(kept, pa.int64()))
            values = source.inputs(table, PIXEL_SIZE, "squash")
            flat = values.reshape(len(values), -1).astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
            if out is None:
                out = np.zeros((len(ids), flat.shape[1]), dtype=np.float32)
            out[[wanted[own[i]] for i in kept]] = flat
        if out is None:
            raise InputError(f"{source.store.url} has no {split!r} rows")
        return out


def _baselines(
    config: EvaluateConfig, num_bits: int, features: _Features, query: Rows, database: Rows
) -> list[dict[str, Any]]:
    rows = features.corpus.rows("train")
    chosen = np.random.default_rng(config.seed).permutation(len(rows.ids))[: config.baseline_train_rows]
    ids = [rows.ids[i] for i in np.sort(chosen)]
    labelled = rows.labels[np.sort(chosen)]
    train, at = features.of("train", ids), features.of(config.query_split, query.ids)
    base = features.of(config.database_split, database.ids)
    results = []
    fitted = fit_baselines(train, labelled, num_bits, config.seed)
    with Bar("baselines", len(fitted) + 1, "methods") as bar:
        for name, baseline in fitted.items():
            codes = baseline.codes(at), baseline.codes(base)
            results.append(_score(name, num_bits, codes[0], query.labels, codes[1], database.labels, config))
            bar.add(1)
        cosine = mean_average_precision_float(at, query.labels, base, database.labels, config.top_k)
        bar.add(1)
    top = {"top_k": config.top_k, "ties": None}
    return [*results, {"name": "float-cosine", "num_bits": None, **top, "mAP": cosine}]


def _protocol(config: EvaluateConfig, model: Model, corpus: Corpus, query: Rows, database: Rows) -> dict[str, Any]:
    settings = corpus.manifest.config
    return {
        "name": settings.get("split_protocol"),
        "queries": len(query.ids),
        "database": len(database.ids),
        "train": corpus.count("train"),
        "classes": corpus.num_classes,
        "top_k": config.top_k,
        "ties": config.ties,
        "split_seed": settings.get("seed"),
        "train_seed": model.manifest.config.get("seed") if model.manifest else None,
        "corpus": corpus.manifest.id,
        "model": model.manifest.id if model.manifest else None,
        "fingerprint": model.fingerprint,
    }


def environment() -> dict[str, Any]:
    """What produced a number: commit, versions, hardware, command (law 13); of absolute paths only the names."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _commit(),
        "hashray": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "faiss": faiss.__version__,
        "hardware": f"{os.cpu_count()} cores {platform.machine()}" + (f", {', '.join(gpus)}" if gpus else ""),
        "command": " ".join(
            [Path(sys.argv[0]).name, *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:])]
        ),
    }


def _commit() -> str | None:
    """The commit of the code that runs, "+changes" when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return (head + ("+changes" if git("status", "--porcelain", "-uno") else "")) or None


def _logit_health(model: Model, corpus: Corpus, split: str) -> dict[str, float]:
    """How far the logits of some queries lie from 0 (METHODS 6.7), over the first part that has any."""
    record = next(record for record in corpus.parts if corpus.count_part(record, split))
    table = corpus.read_part(record, split).slice(0, HEALTH_ROWS)
    logits = model.logits(corpus.inputs(table, model.backbone.image_size, model.backbone.resize))
    whole = code_health(binarize(logits), logits=np.tanh(logits))
    return {name: whole[name] for name in ("near_zero", "quantization", "exact_zeros")}


def _distance_shares(ranking: Ranking) -> dict[str, list[float]]:
    """Share of relevant and of other pairs at each Hamming distance 0 .. num_bits."""
    relevant, total = ranking.relevant.sum(0), ranking.total.sum(0)
    other = total - relevant
    return {
        "relevant": (relevant / max(1, relevant.sum())).tolist(),
        "other": (other / max(1, other.sum())).tolist(),
    }


def _gallery(
    config: EvaluateConfig,
    corpus: Corpus,
    ranking: Ranking,
    query_codes: Codes,
    query: Rows,
    database_codes: Codes,
    database: Rows,
) -> list[dict[str, Any]]:
    """Some queries spread over the classes, then those of the lowest AP, with their nearest rows; ties by id."""
    order = np.lexsort((np.random.default_rng(config.seed).permutation(len(query.ids)), query.labels.argmax(1)))
    hard = config.gallery // 4
    places = np.linspace(0, len(order) - 1, min(config.gallery - hard, len(order))).round().astype(int)
    scores = ranking.average_precisions().values
    hardest = np.argsort(scores, kind="stable")[:hard]
    by_id = np.argsort(np.array(database.ids))
    found = []
    for row in dict.fromkeys([*order[places].tolist(), *hardest.tolist()]):
        distances = hamming(query_codes[row : row + 1], database_codes)[0][by_id]
        near = np.argsort(distances, kind="stable")[:GALLERY_NEIGHBOURS]
        neighbours = [
            {
                "id": database.ids[by_id[i]],
                "distance": int(distances[i]),
                "labels": _names(corpus, database.labels[by_id[i]]),
                "relevant": bool((database.labels[by_id[i]] & query.labels[row]).any()),
            }
            for i in near
        ]
        names = _names(corpus, query.labels[row])
        score = None if np.isnan(scores[row]) else float(scores[row])
        hit = {"query": query.ids[row], "labels": names, "average_precision": score, "neighbours": neighbours}
        found.append({**hit, "hardest": row in hardest})
    return found


def _names(corpus: Corpus, labels: NDArray[np.uint8]) -> list[str]:
    return [corpus.classes[i] for i in np.flatnonzero(labels)]


def _write(config: EvaluateConfig, corpus: Corpus, model: Model, metrics: dict[str, Any]) -> None:
    store = open_store(config.out)
    store.delete(artifact.MANIFEST)  # an evaluation is made again freely; till it is written there is none
    pictures = figures.draw_all(metrics)
    images = corpus.images(config.query_split, [row["query"] for row in metrics["gallery"]])
    images |= corpus.images(config.database_split, [n["id"] for row in metrics["gallery"] for n in row["neighbours"]])
    page = report.page(metrics, pictures, images)
    files = [artifact.write_file(store, f"figures/{name}.png", data) for name, data in pictures.items()]
    files.append(artifact.write_file(store, "report.html", page.encode()))
    files.append(artifact.write_file(store, "metrics.json", canonical(metrics)))
    parents = {"model": metrics["protocol"]["model"], "corpus": metrics["protocol"]["corpus"]}
    settings = json.loads(config.model_dump_json(exclude={"pool"}))
    artifact.publish(
        store,
        Manifest(
            kind="evaluation", project_version=__version__, config=settings, parents=parents, files=tuple(files),
            fingerprint=model.fingerprint,
        ),
    )  # fmt: skip
