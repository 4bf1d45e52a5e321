"""[Ray] `hashray evaluate`: a whole evaluation -> metrics.json, figures and one self-contained page.

DIR/  metrics.json · report.html · figures/*.png · codes/query, codes/database (artifacts) · manifest.json

The queries and the database are encoded (rerun = resume), scored, and put beside the baselines on the
same features of the same rows.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from pydantic import Field, field_validator, model_validator

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, read_table, sha256_hex
from hashray.codes import binarize
from hashray.config import Config
from hashray.data.columns import code_matrix
from hashray.data.corpus import Corpus, open_corpus
from hashray.encode.codes import encode_split
from hashray.encode.features import BATCH_ROWS, features_of_model, trunk_fingerprint
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_free, run_stage
from hashray.errors import InputError, MismatchError, perhaps
from hashray.evaluate.codewords import analyse
from hashray.evaluate.environment import environment
from hashray.evaluate.features import BaselineFeatures
from hashray.evaluate.scoring import (
    CLASS_SPLIT,
    Scenario,
    Side,
    code_sample,
    distance_shares,
    gallery,
    harmonic_means,
    score,
)
from hashray.metrics import TIES, Ranking, code_health, mean_average_precision_float
from hashray.model import Model, load_model
from hashray.progress import Bar, say, show_table
from hashray.report.calibration import baselines_not_beaten
from hashray.storage import join, open_store

HEALTH_ROWS = 256
FLOAT = "float-cosine"
CODEWORD_CLASSES = 1000  # above, a matrix of distances and a graph are no longer looked at
PLACES = {"model", "corpus", "out", "codes", "features", "pool", "max_bad"}  # what no number depends on
TRAINING = ("train_rows", "labelled_rows", "phases", "rounds", "best_round", "best_at", "validation_map")


class EvaluateConfig(Config):
    """Score a model on a corpus, beside the baselines, and write a page about it."""

    model: str = Field(description="Trained model, local folder or s3:// url")
    corpus: str = Field(description="Corpus, local folder or s3:// url")
    out: str = Field(description="Folder or s3:// url of metrics.json and report.html")
    top_k: int | None = Field(None, description="R of mAP@R; unset: the whole ranking")
    ties: str = Field("expected", description=f"Convention for equal distances: {', '.join(TIES)}")
    query_split: str = Field("query", description="Split of the queries")
    database_split: str = Field("database", description="Split of the rows that are ranked")
    codes: str | None = Field(None, description="Codes of the database split, if they exist already")
    features: str | None = Field(None, description="Cached features of a frozen trunk; unset: inside the corpus")
    baselines: bool = Field(
        True,
        description="Whether baselines on the same features are scored too (docs/INDEX.md names them)",
    )
    baseline_limit: int = Field(200_000, ge=1, description="Rows above which baselines are left out")
    baseline_train_rows: int = Field(50_000, ge=1, description="Most train rows that baselines are fitted on")
    gallery: int = Field(12, ge=0, description="Queries shown on the page, a quarter of them the hardest")
    seed: int = Field(0, ge=0, description="Seed of the baselines, the gallery and the sample of codes")
    max_bad: float = Field(0.05, ge=0, le=1, description="Share of rows that may go to quarantine")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()

    @field_validator("ties")
    @classmethod
    def _known_ties(cls, value: str) -> str:
        if value not in TIES:
            raise ValueError(f"no convention is called {value!r}{perhaps(value, TIES) or '.'} Known: {', '.join(TIES)}")
        return value

    @field_validator("top_k")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1 and value != -1:
            raise ValueError("R must be at least 1 (or -1, as deephash_pytorch writes the whole ranking)")
        return value

    @model_validator(mode="after")
    def _minus_one_is_of_one_convention(self) -> EvaluateConfig:
        if self.top_k == -1 and self.ties != "deephash_pytorch":
            raise ValueError('top_k = -1 is of ties = "deephash_pytorch"; leave it out to rank the whole database')
        return self


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the stage; return what metrics.json holds. Rerun = resume: what is finished is shown again.

    A corpus of protocol class-split is scored three times: within the seen classes, across to those never trained on,
    and generalised, unseen queries in a database of all; `scenario` names which in each result.

    Raises:
        InputError: no query or database rows, or a ties name that is not known.
        AlreadyExists: `out` holds an evaluation of another model, corpus or protocol.
    """
    return evaluate_on(config, load_model(config.model, device="cpu"), open_corpus(config.corpus))


