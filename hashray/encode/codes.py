"""[Ray] `hashray encode`: model + corpus -> packed codes, every row once.

codes/  parts/part-00000.parquet … (id, code) · quarantine.parquet · manifest.json

A unit is one part of the corpus, read, decoded, encoded and written by one actor of a pool: at most
one part a worker is encoded again after a kill.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from hashray.encode.features import lost_before, map_part, trunk_fingerprint, worker_device
from hashray.engine.parts import BadRow, PartWorker, already_made, run_parts, write_quarantine
from hashray.engine.session import WorkersConfig, connect
from hashray.errors import MismatchError
from hashray.model import load_model
from hashray.progress import say
from hashray.storage import absolute, open_store


class EncodeConfig(Config):
    """Encode the rows of a corpus into packed codes."""

    model: str = Field(description="model, local folder or s3:// url")
    corpus: str = Field(description="corpus, local folder or s3:// url")
    out: str = Field(description="where the codes go")
    features: str | None = Field(None, description="cached features of the model's frozen trunk, instead of the images")
    split: str = Field("database", description="train, query, database, unlabelled, validation or all")
    batch_size: int = Field(64, ge=1, description="images in memory at a time, a worker")
    max_bad: float = Field(0.05, ge=0, le=1, description="share of rows that may be quarantined")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


class _EncodeWorker(PartWorker):
    runs_trunk = True

    def __init__(self, model: str, source: str, split: str, batch_size: int, gpu: bool) -> None:
        self.model = load_model(model, device=worker_device(gpu).type)
        self.corpus, self.split, self.batch_size = open_corpus(source, None), split, batch_size

    def process(self, unit: Mapping[str, Any]) -> tuple[pa.Table, list[BadRow], dict[str, Any], dict[str, Any]]:
        bad: list[BadRow] = []
        table = self.corpus.read_part(self.corpus.manifest.record(unit["part"]), self.split)
        if "feature" in table.column_names:
            rows, codes = table, binarize(self.model.logits(list_matrix(table.column("feature"))))
        else:
            trunk = self.model.backbone
            rows, codes, bad = map_part(table, trunk.image_size, trunk.resize, self._codes, self.batch_size)
        column = bytes_column(codes.reshape(len(rows), self.model.num_bits // 8))
        return pa.table({"id": rows.column("id"), "code": column}), bad, {}, {}

    def _codes(self, pixels: Pixels) -> Codes:
        return binarize(self.model.logits(pixels))


def _features(config: EncodeConfig, corpus: Corpus) -> Corpus:
    """The cached features, after checking that they are this corpus through this model's trunk."""
    found = open_corpus(str(config.features), "features")
    trunk = load_model(config.model, device="cpu").method.trunk
    if not trunk.config.frozen:
        raise MismatchError(f"{config.model} has trained its trunk: cached features do not apply; leave out --features")
    if found.manifest.parents["corpus"] != corpus.manifest.id or found.manifest.fingerprint != trunk_fingerprint(trunk):
        raise MismatchError(
            f"{config.features} are not the features of {config.corpus} through the trunk of {config.model}; "
            "leave out --features, or name those that training made"
        )
    return found


def encode(config: EncodeConfig) -> Manifest:
    """Run the stage; return the manifest of the codes. Rerun = resume.

    Raises:
        InputError: no such model, corpus or rows. TooManyBadRows: above `max_bad`.
        AlreadyExists: `out` holds codes of another model, corpus or split.
    """
    model, corpus = artifact.load_manifest(config.model, "model"), open_corpus(config.corpus)
    parents = {"model": model.id, "corpus": corpus.manifest.id}
    source = corpus
    if config.features is not None:
        source = _features(config, corpus)
        parents["features"] = source.manifest.id
    total = corpus.require(config.split, "encoding")
    num_bits = int(model.config["method"]["num_bits"])
    plan = sha256_hex(f"codes {parents} {config.split}".encode())[:16]
    store = open_store(config.out)
    made = already_made(store, "codes", plan)
    if made is not None:
        return made
    connect()
    chosen = [record for record in source.parts if source.count_part(record, config.split)]
    units = [
        {"index": i, "rows": source.count_part(record, config.split), "part": record.name}
        for i, record in enumerate(chosen)
    ]
    arguments = {
        "model": absolute(config.model), "source": source.store.url, "split": config.split,
        "batch_size": config.batch_size, "gpu": config.pool.gpus_per_worker > 0,
    }  # fmt: skip
    parts = run_parts(store, plan, units, _EncodeWorker, arguments, config.pool, "encode", config.max_bad)
    gone = lost_before(source, corpus, config.split) if source is not corpus else []
    bad = sum(len(part.bad) for part in parts) + len(gone)
    manifest = artifact.publish(
        store,
        Manifest(
            kind="codes", project_version=__version__, config={"split": config.split},
            parents=parents, fingerprint=model.fingerprint,
            columns={"id": "string", "code": f"fixed_size_binary[{num_bits // 8}]"}, bit_order=BIT_ORDER,
            rows_in=total, rows_out=total - bad, rows_quarantined=bad,
            files=(*[part.file for part in parts], write_quarantine(store, parts, gone)),
            info={"plan": plan, "num_bits": num_bits, "split": config.split},
        ),
    )  # fmt: skip
    store.clear("progress/")
    say(f"{config.out}: {total:,} rows in = {total - bad:,} codes out + {bad:,} quarantined")
    return manifest
