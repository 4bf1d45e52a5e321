"""[Ray] `hashray pipeline`: images in, searchable index out. Five stages in a row, each resuming by itself."""

from __future__ import annotations

from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray.data.corpus import open_corpus
from hashray.data.ingest import IngestConfig, ingest
from hashray.data.sources import SourceConfig
from hashray.data.splits import SplitConfig
from hashray.encode.codes import encode_split
from hashray.encode.features import BATCH_ROWS, features_of_model
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_no_artifact
from hashray.evaluate.run import EvaluateConfig, evaluate_on
from hashray.index.build import IndexConfig, build_index
from hashray.index.shard import Kind
from hashray.model import load_model
from hashray.progress import say
from hashray.storage import join, open_store
from hashray.train.config import TrainConfig, read_training_config
from hashray.train.rounds import train_model


class PipelineConfig(SplitConfig):
    """Ingest, train, encode, index and evaluate, all below one folder.

    These workers run every stage but training, which has the TOML's.
    """

    config: Annotated[str, tyro.conf.Positional] = Field(description="Training config, TOML")
    source: str = Field(description="Images: folder, list files, Parquet or tar shards; local or s3://")
    out: str = Field(description="Folder or s3:// prefix of corpus, model, codes, index and evaluation")
    reader: Annotated[SourceConfig, tyro.conf.arg(name="")] = SourceConfig()
    max_bad: float | None = Field(
        None, ge=0, le=1, description="Share of rows that may go to quarantine in each stage; unset: the TOML's"
    )
    kind: Kind = Field("flat", description="Kind of the index; flat: exact; ivf: for shards above 5 million rows")
    shards: int | None = Field(None, ge=1, description="Shards of the index; unset: one for 5 million rows")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run the five stages; return the evaluation's metrics, none without labels. Rerun = resume, stage by stage.

    Raises:
        What the stages raise.
    """
    return run_stages(config, read_training_config(config.config))


def run_stages(config: PipelineConfig, training: TrainConfig) -> dict[str, Any]:
    """The stages, with a training config that is read already."""
    require_no_artifact(open_store(config.out), "corpus, model and index")
    max_bad = training.max_bad if config.max_bad is None else config.max_bad
    at = {name: join(config.out, name) for name in ("corpus", "model", "codes", "index", "evaluation")}
    ingest(
        IngestConfig(
            source=config.source, out=at["corpus"], reader=config.reader, max_bad=max_bad, pool=config.pool,
            **{name: getattr(config, name) for name in SplitConfig.model_fields},
        )
    )  # fmt: skip
    train_model(training.model_copy(update={"corpus": at["corpus"], "out": at["model"], "max_bad": max_bad}))
    model, corpus = load_model(at["model"], device="cpu"), open_corpus(at["corpus"])
    features = features_of_model(model, corpus, config.pool, max_bad, training.features)
    codes = open_store(at["codes"])
    encode_split(model, corpus, features, codes, "database", BATCH_ROWS, max_bad, config.pool)
    shards = IndexConfig(
        codes=at["codes"], out=at["index"], kind=config.kind, shards=config.shards, attributes=at["corpus"],
        pool=config.pool,
    )  # fmt: skip
    build_index(shards)
    if not corpus.num_classes:
        say(f"no evaluation: {at['corpus']} has no labels, and without them no row is known to be relevant to another")
        return {}
    evaluation = EvaluateConfig(
        model=at["model"], corpus=at["corpus"], codes=at["codes"], features=features and features.store.url,
        out=at["evaluation"], max_bad=max_bad, pool=config.pool,
    )  # fmt: skip
    return evaluate_on(evaluation, model, corpus, features)