def evaluate_on(config: EvaluateConfig, model: Model, corpus: Corpus, features: Corpus | None = None) -> dict[str, Any]:
    """Score an open model on an open corpus; as `evaluate`.

    Args:
        features: cached features of the model's frozen trunk, where they are open already.
    """
    scenarios = _scenarios(config, corpus)
    store = open_store(config.out)
    settings = config.model_dump(mode="json", exclude=PLACES)
    plan = sha256_hex(canonical([model.manifest.id, corpus.manifest.id, settings]))[:16]

    def work() -> Manifest:
        metrics = _measured(config, model, corpus, features, scenarios)
        return _write(config, plan, corpus, model, metrics)

    manifest = run_stage(store, "evaluation", plan, work)
    artifact.write_plain(store, manifest)
    metrics = json.loads(artifact.read_file(store, manifest.record("metrics.json")))
    _show(config, metrics["results"])
    return metrics


def _measured(
    config: EvaluateConfig, model: Model, corpus: Corpus, features: Corpus | None, scenarios: tuple[Scenario, ...]
) -> dict[str, Any]:
    """The content of metrics.json."""
    if features is None:
        features = features_of_model(model, corpus, config.pool, config.max_bad, config.features)
    name = str(model.method.config.kind)
    query = _encoded(config, model, corpus, features, config.query_split, None)
    database = _encoded(config, model, corpus, features, config.database_split, config.codes)
    protocol = _protocol(config, model, corpus, query, database)
    if config.baselines and len(database.ids) + len(query.ids) <= config.baseline_limit:
        protocol |= _add_baselines(config, model, corpus, features, query, database)
    elif config.baselines:
        say(f"baselines left out: more than --baseline-limit {config.baseline_limit:,} rows")
    results, parts = [], []
    for scenario in scenarios:
        sides = query, database
        if scenario.name:
            sides = tuple(  # type: ignore[assignment]
                side.among(set(corpus.rows(split).ids))
                for side, split in ((query, scenario.query_split), (database, scenario.database_split))
            )
        rows, ranking = _score_all(config, model.num_bits, scenario, *sides)
        results += rows
        parts.append((*sides, ranking))
    first_query, first_database, ranking = parts[0]
    results[0]["code_health"] |= _logit_health(model, corpus, config.query_split, set(query.ids))
    metrics: dict[str, Any] = {
        "protocol": protocol,
        "environment": environment(),
        "results": results,
        "distances": distance_shares(ranking),
        "sample": code_sample(query, name, config.seed),
        "classes": corpus.classes,
        "gallery": gallery(
            name, first_query, first_database, ranking, corpus.classes, config.gallery, config.seed
        ),
        "training": _training(model),
    }  # fmt: skip
    means = harmonic_means(results)
    return metrics | ({"harmonic_mean": means} if means else {}) | _codewords(config, model, corpus)


def _training(model: Model) -> dict[str, Any]:
    """The training of the model, as far as a reader needs it."""
    kept = {key: model.manifest.info[key] for key in TRAINING if key in model.manifest.info}
    return kept | {"config": model.manifest.config, "trunk": trunk_fingerprint(model.method.trunk)}


def _codewords(config: EvaluateConfig, model: Model, corpus: Corpus) -> dict[str, Any]:
    """Distances and communities of the class codewords, of the classes that have train rows; {} without any."""
    words = model.method.class_codes()
    taught = np.flatnonzero(corpus.rows("train").labels.any(0))
    if words is None or not 1 < len(taught) <= CODEWORD_CLASSES:
        return {}
    if model.classes != corpus.classes:
        say("codewords left out: the model was trained on other classes than the corpus has")
        return {}
    names = [corpus.classes[i] for i in taught]
    return {"codewords": analyse(words[taught], names, model.num_bits, config.seed)}


