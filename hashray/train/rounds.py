"""[Ray] Self-training: train a model, label the unlabelled split with it, train again, in rounds (METHODS 2.5).

Round 0 trains <out>/rounds/0/model on the labelled rows. In round r, the model of round r - 1 labels every unlabelled
row again (<out>/rounds/r/pseudo-labels), and a new model (<out>/rounds/r/model) continues from its weights. Each is an
artifact, so a rerun keeps what a killed run finished. The model with the best validation mAP is published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, read_table, sha256_hex, table_bytes
from hashray.config import require_path
from hashray.data.columns import list_column, list_matrix
from hashray.data.corpus import Corpus, open_corpus
from hashray.encode.features import BATCH_ROWS, TrunkWorker, features_of_model, is_short, lost_before, map_part
from hashray.engine.parts import BadRow, Output, Part, run_parts, write_quarantine
from hashray.engine.stage import run_stage
from hashray.model import Model, load_model
from hashray.progress import say
from hashray.storage import Store, join, open_store
from hashray.train.assembly import load_rows
from hashray.train.batches import held_out
from hashray.train.config import SelfTrainingConfig, TrainConfig
from hashray.train.job import require_labels, require_validation, run_of, with_epochs_for
from hashray.train.precision import with_precision
from hashray.train.pseudo import Shape, accept, falls_of, fit_temperature, most_per_class, precision, propose
from hashray.train.run import open_init, pool_of, train, train_on, with_absolute_paths, workers_multiply_bf16
from hashray.train.selection import ACCEPTED


def train_model(config: TrainConfig) -> Manifest:
    """`hashray train`: one training, or with `self_training` rounds of it. Rerun = resume.

    Raises:
        InputError: no corpus, no train rows, no unlabelled rows for self-training, or weights that do not fit.
        AlreadyExists: `out` holds a model of another config or corpus.
    """
    return train(config) if config.self_training is None else _self_train(config, config.self_training)


def _self_train(config: TrainConfig, rounds: SelfTrainingConfig) -> Manifest:
    config = with_absolute_paths(config)
    out = require_path(config.out, "--out")
    corpus = open_corpus(require_path(config.corpus, "--corpus"))
    corpus.require("unlabelled", "self-training")
    require_validation(config, corpus, "self-training chooses its round")
    config = with_epochs_for(config, corpus)
    run, parents = run_of(config, corpus, open_init(config))
    store = open_store(out)

    def work() -> Manifest:
        require_labels(config, corpus)
        Shape.of(corpus.rows("train").labels, rounds.top_classes, rounds.bottom_classes)  # before hours of round 0
        decided = with_precision(config, store, run, partial(workers_multiply_bf16, config))
        models, history = _train_rounds(decided, rounds, corpus)
        best = max(range(len(models)), key=lambda i: (models[i][1].info["validation_map"], -i))
        of_rounds = {f"round-{number}": manifest.id for number, (_, manifest) in enumerate(models)}
        info = {"run": run, "rounds": history, "best_round": best}
        manifest = _publish(out, models[best], decided.result_of(), parents | of_rounds, info)
        store.clear("progress/")
        return manifest

    return run_stage(store, "model", run, work, "run")


def _train_rounds(
    config: TrainConfig, rounds: SelfTrainingConfig, corpus: Corpus
) -> tuple[list[tuple[str, Manifest]], list[dict[str, Any]]]:
    """Train round after round; return the url and manifest of each round's model, and what each round labelled."""
    out, unlabelled = str(config.out), corpus.count("unlabelled")
    plain = config.model_copy(update={"self_training": None})
    place = join(out, "rounds", "0", "model")
    models = [(place, train_on(plain.model_copy(update={"out": place}), corpus))]
    history: list[dict[str, Any]] = []
    for number in range(1, rounds.rounds + 1):
        folder = join(out, "rounds", str(number))
        pseudo = pseudo_label(load_model(models[-1][0], device="cpu"), corpus, config, rounds, folder)
        if not pseudo.info["summary"]["accepted"]:
            say(f"stopped: no row reached the confidence of {rounds.threshold:g} in round {number}")
            break
        line = {"round": number, "unlabelled": unlabelled, **pseudo.info["summary"]}
        optim = config.optim.model_copy(update={"lr": config.optim.lr * rounds.lr_factor})
        update = {
            "out": join(folder, "model"), "init": models[-1][0], "pseudo_labels": join(folder, "pseudo-labels"),
            "epochs": rounds.epochs or config.num_epochs, "optim": optim,
        }  # fmt: skip
        models.append((join(folder, "model"), train_on(plain.model_copy(update=update), corpus)))
        before, after = (manifest.info["validation_map"] for _, manifest in models[-2:])
        history.append({**line, "validation_map": after, "before": before})
        right = "" if line["precision"] is None else f", {line['precision']:.1%} of their labels true"
        say(f"round {number}: {line['accepted']:,} of {unlabelled:,} rows accepted{right}")
        say(f"round {number}: validation mAP {before:.4f} -> {after:.4f}")
        falls = falls_of([manifest.info["validation_map"] for _, manifest in models])
        if falls >= rounds.most_falls:
            say(f"stopped: the validation mAP has fallen {falls} times")
            break
    return models, history


