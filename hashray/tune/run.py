"""[Ray] `hashray tune` searches a space of training configs, then trains winner and default again and scores both.

sweep/  leaderboard.parquet · epochs.parquet · best.toml · sweep.json · report.html · figures/ · manifest.json
        costs.json · environment.json      measured on one machine, so not part of the artifact
        trials/<plan>/<number>-<run>/ · models/<plan>/<winner or default>-<seed>/ · evaluations/<plan>/…

Only validation rows compare trials. The query split is read once, at the end: it scores the winner and the config of
the file, both trained with the same seeds.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from hashray import __version__, artifact
from hashray.artifact import Manifest, canonical, sha256_hex, table_bytes
from hashray.config import require_path
from hashray.data.corpus import Corpus, open_corpus
from hashray.engine.stage import require_free, run_stage
from hashray.errors import Diverged, InputError, RunError
from hashray.evaluate.environment import environment
from hashray.evaluate.run import EvaluateConfig, evaluate
from hashray.methods.trunks import source_of
from hashray.progress import say
from hashray.report import drawn
from hashray.storage import Store, join, open_store
from hashray.train.job import require_rows, require_validation, run_of, with_epochs_for
from hashray.train.precision import with_precision
from hashray.train.rounds import train_model
from hashray.train.run import open_init, pool_of, with_absolute_paths, workers_multiply_bf16
from hashray.tune.leaderboard import Trial, best_toml, epochs_table, importance, leaderboard, ranked
from hashray.tune.page import draw, sweep_page
from hashray.tune.search import search
from hashray.tune.space import SweepConfig, check_sweep

WINNER, DEFAULT = "winner", "default"


def tune(config: SweepConfig) -> Manifest:
    """Run the stage and return the manifest of the sweep. A rerun resumes, trial by trial and epoch by epoch.

    Raises:
        ConfigError: the space has faults; the text lists all of them.
        InputError: there is no corpus, or it has no rows to train on or to compare trials by.
        RunError: every trial failed.
        AlreadyExists: `out` holds another sweep.
    """
    config = with_absolute_paths(config)
    check_sweep(config, "the sweep")
    if len({*config.bounds}) > 1:
        raise InputError(f"workers = {config.workers!r}: a trial's workers are a fixed number, such as 2")
    out = require_path(config.out, "--out")
    corpus = open_corpus(require_path(config.corpus, "--corpus"))
    require_rows(config, corpus, "a sweep")
    config = with_epochs_for(config, corpus)
    require_validation(config, corpus, "a sweep compares its trials")
    store = open_store(out)
    base = config.base.result_of()
    del base["backbone"]["weights"]  # "start" covers the content of files; their paths do not matter
    name = config.base.backbone.name
    base["backbone"]["name"] = source_of(name).stored_name(name)
    settings: dict[str, Any] = {
        "base": base, "space": {n: d.model_dump(mode="json") for n, d in config.space.items()},
        "search": config.search.model_dump(mode="json"), "corpus": corpus.manifest.id,
        "start": run_of(config.base, corpus, open_init(config.base))[0],
    }  # fmt: skip
    plan = sha256_hex(canonical(settings))[:16]
    manifest = run_stage(store, "sweep", plan, lambda: _tune(config, corpus, store, settings, plan))
    artifact.write_plain(store, manifest)
    return manifest


def _tune(config: SweepConfig, corpus: Corpus, store: Store, settings: dict[str, Any], plan: str) -> Manifest:
    """Search, train the winner and the default with fresh seeds, and publish the result."""
    out = store.url
    config = with_precision(config, store, plan, partial(workers_multiply_bf16, config))
    # This hash names the folders of trials, models and evaluations. No trial depends on the report seeds.
    searched = settings | {"search": config.search.model_dump(mode="json", exclude={"report_seeds"})}
    of_search = sha256_hex(canonical(searched))[:16]
    trials, at_once = search(config, corpus, out, of_search)
    best = ranked(trials)[0]
    if best.score is None:
        raise RunError(
            f"no trial reached selectable weights; trial {best.number}: {_score(best)}; raise epochs, so that trials "
            "train beyond their warm-up"
        )
    default = _default(config, trials)
    note = "is not among the trials" if default is None else _score(default)
    say(f"best of {len(trials)}: trial {best.number}, validation {best.score:.4f}; the default {note}")
    compared = _compare(config, corpus, best, default, out, of_search)
    summary = _summary(config, trials, at_once, default, compared)
    require_free(store, plan)
    store.write("environment.json", canonical(environment()))
    files = _write(store, trials, best, summary)
    manifest = artifact.publish(
        store,
        Manifest(
            kind="sweep", project_version=__version__, config=settings, parents={"corpus": corpus.manifest.id},
            files=files, info={"plan": plan, **summary},
        ),
    )  # fmt: skip
    store.clear("progress/")
    if summary["verdict"]:
        say(summary["verdict"])
    spent, full = summary["epochs"], summary["epochs_of_full_grid"]
    say(f"{out}: {spent:,} of {full:,} epochs trained ({spent / full:.0%}); hashray train {join(out, 'best.toml')}")
    return manifest


def _default(config: SweepConfig, trials: list[Trial]) -> Trial | None:
    """The trial of the config in the file; None if it continued from the weights of another member."""
    first = trials[0]
    return first if first.config is not None and first.config.result_of() == config.base.result_of() else None


def _score(trial: Trial) -> str:
    return f"{trial.score:.4f}" if trial.score is not None else " ".join([trial.state, trial.reason]).strip()


def _summary(
    config: SweepConfig, trials: list[Trial], at_once: int, default: Trial | None, compared: dict[str, Any]
) -> dict[str, Any]:
    """The results of a sweep as numbers, for its manifest and its page."""
    best = ranked(trials)[0]
    return {
        "trials": len(trials), "at_once": at_once, "best_trial": best.number, "best_score": best.score,
        "default_score": default and default.score,
        "stopped": sum(trial.state == "stopped" for trial in trials),
        "failed": [trial.number for trial in trials if trial.state == "failed"],
        "epochs": sum(trial.epochs for trial in trials), "epochs_of_full_grid": sum(trial.total for trial in trials),
        "importance": importance(trials, config, config.search.seed), "compared": compared,
        "verdict": verdict(compared),
    }  # fmt: skip


def _compare(
    config: SweepConfig, corpus: Corpus, best: Trial, default: Trial | None, out: str, plan: str
) -> dict[str, Any]:
    """Train winner and default with every report seed; return the validation and query mAP of each."""
    if not config.search.report_seeds:
        return {}
    assert best.config is not None
    compared: dict[str, Any] = {}
    sides = [(WINNER, best.number, best.config)]
    if best is not default and (default is None or default.state != "failed"):
        sides.append((DEFAULT, 0, config.base))
    for side, number, chosen in sides:
        lines, failed = [], []
        for seed in config.search.report_seeds:
            model, evaluation = (join(out, name, plan, f"{side}-{seed}") for name in ("models", "evaluations"))
            places = {"corpus": corpus.store.url, "out": model, "seed": seed, "features": config.features}
            try:
                manifest = train_model(chosen.model_copy(update=places))
            except Diverged as error:  # a result like any other, and the same in every attempt
                failed.append({"seed": seed, "reason": str(error)})
                continue
            scores = _query_score(config, model, evaluation, corpus)
            lines.append({"seed": seed, "validation": manifest.info["validation_map"], **scores})
        compared[side] = {"trial": number, "seeds": lines, "failed": failed, **spread(lines)}
    return compared


def verdict(compared: dict[str, Any]) -> str:
    """Say whether the winner's lead over the default on validation exceeds the spread between seeds."""
    sentences = [
        f"The loss of the {side} is not finite with seed {', '.join(str(line['seed']) for line in result['failed'])}."
        for side, result in compared.items() if result["failed"]
    ]  # fmt: skip
    if compared and DEFAULT not in compared:
        sentences.append("The default was the best trial." if not compared[WINNER]["trial"] else "The default failed.")
    elif compared and all(compared[side]["seeds"] for side in (WINNER, DEFAULT)):
        winner, default = ([line["validation"] for line in compared[side]["seeds"]] for side in (WINNER, DEFAULT))
        lead = statistics.fmean(winner) - statistics.fmean(default)
        widest = max(compared[side]["std"]["validation"] for side in (WINNER, DEFAULT))
        if min(len(winner), len(default)) < 2:
            judgement = "with one seed, which has no spread to compare with"
        elif abs(lead) <= widest:
            judgement = "within the seed spread: the default was already there"
        else:
            judgement = "more than the seed spread" + ("" if lead > 0 else ": keep the default")
        verb = "leads" if lead >= 0 else "is behind"
        sentences.append(
            f"The winner {verb} the default by {abs(lead):.4f} on validation, {judgement} "
            f"({widest:.4f}, {len(winner)} and {len(default)} seeds)."
        )
    return " ".join(sentences)