def _show(config: EvaluateConfig, results: list[dict[str, Any]]) -> None:
    """Print the tables of results and the place of the page."""
    depth = f"mAP@{config.top_k}" if config.top_k else "mAP"
    for scenario in dict.fromkeys(row.get("scenario", "") for row in results):
        rows = [row for row in results if row.get("scenario", "") == scenario]
        table = [[row["name"], str(row["num_bits"] or "float"), f"{row['mAP']:.4f}"] for row in rows]
        title = f"{rows[0]['queries']:,} queries, {rows[0]['database']:,} rows"
        show_table(f"{scenario}: {title}" if scenario else title, ["method", "bits", depth], table)
        if reached := baselines_not_beaten(rows):
            say(f"{rows[0]['name']} is not above {', '.join(reached)} on the same features")
    say(f"the page: {join(config.out, 'report.html')}")


def _scenarios(config: EvaluateConfig, corpus: Corpus) -> tuple[Scenario, ...]:
    """The scenarios to score, after checking that the corpus has rows and labels for them."""
    if not corpus.num_classes:
        raise InputError(f"{config.corpus} has no labels, and without them no row is relevant to any; ingest them too")
    if config.baselines and not corpus.count("train"):
        raise InputError(f"{config.corpus} has no train rows to fit the baselines on; give --no-baselines")
    splits = (config.query_split, config.database_split)
    scenarios: tuple[Scenario, ...] = (Scenario("", *splits),)
    if corpus.manifest.config.get("split_protocol") == "class-split" and splits == ("query", "database"):
        scenarios = CLASS_SPLIT
    for scenario in scenarios:
        for split in (scenario.query_split, scenario.database_split):
            corpus.require(split, "evaluation")
    return scenarios


def _score_all(
    config: EvaluateConfig, num_bits: int, scenario: Scenario, query: Side, database: Side
) -> tuple[list[dict[str, Any]], Ranking]:
    """Results of every method that both sides have, ours first, and our ranking."""
    results: list[dict[str, Any]] = []
    first: Ranking | None = None
    where: dict[str, Any] = {"queries": len(query.ids), "database": len(database.ids)}
    where |= {"scenario": scenario.name} if scenario.name else {}
    title = f"score {scenario.name}".strip()
    with Bar(title, len(query.values), "methods") as bar:
        for name, values in query.values.items():
            if name == FLOAT:
                sides = values, query.labels, database.values[name], database.labels
                mean = mean_average_precision_float(*sides, None if config.top_k == -1 else config.top_k)
                results.append(
                    {"name": name, "num_bits": None, "top_k": config.top_k, "ties": None, "mAP": mean} | where
                )
            else:
                row, ranking = score(name, num_bits, query, database, config.top_k, config.ties)
                results.append(row | where)
                first = first or ranking
            bar.add(1)
    assert first is not None
    return results, first


def _encoded(
    config: EvaluateConfig, model: Model, corpus: Corpus, features: Corpus | None, split: str, given: str | None
) -> Side:
    """The rows of a split that have a code and a known label, in the codes' order."""
    store = open_store(given or join(config.out, "codes", split))
    if given is None:
        manifest = encode_split(
            model, corpus, features, store, split, BATCH_ROWS, config.max_bad, config.pool
        )  # fmt: skip
    else:
        manifest = artifact.load_manifest(store, "codes")
        made_from = (manifest.parents["model"], manifest.parents["corpus"], manifest.info["split"])
        if made_from != (model.manifest.id, corpus.manifest.id, split):
            raise MismatchError(
                f"{store.url} are not the codes of the {split!r} rows of {config.corpus} by {config.model}"
            )
    tables = [read_table(store, record) for record in manifest.files if record.name.startswith("parts/")]
    table = pa.concat_tables(tables)
    ids = table.column("id").to_pylist()
    codes = code_matrix(table.column("code"), int(manifest.info["num_bits"]))
    rows = corpus.rows(split)
    place = {row_id: i for i, row_id in enumerate(rows.ids)}
    side = Side(ids, rows.labels[[place[row_id] for row_id in ids]], {model.method.config.kind: codes})
    hidden = corpus.rows("unlabelled")
    unknown = {row_id for row_id, labels in zip(hidden.ids, hidden.labels, strict=True) if not labels.any()}
    known = set(ids) - unknown
    if len(known) < len(ids):
        say(f"{len(ids) - len(known):,} {split} rows are not scored, because their labels are unknown")
    if not known:
        raise InputError(f"{config.corpus} has no {split} row whose labels are known")
    return side.among(known)