def _publish(
    out: str, chosen: tuple[str, Manifest], config: dict[str, Any], parents: dict[str, str], info: dict[str, Any]
) -> Manifest:
    """Publish the chosen round's model as the model of the whole run: the same files, the run's own manifest."""
    store, source = open_store(out), open_store(chosen[0])
    files = tuple(
        artifact.write_file(store, record.name, artifact.read_file(source, record)) for record in chosen[1].files
    )
    update = {"files": files, "config": config, "parents": parents, "info": {**chosen[1].info, **info}}
    manifest = artifact.publish(store, chosen[1].model_copy(update=update))
    say(f"{out}: model {manifest.id[:12]} of round {info['best_round']}")
    return manifest


class _ProposalWorker(TrunkWorker):
    def __init__(self, model: str, source: str, temperature: float, shape: Shape, gpu: bool) -> None:
        super().__init__(gpu)
        self.model = load_model(model, device=self.device.type)
        self.corpus, self.temperature, self.shape = open_corpus(source, None), temperature, shape

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        table = self.corpus.read_part(self.corpus.manifest.record(unit["part"]), "unlabelled")
        bad: list[BadRow] = []
        if "feature" in table.column_names:
            rows, scores = table, self.model.class_scores(list_matrix(table.column("feature")))
        else:
            trunk = self.model.backbone
            rows, scores, bad = map_part(
                table, trunk.image_size, trunk.framing, self.model.class_scores, BATCH_ROWS, advance
            )
        proposals = propose(scores.reshape(len(rows), self.corpus.num_classes), self.temperature, self.shape)
        columns = {
            "id": rows.column("id"),
            "labels": list_column(proposals.labels),
            "confidence": pa.array(proposals.confidence, pa.float64()),
            "hidden": list_column(self.corpus.label_matrix(rows).astype(np.int8)),
        }
        return Output(pa.table(columns), bad)