def _query_score(config: SweepConfig, model: str, out: str, corpus: Corpus) -> dict[str, float]:
    if not corpus.count("query") or not corpus.count("database"):
        return {}
    evaluation = EvaluateConfig(
        model=model, corpus=corpus.store.url, out=out, baselines=False, gallery=0, pool=pool_of(config),
        features=config.features, max_bad=config.max_bad,
    )  # fmt: skip
    metrics = evaluate(evaluation)
    ours = metrics["results"][0]["name"]
    scores = {f"query_{r.get('scenario', 'mAP')}": r["mAP"] for r in metrics["results"] if r["name"] == ours}
    mean = metrics.get("harmonic_mean", {}).get(ours)
    return scores if mean is None else {**scores, "query_harmonic": mean}


def spread(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of every score over the seeds."""
    names = [name for name in lines[0] if name != "seed"] if lines else []
    values = {name: [line[name] for line in lines] for name in names}
    return {
        "mean": {name: statistics.fmean(scores) for name, scores in values.items()},
        "std": {name: statistics.stdev(scores) if len(scores) > 1 else 0.0 for name, scores in values.items()},
    }


def _write(store: Store, trials: list[Trial], best: Trial, summary: dict[str, Any]) -> tuple[artifact.FileRecord, ...]:
    figures = {name: drawn.draw(figure) for name, figure in draw(trials, summary).items()}
    tables = {"leaderboard.parquet": leaderboard(trials), "epochs.parquet": epochs_table(trials)}
    files = [artifact.write_named(store, name, table_bytes(table), len(table)) for name, table in tables.items()]
    files.append(artifact.write_named(store, "best.toml", best_toml(best)))
    files.append(artifact.write_named(store, "sweep.json", canonical(summary)))
    files += [artifact.write_named(store, name, data) for name, data in drawn.files(figures).items()]
    files.append(artifact.write_named(store, "report.html", sweep_page(trials, summary, figures).encode()))
    return tuple(files)
