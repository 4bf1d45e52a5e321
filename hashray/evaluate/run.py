"""[Ray] `hashray evaluate`: a whole evaluation -> metrics.json, figures and one self-contained page.

DIR/  metrics.json · report.html · figures/*.png and *.svg · codes/query, codes/database (artifacts) · manifest.json

The queries and the database are encoded (rerun = resume), scored, and put beside the baselines on the
same features of the same rows.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from pydantic import Field, field_validator, model_validator

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, sha256_hex
from hashray.config import Config
from hashray.data.corpus import Corpus, open_corpus
from hashray.encode.codes import encode_split
from hashray.encode.features import BATCH_ROWS, features_of_model, trunk_fingerprint
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_free, run_stage
from hashray.errors import InputError, MismatchError, perhaps
from hashray.evaluate.confusion import confusions
from hashray.evaluate.counts import Scan, Scanner, Target, sample_places, scanner
from hashray.evaluate.environment import environment
from hashray.evaluate.features import BaselineFeatures
from hashray.evaluate.inspection import codewords, logit_health
from hashray.evaluate.scoring import (
    FLOAT,
    GALLERY_NEIGHBOURS,
    Scoring,
    code_sample,
    distance_shares,
    gallery,
    gallery_queries,
    harmonic_means,
)
from hashray.evaluate.sides import CLASS_SPLIT, Near, Scenario, Side, nearest
from hashray.metrics import TIES, Ranking, merge_side
from hashray.model import Model, load_model
from hashray.progress import Bar, say, show_table
from hashray.report.calibration import baselines_not_beaten
from hashray.storage import join, open_store

IN_ORDER_ROWS = 1_000_000  # a ranking of more rows, sorted for every query on one machine, takes hours
PLACES = {"model", "corpus", "out", "codes", "features", "pool", "max_bad"}  # what no number depends on
TRAINING = ("train_rows", "labelled_rows", "phases", "rounds", "best_round", "best_at", "validation_map")


class Shown(NamedTuple):
    """The rows whose images the page shows, by id, each with its part of the corpus."""

    queries: dict[str, int]
    neighbours: dict[str, int]


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
    sample_rows: int = Field(
        100_000,
        ge=1,
        description="Rows drawn of a larger database for baselines and code health, within 512 MiB of features",
    )
    baseline_train_rows: int = Field(50_000, ge=1, description="Most train rows that baselines are fitted on")
    gallery: int = Field(12, ge=0, description="Queries shown on the page: a quarter the best, a quarter the worst")
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
        metrics, shown = _measured(config, model, corpus, features, scenarios)
        return _write(config, plan, corpus, model, metrics, shown)

    manifest = run_stage(store, "evaluation", plan, work)
    artifact.write_plain(store, manifest)
    metrics = json.loads(artifact.read_file(store, manifest.record("metrics.json")))
    _show(config, metrics["results"])
    return metrics


def _measured(
    config: EvaluateConfig, model: Model, corpus: Corpus, features: Corpus | None, scenarios: tuple[Scenario, ...]
) -> tuple[dict[str, Any], Shown]:
    """The content of metrics.json, and where the images of the gallery are."""
    if features is None:
        features = features_of_model(model, corpus, config.pool, config.max_bad, config.features)
    name = str(model.method.config.kind)
    queries = _coded(config, model, corpus, features, config.query_split, None).scan("read queries")
    query = _known(config, queries, config.query_split)
    codes = _coded(config, model, corpus, features, config.database_split, config.codes)
    targets = [
        Target(scenario.database_split, merge_side(side.values[name], side.labels, "query"))
        for scenario in scenarios
        for side in [query.among(scenario.query_split)]
    ]
    learned = BaselineFeatures(model, corpus, features, config.pool, config.max_bad) if config.baselines else None
    size = config.sample_rows if learned is None else min(config.sample_rows, learned.most_rows)
    picks = sample_places(codes.num_rows, size, config.seed)
    counted = codes.scan("count", targets, picks if config.ties == "expected" else None)
    rows = _known(config, counted, config.database_split)
    sample = rows if picks is None or config.ties == "expected" else rows.take(np.isin(counted.places, picks))
    protocol = _protocol(config, model, corpus, len(query.ids), counted.known, len(sample.ids))
    if learned is not None:
        protocol |= _add_baselines(config, model.num_bits, learned, query, sample)
    results: list[dict[str, Any]] = []
    rankings = []
    for scenario, target, table, num_rows in zip(scenarios, targets, counted.tables, counted.rows, strict=True):
        if not num_rows:
            raise InputError(f"{config.corpus} has no {scenario.database_split} row with a code and known labels")
        rankings.append(Ranking.of(target.queries, table))
        sides = query.among(scenario.query_split), sample.among(scenario.database_split)
        whole = rows.among(scenario.database_split) if config.ties != "expected" else None
        scoring = Scoring(model.num_bits, config.top_k, config.ties, scenario.name)
        results += scoring.results(*sides, rankings[-1], num_rows, whole)
    results[0]["code_health"] |= logit_health(model, corpus, config.query_split, query)
    entries, shown = _gallery(
        config, scenarios[0], corpus, query, codes, sample if picks is None else None, rankings[0]
    )
    metrics: dict[str, Any] = {
        "protocol": protocol,
        "environment": environment(),
        "results": results,
        "distances": distance_shares(rankings[0]),
        "sample": code_sample(query, name, config.seed),
        "classes": corpus.classes,
        "gallery": entries,
        "training": _training(model),
    }
    sides = query.among(scenarios[0].query_split), sample.among(scenarios[0].database_split)
    if mixed := confusions(*sides, name, corpus.classes, config.seed):
        metrics["confusions"] = mixed
    means = harmonic_means(results)
    metrics |= {"harmonic_mean": means} if means else {}
    taught, parts = queries.taught | counted.taught, queries.parts | counted.parts
    return metrics | codewords(model.method.class_codes(), model, corpus, taught, parts, config.seed), shown


def _gallery(
    config: EvaluateConfig, scenario: Scenario, corpus: Corpus, query: Side, codes: Scanner, database: Side | None,
    ranking: Ranking,
) -> tuple[list[dict[str, Any]], Shown]:  # fmt: skip
    """The gallery, and the images it shows; `database` is the whole database split, where it was kept."""
    side, name = query.among(scenario.query_split), codes.split.method
    scores = ranking.average_precisions().values
    kinds = gallery_queries(side, scores, config.gallery, config.seed)
    rows = list(kinds)
    wanted = side.values[name][rows]
    if not rows:
        near: list[list[Near]] = []
    elif database is None:
        near = codes.nearest(wanted, scenario.database_split, GALLERY_NEIGHBOURS)
    else:
        near = nearest(wanted, database.among(scenario.database_split), name, GALLERY_NEIGHBOURS)
    entries = gallery(side, kinds, near, scores, corpus.classes)
    queries = {side.ids[row]: int(side.parts[row]) for row in rows}
    return entries, Shown(queries, {hit.id: hit.part for hits in near for hit in hits})


def _training(model: Model) -> dict[str, Any]:
    """The training of the model, as far as a reader needs it."""
    kept = {key: model.manifest.info[key] for key in TRAINING if key in model.manifest.info}
    return kept | {"config": model.manifest.config, "trunk": trunk_fingerprint(model.method.trunk)}


def _show(config: EvaluateConfig, results: list[dict[str, Any]]) -> None:
    """Print the tables of results and the place of the page."""
    depth = f"mAP@{config.top_k}" if config.top_k else "mAP"
    for scenario in dict.fromkeys(row.get("scenario", "") for row in results):
        rows = [row for row in results if row.get("scenario", "") == scenario]
        table = [[row["name"], str(row["num_bits"] or "float"), f"{row['mAP']:.4f}"] for row in rows]
        title = f"{rows[0]['queries']:,} queries, {rows[0]['database']:,} rows"
        if "sample_rows" in rows[0]:
            title += f"; baselines on {rows[0]['sample_rows']:,} of them"
        show_table(f"{scenario}: {title}" if scenario else title, ["method", "bits", depth], table)
        if reached := baselines_not_beaten(rows):
            say(f"{rows[0]['name']} is not above {', '.join(reached)} on the same features")
    say(f"the page: {join(config.out, 'report.html')}")


def _scenarios(config: EvaluateConfig, corpus: Corpus) -> tuple[Scenario, ...]:
    """The scenarios to score, after checking that the corpus has rows and labels for them."""
    if not corpus.num_classes:
        raise InputError(
            f"{config.corpus} has no labels. Every score needs them, because a row is relevant to a query where they "
            "share a class: ingest the images with labels. Index and search need none"
        )
    if config.baselines and not corpus.count("train"):
        raise InputError(f"{config.corpus} has no train rows to fit the baselines on; give --no-baselines")
    num_rows = corpus.count(config.database_split)
    if config.ties != "expected" and num_rows > IN_ORDER_ROWS:
        raise InputError(
            f"ties {config.ties!r} depends on the order of the database, so one machine must hold and sort the whole "
            f"ranking: allowed up to {IN_ORDER_ROWS:,} rows, {config.database_split!r} of {config.corpus} has "
            f'{num_rows:,}. Use ties "expected", which is exact for any number, or a smaller --database-split'
        )
    splits = (config.query_split, config.database_split)
    scenarios: tuple[Scenario, ...] = (Scenario("", *splits),)
    if corpus.manifest.config.get("split_protocol") == "class-split" and splits == ("query", "database"):
        scenarios = CLASS_SPLIT
    for scenario in scenarios:
        for split in (scenario.query_split, scenario.database_split):
            corpus.require(split, "evaluation")
    return scenarios


def _coded(
    config: EvaluateConfig, model: Model, corpus: Corpus, features: Corpus | None, split: str, given: str | None
) -> Scanner:
    """The codes of a split, encoded here if they are not given."""
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
    return scanner(corpus, store, manifest, str(model.method.config.kind), config.pool)


def _known(config: EvaluateConfig, scan: Scan, split: str) -> Side:
    """The rows that a scan kept, after saying how many it left out."""
    if scan.hidden:
        say(f"{scan.hidden:,} {split} rows are not scored, because their labels are unknown")
    if not scan.known:
        raise InputError(f"{config.corpus} has no {split} row whose labels are known")
    return scan.side


def _add_baselines(
    config: EvaluateConfig, num_bits: int, features: BaselineFeatures, query: Side, database: Side
) -> dict[str, Any]:
    """Fit the baselines on train rows, add their codes to both sides; return the features' name and row count."""
    from hashray.evaluate.baselines import CODE_BASELINES, fit_baselines  # a second of scikit-learn's imports

    train, labels = features.train(min(config.baseline_train_rows, features.most_rows), config.seed)
    sides = [
        (query, features.of(config.query_split, query)),
        (database, features.of(config.database_split, database)),
    ]
    with Bar("baselines", len(CODE_BASELINES), "methods") as bar:
        for name, baseline in fit_baselines(train, labels, num_bits, config.seed, without=set(query.values)):
            for side, values in sides:
                side.values[name] = baseline.codes(values)
            bar.add(1)
    for side, values in sides:
        side.values[FLOAT] = values
    return {"baseline_features": features.name, "baseline_train_rows": len(train)}


def _protocol(
    config: EvaluateConfig, model: Model, corpus: Corpus, queries: int, database: int, sample: int
) -> dict[str, Any]:
    settings = corpus.manifest.config
    return {
        "name": settings.get("split_protocol"),
        "queries": queries,
        "database": database,
        "sample_rows": sample,
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


def _write(
    config: EvaluateConfig, plan: str, corpus: Corpus, model: Model, metrics: dict[str, Any], shown: Shown
) -> Manifest:
    from hashray.report import drawn  # half a second of matplotlib's imports
    from hashray.report import page as report_page

    store = open_store(config.out)
    pictures = drawn.draw_all(metrics)
    images: dict[str, bytes] = {}
    for split, parts in ((config.query_split, shown.queries), (config.database_split, shown.neighbours)):
        images |= corpus.images(split, list(parts), [corpus.parts[i] for i in sorted(set(parts.values()))])
    page = report_page.page(metrics, pictures, images)
    require_free(store, plan)
    files = [artifact.write_named(store, name, data) for name, data in drawn.files(pictures).items()]
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
