"""Sweeps: points of the space, every fault of a sweep before its first trial, and the results of a sweep."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hashray.cli import main
from hashray.config import parse_toml, validate
from hashray.errors import ConfigError
from hashray.report.drawn import draw as drawn
from hashray.train.config import TrainConfig
from hashray.tune.leaderboard import Trial, best_toml, epochs_table, importance, leaderboard, ranked
from hashray.tune.live import Watch
from hashray.tune.page import draw, sweep_page
from hashray.tune.run import spread, verdict
from hashray.tune.space import (
    KIND,
    NUMBER,
    ORIGIN,
    SearchConfig,
    SweepConfig,
    check_sweep,
    milestones,
    read_sweep,
    values_of,
)

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"method": {"kind": "adalabelhash", "num_bits": 16}, "optim": {"lr": 1e-3}, "epochs": 9}


def written(tmp_path: Path, **tables: Any) -> str:
    path = tmp_path / "sweep.toml"
    path.write_bytes(tomli_w.dumps({**BASE, **tables}).encode())
    return str(path)


def sweep(tmp_path: Path, space: dict[str, Any], **tables: Any) -> SweepConfig:
    config = read_sweep(written(tmp_path, space=space, **tables))
    check_sweep(config, "sweep.toml")
    return config


def faults(tmp_path: Path, space: dict[str, Any], **tables: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        sweep(tmp_path, space, **tables)
    return str(raised.value)


def test_points_reach_the_training_config_and_the_values_of_the_file_come_first(tmp_path: Path) -> None:
    config = sweep(
        tmp_path,
        {"optim": {"lr": {"log": [1e-4, 1e-2]}}, "method.margin_ratio": {"linear": [0.1, 1.0]}},
        method={**BASE["method"], "margin_ratio": 0.5},
    )
    assert config.default() == {"optim.lr": 1e-3, "method.margin_ratio": 0.5}
    chosen = config.at({"optim.lr": 3e-3, "method.margin_ratio": 0.25})
    assert (chosen.optim.lr, chosen.method.margin_ratio) == (3e-3, 0.25)  # type: ignore[attr-defined]
    assert (chosen.epochs, chosen.validation_every) == (9, 1)
    assert config.base.optim.lr == 1e-3


def test_a_preset_fills_every_value_that_a_point_leaves_out(tmp_path: Path) -> None:
    method = {"kind": "dseh", "num_bits": 16, "preset": "paper", "beta": 0.01}
    config = sweep(tmp_path, {"method.beta": {"log": [1e-6, 1e-1]}}, method=method)
    chosen = config.at({"method.beta": 0.02})
    assert (chosen.method.beta, chosen.method.label_hidden) == (0.02, 4096)  # type: ignore[attr-defined]


def test_a_dimension_with_when_belongs_to_one_method_only(tmp_path: Path) -> None:
    space = {
        KIND: {"choice": ["adalabelhash", "lcgh"]},
        "method.margin": {"linear": [0.1, 1.0], "when": "lcgh"},
        "method.codeword_lr_factor": {"log": [1.0, 100.0]},
    }
    config = sweep(tmp_path, space)
    assert config.default() == {KIND: "adalabelhash", "method.codeword_lr_factor": 10.0}
    chosen = config.at({KIND: "lcgh", "method.margin": 0.7, "method.codeword_lr_factor": 2.0})
    assert chosen.method.kind == "lcgh" and chosen.method.num_bits == 16
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(12):
        trial = study.ask()
        number = config.draw(trial)
        drawn.append(trial.params)
        config.at({**trial.params, **number})
    assert {point[KIND] for point in drawn} == {"adalabelhash", "lcgh"}
    assert all(("method.margin" in point) == (point[KIND] == "lcgh") for point in drawn)


POPULATION: dict[str, Any] = {"scheduler": "pbt", "algorithm": "random"}


def test_a_member_of_a_population_is_a_config_with_changes(tmp_path: Path) -> None:
    space = {"optim.lr": {"log": [1e-4, 1e-2]}, "method.margin_ratio": {"linear": [0.1, 1.0]}}
    config = sweep(tmp_path, space, search=POPULATION)
    first = {NUMBER: 4, "optim.lr": 1e-3, "method.margin_ratio": 0.5}
    second = {NUMBER: 2, "optim.lr": 2e-3, "method.margin_ratio": 0.5, ORIGIN: [2, first]}
    third = {NUMBER: 1, "optim.lr": 2e-3, "method.margin_ratio": 0.5, ORIGIN: [4, second]}
    fourth = {NUMBER: 0, "optim.lr": 2e-3, "method.margin_ratio": 0.4, ORIGIN: [6, third]}
    chosen = config.at(fourth)
    assert chosen.optim.lr == 1e-3 and [change.after for change in chosen.changes] == [2, 6]
    segments = [(after, part.optim.lr, part.method.margin_ratio) for after, part in chosen.segments()]  # type: ignore[attr-defined]
    assert segments == [(0, 1e-3, 0.5), (2, 2e-3, 0.5), (6, 2e-3, 0.4)]
    best = Trial(0, values_of(fourth), "", "finished", 0.5, 9, 9, "", [], chosen)
    assert validate(TrainConfig, parse_toml(best_toml(best), "best"), "best").result_of() == chosen.result_of()


def test_first_points_are_valid_and_begin_with_the_default(tmp_path: Path) -> None:
    method = {"kind": "lcgh", "num_bits": 16}
    space = {"method.priority": {"choice": ["project", "dual"]}, "method.warmup_share": {"choice": [0.0, 0.5]}}
    # With the warm-up of the config, each end is valid. Dual without a warm-up is not.
    config = sweep(tmp_path, space, method={**method, "warmup_share": 0.5}, search={**POPULATION, "trials": 12})
    points = config.first_points()
    assert points == config.first_points() and points[0] == config.default() and len(points) == 12
    assert {point["method.priority"] for point in points} == {"project", "dual"}
    assert all(point["method.warmup_share"] for point in points if point["method.priority"] == "dual")


def test_a_population_changes_only_values_that_can_change_during_a_training(tmp_path: Path) -> None:
    space = {"optim.name": {"choice": ["adamw", "sgd"]}, "batch_size": {"integer": [32, 256]}}
    text = faults(tmp_path, space, search=POPULATION)
    assert text.count("changes values during a training, but this one is fixed at its start") == 2
    assert "starts from random points" in faults(
        tmp_path, {"optim.lr": {"log": [1e-4, 1e-2]}}, search={"scheduler": "pbt"}
    )
    changes = [{"after": 2, "optim": {"lr": 1e-3}}]
    assert "does not take any" in faults(tmp_path, {"optim.lr": {"log": [1e-4, 1e-2]}}, changes=changes)


def test_every_fault_of_a_space_is_listed_with_a_suggestion(tmp_path: Path) -> None:
    text = faults(
        tmp_path,
        {
            "optim.lr": {"log": [1e-4, 1e-2]},
            "optim.momentum": {"linear": [0.0, 1.0]},
            "method.margin_ration": {"linear": [0.1, 1.0]},
            "epochs": {"integer": [1, 5]},
            "optin.lr": {"log": [1e-4, 1e-2]},
            "method.margin": {"linear": [0.1, 1.0], "when": "lcgh"},
        },
    )
    assert text.count("space.") == 5
    assert "space.optim.momentum: optim.momentum: Input should be less than 1 (found 1.0)" in text
    assert "margin_ratio" in text and "perhaps" in text.lower()
    assert "space.epochs: this is the same for all trials" in text
    assert "when = 'lcgh', but the sweep trains only adalabelhash" in text
    text = faults(tmp_path, {"method.margin_ratio": {"linear": [0.1, 1.0], "when": "adalabelhahs"}})
    assert "perhaps you meant 'adalabelhash'" in text


@pytest.mark.parametrize(
    ("space", "text"),
    [
        ({"optim.lr": {"log": [0.0, 1.0]}}, "a log range begins above 0"),
        ({"optim.lr": {"linear": [1.0, 0.1]}}, "is empty or not finite"),
        ({"optim.lr": {"log": [1e-4, 1e-2], "linear": [0.1, 1.0]}}, "exactly one of"),
        ({"optim.lr": {"logg": [1e-4, 1e-2]}}, "logg"),
        ({"optim.name": {"choice": ["sgd"]}}, "two values or more"),
        ({"optim.lr": {"log": [1e-2, 1e-1]}}, "the value 0.001 of the config is not in the range"),
        ({"batch_size": {"log": [32, 256]}}, "a number with a fractional part"),
        ({"self_training.rounds": {"integer": [1, 3]}}, "the same for all trials"),
        ({"optim.lr.peak": {"log": [1e-4, 1e-2]}}, "lr is a value and has no peak"),
        ({"method.kind": {"choice": ["lcgh", "adalabelhash"], "when": "lcgh"}}, "make the method depend on the method"),
        ({"method.num_bits": {"integer": [16, 5000]}}, "found 17"),
    ],
)
def test_a_range_that_cannot_be_searched_is_refused(tmp_path: Path, space: dict[str, Any], text: str) -> None:
    assert text in faults(tmp_path, space)


def test_a_fraction_in_the_file_is_outside_a_range_of_integers(tmp_path: Path) -> None:
    space = {"optim.clip_norm": {"integer": [1, 10]}}
    assert "the value 2.5 of the config is not in the range" in faults(tmp_path, space, optim={"clip_norm": 2.5})
    config = sweep(tmp_path, space, optim={"clip_norm": 2.0}, checkpoint_steps=7)
    assert config.at(config.default()).optim.clip_norm == 2.0 and config.base.checkpoint_steps == 7


@pytest.mark.parametrize("search", [{"seed": 2**32}, {"report_seeds": [-1]}, {"report_seeds": [2**63]}])
def test_seeds_outside_the_range_of_the_generators_are_refused(tmp_path: Path, search: dict[str, Any]) -> None:
    assert f"search.{next(iter(search))}" in faults(tmp_path, {"optim.lr": {"log": [1e-4, 1e-2]}}, search=search)


@pytest.mark.parametrize("name", ["augment.shift", "optim.trunk_lr_factor", "backbone.image_size", "precision"])
def test_values_without_effect_on_cached_features_are_refused(tmp_path: Path, name: str) -> None:
    space = {name: {"choice": [0, 1]}}
    assert "this changes nothing" in faults(tmp_path, space, backbone={"weights": "x.pth", "frozen": True})


def test_a_sweep_needs_a_space_and_rows_to_compare_trials_by(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=r"no \[space\] table"):
        read_sweep(written(tmp_path))
    assert "validation_rows" in faults(tmp_path, {"optim.lr": {"log": [1e-4, 1e-2]}}, validation_rows=0)
    path = written(tmp_path, space={"optim.lrr": {"log": [1e-4, 1e-2]}})
    assert main(["tune", path, "--corpus", "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "lr" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    path = written(tmp_path, space={"optim.lr": {"log": [1e-2, 1e-1]}})  # the flag corrects the value in the file
    assert main(["tune", path, "--optim.lr", "0.05", "--corpus", "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_shipped_sweeps_are_valid() -> None:
    paths = sorted((ROOT / "jobs/sweeps").glob("*.toml"))
    configs = [read_sweep(str(path)) for path in paths]
    assert {config.method.kind for config in configs} == {"dseh", "adalabelhash", "lcgh"}
    for path, config in zip(paths, configs, strict=True):
        check_sweep(config, path.name)


def test_every_integer_between_the_ends_is_checked(tmp_path: Path) -> None:
    text = faults(tmp_path, {"method.num_bits": {"integer": [16, 24]}})
    assert "17" in text and "space.method.num_bits: and 3 more such values; list the valid ones as a choice" in text
    kept = sweep(tmp_path, {"method.num_bits": {"choice": [16, 24]}})
    assert kept.at({"method.num_bits": 24}).method.num_bits == 24


@given(st.integers(1, 60), st.integers(1, 12), st.integers(2, 5), st.sampled_from(["asha", "median", "pbt", "none"]))
def test_trials_report_in_order_and_at_the_end(epochs: int, grace: int, factor: int, scheduler: Any) -> None:
    search = SearchConfig(scheduler=scheduler, algorithm="random", grace_epochs=grace, reduction_factor=factor)
    reports = milestones(search, epochs, epochs)
    assert reports == sorted(set(reports)) and reports[-1] == epochs
    assert all(report >= grace for report in reports[:-1])


def trial(config: SweepConfig, number: int, point: dict[str, Any], scores: list[float], total: int = 4) -> Trial:
    lines = [
        {"epoch": i + 1, "phase": "image", "loss": 1.0 / (i + 1), "validation_map": score}
        for i, score in enumerate(scores)
    ]
    state = "failed" if not scores else "finished" if len(scores) == total else "stopped"
    best = max(scores, default=None)
    reason = "" if scores else "the loss is not finite"
    return Trial(number, point, f"{number:04d}-run", state, best, len(scores), total, reason, lines, config.at(point))


def test_the_leaderboard_ranks_by_score_then_by_number_and_failures_come_last(tmp_path: Path) -> None:
    config = sweep(tmp_path, {"optim.lr": {"log": [1e-4, 1e-2]}})
    points = [{"optim.lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    trials = [
        trial(config, i, p, s) for i, (p, s) in enumerate(zip(points, [[0.2], [], [0.4, 0.3], [0.4]], strict=True))
    ]
    assert [t.number for t in ranked(trials)] == [2, 3, 0, 1]
    table = leaderboard(trials).to_pylist()
    assert [row["state"] for row in table] == ["stopped", "stopped", "stopped", "failed"]
    assert table[3]["reason"] == "the loss is not finite" and table[3]["score"] is None
    assert not {name for name in leaderboard(trials).column_names if "time" in name or name.endswith("_s")}
    lines = epochs_table(trials).to_pylist()
    assert [(line["trial"], line["epoch"], line["validation_map"]) for line in lines] == [
        (0, 1, 0.2), (2, 1, 0.4), (2, 2, 0.3), (3, 1, 0.4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("winner", "default", "text"),
    [
        (
            [0.8, 0.82],
            [0.7, 0.71],
            "leads the default by 0.1050 on validation, more than the seed spread (0.0141, 2 and 2 seeds)",
        ),
        ([0.8, 0.7], [0.74, 0.75], "by 0.0050 on validation, within the seed spread: the default was already there"),
        ([0.7, 0.7], [0.8, 0.8], "is behind the default by 0.1000 on validation, more than the seed spread: keep the"),
        ([0.8], [0.7], "by 0.1000 on validation, with one seed, which has no spread"),
        ([0.7], None, "The default failed."),
    ],
)
def test_the_verdict_compares_the_lead_with_the_spread_between_seeds(
    winner: list[float], default: list[float] | None, text: str
) -> None:
    def side(scores: list[float]) -> dict[str, Any]:
        lines = [{"seed": i, "validation": score} for i, score in enumerate(scores)]
        return {"trial": 1, "seeds": lines, "failed": [], **spread(lines)}

    compared = {"winner": side(winner)} | ({} if default is None else {"default": side(default)})
    assert text in verdict(compared)
    assert verdict({"winner": {**side(winner), "trial": 0}}) == "The default was the best trial."
    assert verdict({}) == ""
    diverged = {**side([]), "failed": [{"seed": 3, "reason": "…"}]}
    assert (
        verdict({"winner": diverged, "default": side([0.5, 0.6])})
        == "The loss of the winner is not finite with seed 3."
    )


def test_epochs_of_an_earlier_run_do_not_count_for_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    watch = Watch(trials=10, epochs=4)
    for number in range(6):  # read from an earlier run, not trained
        now[0] += 1
        watch.reported({NUMBER: number}, 4, 4, 0.5, trained=False)
        watch.ended({NUMBER: number}, failed=False)
    assert watch.eta_s() is None
    now[0] += 100
    watch.reported({NUMBER: 6}, 3, 3, 0.5, trained=True)  # a trial with fewer epochs than the others
    watch.ended({NUMBER: 6}, failed=False)
    assert watch.over[6] == "finished"
    assert watch.eta_s() == pytest.approx(3 * 100)


def test_a_terminal_shows_a_live_table_that_ray_can_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()
    monkeypatch.setattr("hashray.tune.live.console", Console(file=sink, force_terminal=True, width=100))
    with Watch(trials=3, epochs=4) as watch:
        watch.reported({NUMBER: 1, "optim.lr": 1e-3}, 2, 4, 0.5, trained=True)
        watch.reported({NUMBER: 0, "optim.lr": 2e-3}, 4, 4, 0.75, trained=True)
        watch.ended({NUMBER: 0, "optim.lr": 2e-3}, failed=False)
        assert pickle.loads(pickle.dumps(watch)).at == watch.at
    shown = sink.getvalue()
    assert "1 of 3 trials" in shown and shown.rindex("0.7500") < shown.rindex("0.5000")
    assert "finished" in shown and "lr 0.002" in shown


def test_a_sweep_says_where_its_trials_are_before_they_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Watch(trials=3, epochs=4) as watch:
        watch.hear({"trial": 1, "epoch": 2, "step": 5, "steps": 14})
        watch.tick()  # too soon after the line before
        now[0] += 10
        watch.tick()
        watch.hear({"trial": 1, "lost": "ActorDiedError: gone"})
        watch.reported({NUMBER: 1}, 2, 4, 0.5, trained=True)
    lines = capsys.readouterr().err.splitlines()
    assert '"waiting_for": "trials to start"' in lines[0]
    assert '"trials": {"1": "epoch 2, step 5/14"}' in lines[1]
    assert lines[2] == "note: trial 1 goes on from its last checkpoint, after a loss: ActorDiedError: gone"
    assert '"score": 0.5' in lines[3] and not watch.inside


def test_the_page_of_a_sweep_shows_stopped_and_failed_trials(tmp_path: Path) -> None:
    config = sweep(tmp_path, {"optim.lr": {"log": [1e-4, 1e-2]}})
    scores = [[0.3, 0.4, 0.5, 0.6], [0.2], [], [0.3, 0.9, 0.7, 0.8]]
    trials = [trial(config, i, {"optim.lr": 1e-3 * (i + 1)}, values) for i, values in enumerate(scores)]
    summary = {
        "trials": 4, "best_trial": 3, "best_score": 0.9, "default_score": 0.6, "stopped": 1, "failed": [2], "epochs": 9,
        "epochs_of_full_grid": 16, "importance": {}, "compared": {}, "verdict": "",
    }  # fmt: skip
    pictures = {name: drawn(figure) for name, figure in draw(trials, summary).items()}
    page = sweep_page(trials, summary, pictures)
    assert "9 of 16 epochs trained (56%)" in page and "the loss is not finite" in page
    assert page.index("0.9000") < page.index("0.6000") < page.index("0.2000")
    assert "too few trials" in page and "schedule of the best" not in page
    compared = {"winner": {"trial": 3, "seeds": [], "failed": [], "mean": {}, "std": {}}}
    hostile = replace(trials[2], reason="<script>alert(1)</script>")
    page = sweep_page([*trials[:2], hostile, trials[3]], {**summary, "compared": compared, "verdict": "a < b."}, {})
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "a &lt; b. Each config" in page


def test_report_seeds_differ_from_the_seed_that_chooses_the_winner(tmp_path: Path) -> None:
    space = {"optim.lr": {"log": [1e-4, 1e-2]}}
    assert "seed 2 of the config, which chooses the winner" in faults(tmp_path, space, seed=2)
    assert sweep(tmp_path, space, seed=2, search={"report_seeds": [0, 1]}).seed == 2


def test_importance_names_the_dimension_that_matters_at_the_last_common_report(tmp_path: Path) -> None:
    space = {"optim.lr": {"log": [1e-4, 1e-2]}, "optim.weight_decay": {"log": [1e-5, 1e-1]}}
    config = sweep(tmp_path, space)
    points = [
        {"optim.lr": 10 ** (-4 + 2 * (i % 6) / 5), "optim.weight_decay": 10 ** (-5 + 4 * (i // 6) / 5)}
        for i in range(36)
    ]
    trials = [trial(config, i, p, [p["optim.lr"], *([0.0] if i % 2 else [])]) for i, p in enumerate(points)]
    result = importance(trials, config, seed=0)["adalabelhash"]
    assert result["after_epochs"] == 1 and result["trials"] == 36
    assert result["shares"]["optim.lr"] > 0.9 > 0.1 > result["shares"]["optim.weight_decay"]
    assert importance(trials[:3], config, seed=0) == {}
    # If only both dimensions together explain the score, neither explains much alone.
    both = [trial(config, i, p, [float((i % 6 < 3) == (i // 6 < 3))]) for i, p in enumerate(points)]
    assert sum(importance(both, config, seed=0)["adalabelhash"]["shares"].values()) < 0.95


def test_best_toml_reads_back_as_the_config_of_the_winner(tmp_path: Path) -> None:
    config = sweep(
        tmp_path,
        {"optim.lr": {"log": [1e-4, 1e-2]}, "optim.clip_norm": {"log": [0.1, 10.0]}},
        optim={"lr": 1e-3, "clip_norm": 1.0},
    )
    best = trial(config, 1, {"optim.lr": 0.00123456789012345, "optim.clip_norm": 0.3}, [0.5])
    path = tmp_path / "best.toml"
    path.write_bytes(best_toml(best))
    from hashray.train.config import read_training_config

    assert read_training_config(str(path)).result_of() == best.config.result_of()