def _add_baselines(
    config: EvaluateConfig, model: Model, corpus: Corpus, frozen: Corpus | None, query: Side, database: Side
) -> dict[str, Any]:
    """Fit the baselines on train rows, add their codes to both sides; return the features' name and row count."""
    from hashray.evaluate.baselines import CODE_BASELINES, fit_baselines  # a second of scikit-learn's imports

    features = BaselineFeatures(model, corpus, frozen, config.pool, config.max_bad)
    rows, known = corpus.rows("train"), features.ids("train")
    able = np.array([i for i, row_id in enumerate(rows.ids) if row_id in known])
    chosen = np.sort(np.random.default_rng(config.seed).permutation(able)[: config.baseline_train_rows])
    train = features.of("train", [rows.ids[i] for i in chosen])
    sides = [
        (query, features.of(config.query_split, query.ids)),
        (database, features.of(config.database_split, database.ids)),
    ]
    with Bar("baselines", len(CODE_BASELINES), "methods") as bar:
        for name, baseline in fit_baselines(train, rows.labels[chosen], model.num_bits, config.seed):
            for side, values in sides:
                side.values[name] = baseline.codes(values)
            bar.add(1)
    for side, values in sides:
        side.values[FLOAT] = values
    return {"baseline_features": features.name, "baseline_train_rows": len(chosen)}


def _protocol(config: EvaluateConfig, model: Model, corpus: Corpus, query: Side, database: Side) -> dict[str, Any]:
    settings = corpus.manifest.config
    return {
        "name": settings.get("split_protocol"),
        "queries": len(query.ids),
        "database": len(database.ids),
        "train": corpus.count("train"),
        "classes": corpus.num_classes,
        "query_split": config.query_split,
        "database_split": config.database_split,
        "top_k": config.top_k,
        "ties": config.ties,
        "split_seed": settings.get("seed"),
        "class_split": corpus.manifest.info.get("class_split", {}),
        "train_seed": model.manifest.config.get("seed"),
        "corpus": corpus.manifest.id,
        "model": model.manifest.id,
        "fingerprint": model.fingerprint,
    }


def _logit_health(model: Model, corpus: Corpus, split: str, encoded: set[str]) -> dict[str, float]:
    """How far the logits of some encoded queries lie from 0 (METHODS 6.7), over the first part that has any."""
    tables = (corpus.read_part(record, split) for record in corpus.parts if corpus.count_part(record, split))
    kept = (table.filter(pc.is_in(table.column("id"), pa.array(sorted(encoded)))) for table in tables)
    table = next(table for table in kept if len(table)).slice(0, HEALTH_ROWS)
    logits = model.logits(corpus.inputs(table, model.backbone.image_size, model.backbone.resize))
    whole = code_health(binarize(logits), logits=np.tanh(logits))
    return {name: whole[name] for name in ("near_zero", "quantization", "exact_zeros")}


def _write(config: EvaluateConfig, plan: str, corpus: Corpus, model: Model, metrics: dict[str, Any]) -> Manifest:
    from hashray.report import figures  # half a second of matplotlib's imports
    from hashray.report import page as report_page

    store = open_store(config.out)
    pictures = figures.draw_all(metrics)
    images = corpus.images(config.query_split, [row["query"] for row in metrics["gallery"]])
    images |= corpus.images(config.database_split, [n["id"] for row in metrics["gallery"] for n in row["neighbours"]])
    page = report_page.page(metrics, pictures, images)
    require_free(store, plan)
    files = [artifact.write_named(store, f"figures/{name}.png", data) for name, data in pictures.items()]
    files.append(artifact.write_named(store, "report.html", page.encode()))
    files.append(artifact.write_named(store, "metrics.json", canonical(metrics)))
    parents = {"model": metrics["protocol"]["model"], "corpus": metrics["protocol"]["corpus"]}
    settings = json.loads(config.model_dump_json(exclude={"pool"}))
    return artifact.publish(
        store,
        Manifest(
            kind="evaluation", project_version=__version__, config=settings, parents=parents, files=tuple(files),
            fingerprint=model.fingerprint, info={"plan": plan},
        ),
    )  # fmt: skip