def pseudo_label(
    model: Model, corpus: Corpus, config: TrainConfig, rounds: SelfTrainingConfig, folder: str
) -> Manifest:
    """Propose labels for every unlabelled row with a model, and accept the confident ones. Rerun = resume."""
    features = features_of_model(model, corpus, pool_of(config), config.max_bad, config.features)
    train_labels = corpus.rows("train").labels
    shape = Shape.of(train_labels, rounds.top_classes, rounds.bottom_classes)
    # What this round's labels depend on, as the config asks for it: a fitted number may differ in its last digit.
    asked = rounds.model_dump(mode="json", include={"temperature", "threshold", "balance"})
    settings = {**asked, **asdict(shape), "validation_rows": config.validation_rows, "seed": config.seed}
    plan = sha256_hex(canonical([model.manifest.id, corpus.manifest.id, settings]))[:16]
    store = open_store(join(folder, "pseudo-labels"))

    def work() -> Manifest:
        temperature = _kept_temperature(store, plan, model, features or corpus, config, rounds)
        parts = _propose_all(store, plan, model, features or corpus, config, temperature, shape)
        table = pa.concat_tables([read_table(store, part.file) for part in parts]).combine_chunks()
        most = most_per_class(train_labels, len(table), rounds.balance)
        labels, confidence = list_matrix(table.column("labels")), table.column("confidence").to_numpy()
        accepted = accept(table.column("id").to_pylist(), labels, confidence, rounds.threshold, most)
        kept = table.filter(pa.array(accepted))
        proposed, hidden = list_matrix(kept.column("labels")), list_matrix(kept.column("hidden"))
        summary = {
            "accepted": len(kept), "temperature": temperature,
            "precision": precision(proposed, hidden.astype(np.uint8)), "per_class": (proposed == 1).sum(0).tolist(),
        }  # fmt: skip
        accepted_rows = kept.select(["id", "labels"]).rename_columns(["accepted", "labels"])
        record = artifact.write_named(store, ACCEPTED, table_bytes(accepted_rows), rows=len(kept))
        gone = lost_before(features, corpus, "unlabelled") if features is not None else []
        bad = sum(len(part.bad) for part in parts) + len(gone)
        rows_in = corpus.count("unlabelled")
        manifest = artifact.publish(
            store,
            Manifest(
                kind="pseudo-labels", project_version=__version__, config=settings,
                parents={"model": model.manifest.id, "corpus": corpus.manifest.id}, fingerprint=model.fingerprint,
                columns={name: str(table.schema.field(name).type) for name in table.column_names},
                rows_in=rows_in, rows_out=rows_in - bad, rows_quarantined=bad,
                files=(*[part.file for part in parts], record, write_quarantine(store, parts, gone)),
                info={"plan": plan, "summary": summary},
            ),
        )  # fmt: skip
        store.clear("progress/")
        return manifest

    return run_stage(store, "pseudo-labels", plan, work)


def _propose_all(
    store: Store, plan: str, model: Model, source: Corpus, config: TrainConfig, temperature: float, shape: Shape
) -> list[Part]:
    """Propose labels for every unlabelled row, part by part."""
    chosen = [record for record in source.parts if source.count_part(record, "unlabelled")]
    units = [
        {"index": i, "rows": source.count_part(record, "unlabelled"), "part": record.name}
        for i, record in enumerate(chosen)
    ]
    arguments = {
        "model": model.url, "source": source.store.url, "temperature": temperature, "shape": shape, "gpu": config.gpu,
    }  # fmt: skip
    short = is_short(source, "unlabelled", model.backbone.image_size)
    pool = pool_of(config)
    return run_parts(store, plan, units, _ProposalWorker, arguments, pool, "pseudo-label", config.max_bad, short)


def _kept_temperature(
    store: Store, plan: str, model: Model, source: Corpus, config: TrainConfig, rounds: SelfTrainingConfig
) -> float:
    """The temperature of this round, worked out once: a resumed run takes the same."""
    key = f"progress/temperature-{plan}.json"
    if not store.exists(key):
        store.write(key, canonical(_temperature(model, source, config, rounds)))
    return float(json.loads(store.read(key)))


def _temperature(model: Model, source: Corpus, config: TrainConfig, rounds: SelfTrainingConfig) -> float:
    if rounds.temperature == "sqrt_bits":
        return float(model.num_bits**0.5)
    if rounds.temperature != "fitted":
        return float(rounds.temperature)
    train_ids = source.rows("train").ids
    given, count = config.validation(source.count("validation"), len(train_ids))
    wanted = None if given else held_out(train_ids, count, config.seed)
    inputs, labels = load_rows(source, wanted, config, "validation" if given else "train")
    return fit_temperature(model.class_scores(inputs), labels)
