"""[Ray] `hashray encode`: model + corpus -> packed codes, every row once.

codes/  parts/part-00000.parquet … (id, code) · quarantine.parquet · manifest.json

A part of the corpus is read, decoded, encoded and written by one actor of a pool: at most one part a
worker is encoded again after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import pyarrow as pa
import tyro
from pydantic import Field

from hashray import __version__, artifact
from hashray.artifact import Manifest, sha256_hex
from hashray.codes import BIT_ORDER, Codes, binarize
from hashray.config import Config
from hashray.data.columns import bytes_column, list_matrix
from hashray.data.corpus import Corpus, open_corpus
from hashray.data.images import Pixels
from hashray.encode.features import TrunkWorker, is_short, lost_before, map_part, trunk_fingerprint
from hashray.engine.parts import BadRow, Output, run_parts, write_quarantine
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import run_stage
from hashray.errors import MismatchError
from hashray.model import Model, load_model
from hashray.progress import say
from hashray.storage import Store, open_store


class EncodeConfig(Config):
    """Encode the rows of a corpus into packed codes."""

    model: str = Field(description="Trained model, local folder or s3:// url")
    corpus: str = Field(description="Corpus, local folder or s3:// url")
    out: str = Field(description="Folder or s3:// url of the codes")
    features: str | None = Field(
        None, description="Cached features of the model's frozen trunk, read instead of images"
    )
    split: str = Field("database", description="Rows to encode: train, query, database, unlabelled, validation or all")
    batch_size: int = Field(64, ge=1, description="Images in memory at a time in each worker")
    max_bad: float = Field(0.05, ge=0, le=1, description="Share of rows that may go to quarantine")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


class _EncodeWorker(TrunkWorker):
    def __init__(self, model: str, source: str, split: str, batch_size: int, gpu: bool) -> None:
        super().__init__(gpu)
        self.model = load_model(model, device=self.device.type)
        self.corpus, self.split, self.batch_size = open_corpus(source, None), split, batch_size

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        bad: list[BadRow] = []
        table = self.corpus.read_part(self.corpus.manifest.record(unit["part"]), self.split)
        if "feature" in table.column_names:
            rows, codes = table, binarize(self.model.logits(list_matrix(table.column("feature"))))
        else:
            trunk = self.model.backbone
            rows, codes, bad = map_part(table, trunk.image_size, trunk.framing, self._codes, self.batch_size, advance)
        column = bytes_column(codes.reshape(len(rows), self.model.num_bits // 8))
        return Output(pa.table({"id": rows.column("id"), "code": column}), bad)

    def _codes(self, pixels: Pixels) -> Codes:
        return binarize(self.model.logits(pixels))


def _require_features_of(model: Model, corpus: Corpus, features: Corpus) -> None:
    """Refuse cached features that are not this corpus through this model's trunk."""
    trunk = model.method.trunk
    if not trunk.config.frozen:
        raise MismatchError(f"{model.url} has trained its trunk: cached features do not apply; leave out --features")
    parents = features.manifest.parents
    if parents["corpus"] != corpus.manifest.id or features.manifest.fingerprint != trunk_fingerprint(trunk):
        raise MismatchError(
            f"{features.store.url} are not the features of {corpus.store.url} through the trunk of {model.url}; "
            "leave out --features, or name those that training made"
        )


def encode(config: EncodeConfig) -> Manifest:
    """Run the stage; return the manifest of the codes. Rerun = resume.

    Raises:
        InputError: no such model, corpus or rows. TooManyBadRows: above `max_bad`.
        AlreadyExists: `out` holds codes of another model, corpus or split.
    """
    model, corpus = load_model(config.model, device="cpu"), open_corpus(config.corpus)
    features = None if config.features is None else open_corpus(config.features, "features")
    if features is not None:
        _require_features_of(model, corpus, features)
    return encode_split(
        model, corpus, features, open_store(config.out), config.split, config.batch_size, config.max_bad, config.pool
    )


def encode_split(
    model: Model,
    corpus: Corpus,
    features: Corpus | None,
    store: Store,
    split: str,
    batch_size: int,
    max_bad: float,
    pool: WorkersConfig,
) -> Manifest:
    """Encode a split of an open corpus, from its images or its cached features, into a store; as `encode`."""
    parents = {"model": model.manifest.id, "corpus": corpus.manifest.id}
    source = corpus
    if features is not None:
        source = features
        parents["features"] = features.manifest.id
    total = corpus.require(split, "encoding")
    plan = sha256_hex(f"codes {parents} {split}".encode())[:16]

    def work() -> Manifest:
        chosen = [record for record in source.parts if source.count_part(record, split)]
        units = [
            {"index": i, "rows": source.count_part(record, split), "part": record.name}
            for i, record in enumerate(chosen)
        ]
        arguments = {
            "model": model.url, "source": source.store.url, "split": split, "batch_size": batch_size,
            "gpu": pool.gpus_per_worker > 0,
        }  # fmt: skip
        short = is_short(source, split, model.backbone.image_size)
        parts = run_parts(store, plan, units, _EncodeWorker, arguments, pool, "encode", max_bad, short)
        gone = lost_before(features, corpus, split) if features is not None else []
        bad = sum(len(part.bad) for part in parts) + len(gone)
        manifest = artifact.publish(
            store,
            Manifest(
                kind="codes", project_version=__version__, config={"split": split},
                parents=parents, fingerprint=model.fingerprint,
                columns={"id": "string", "code": f"fixed_size_binary[{model.num_bits // 8}]"}, bit_order=BIT_ORDER,
                rows_in=total, rows_out=total - bad, rows_quarantined=bad,
                files=(*[part.file for part in parts], write_quarantine(store, parts, gone)),
                info={"plan": plan, "num_bits": model.num_bits, "split": split},
            ),
        )  # fmt: skip
        store.clear("progress/")
        say(f"{store.url}: {total:,} rows in = {total - bad:,} codes out + {bad:,} quarantined")
        return manifest

    return run_stage(store, "codes", plan, work)
