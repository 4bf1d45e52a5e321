"""Config: every fault of a file at once, with what is allowed; flags over files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from hashray.config import Config, merge, parse, parse_toml, require_path, validate, with_tables
from hashray.data.ingest import IngestConfig
from hashray.errors import ConfigError, InputError, StorageError, perhaps
from hashray.methods.adalabelhash import AdaLabelHash
from hashray.methods.base import Method
from hashray.storage import open_store
from hashray.train.config import SelfTrainingConfig, TrainConfig, read_training_config


class Alpha(Config):
    kind: Literal["alpha"] = "alpha"
    width: int = Field(1, ge=1)


class Beta(Config):
    kind: Literal["beta"] = "beta"
    depth: int = Field(1, ge=1)


class Preset(Config):
    style: Literal["plain", "wide"] = "plain"
    columns: int = 1
    rows: int = 1

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: object) -> object:
        return {"columns": 9, "rows": 9, **data} if isinstance(data, dict) and data.get("style") == "wide" else data


class Whole(Config):
    name: str = "x"
    count: int = Field(3, ge=0)
    either: Alpha | Beta = Field(default_factory=lambda: Alpha(), discriminator="kind")
    preset: Preset = Field(default_factory=lambda: Preset())
    table: dict[str, Alpha] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _together(self) -> Whole:
        if self.name == "bad" and self.count > 5:
            raise ValueError("name 'bad' allows a count of 5 at most")
        return self


def text_of(call: object, *args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)  # type: ignore[operator]
    return str(caught.value)


def test_all_faults_of_a_file_are_listed_at_once() -> None:
    data = {
        "method": {"kind": "dseh", "num_bits": 12, "rounds": 0, "num_bit": 3},
        "optim": {"lr": -1, "nam": "adam"},
        "epoch": 3,
        "zzzzz": 1,
        "backbone": {"name": "resnet8"},
    }
    text = text_of(validate, TrainConfig, data, "run.toml")
    lines = text.splitlines()
    assert lines[0] == "run.toml: 8 faults"
    assert len(lines) == 9
    assert "method.num_bits: num_bits = 12 is not a positive multiple of 8; use 8 or 16 (found 12)" in text
    assert "method.rounds: Input should be greater than or equal to 1 (found 0)" in text
    assert "method.num_bit: unknown key, perhaps you meant 'num_bits'? Known here: " in text
    assert "optim.nam: unknown key, perhaps you meant 'name'? Known here: clip_norm, clip_value, lr, " in text
    assert "  epoch: unknown key, perhaps you meant 'epochs'? Known here: augment, backbone, " in text
    assert "  zzzzz: unknown key. Known here: augment" in text
    assert "optim.lr: Input should be greater than 0 (found -1)" in text
    assert "backbone.name: no trunk is called 'resnet8', perhaps you meant 'resnet" in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "method: Field required"),
        ({"method": {"kind": "dse"}}, "method.kind = 'dse' is not known, perhaps you meant 'dseh'? Known: "),
        ({"method": {"num_bits": 8}}, "method.kind = None is not known. Known: "),
        ({"method": 3}, "method.kind = None is not known. Known: "),
    ],
)
def test_the_method_must_be_named(data: dict, message: str) -> None:
    text = text_of(validate, TrainConfig, data, "run.toml")
    assert text.startswith("run.toml: 1 fault\n")
    assert message in text


@pytest.mark.parametrize(
    ("kind", "key", "known"),
    [("alpha", "widht", "perhaps you meant 'width'? Known here: kind, width"),
     ("beta", "dept", "perhaps you meant 'depth'? Known here: depth, kind")],
)  # fmt: skip
def test_an_unknown_key_of_a_choice_is_compared_with_the_kind_that_was_chosen(kind: str, key: str, known: str) -> None:
    assert known in text_of(validate, Whole, {"either": {"kind": kind, key: 1}}, "f")


def test_an_unknown_key_in_a_table_of_tables() -> None:
    text = text_of(validate, Whole, {"table": {"one": {"widt": 2}}}, "f")
    assert "table.one.widt: unknown key, perhaps you meant 'width'?" in text


def test_a_rule_between_fields_is_a_fault_of_the_config() -> None:
    text = text_of(validate, Whole, {"name": "bad", "count": 6}, "f")
    assert "config: name 'bad' allows a count of 5 at most" in text


def test_a_long_value_is_shown_in_part() -> None:
    text = text_of(validate, Whole, {"count": "9" * 3000 + "x"}, "f")
    assert "found '999" in text
    assert len(text) < 300


def test_configs_are_frozen_and_defaults_validated() -> None:
    with pytest.raises(ValidationError):
        Whole().count = 4  # type: ignore[misc]
    assert validate(Whole, {}, "f") == Whole()
    assert Whole.model_validate(Whole(either=Beta(depth=2)).model_dump(mode="json")) == Whole(either=Beta(depth=2))


def test_a_training_config_is_read_from_a_folder_and_from_s3(tmp_path: Path, s3_url: str) -> None:
    data = '\ufeffepochs = 4\n[method]\nkind = "dseh"\n'.encode()
    (tmp_path / "a b.toml").write_bytes(data)
    open_store(s3_url).write("c.toml", data)
    for url in (str(tmp_path / "a b.toml"), f"{s3_url}/c.toml"):
        assert read_training_config(url).epochs == 4
    with pytest.raises(InputError, match=r"none\.toml not found"):
        read_training_config(str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match="is a folder, a file was expected"):
        read_training_config(str(tmp_path))


def test_toml_that_cannot_be_read_says_where() -> None:
    assert "broken.toml is not valid TOML" in (text := text_of(parse_toml, b"count = 4\n[preset\n", "broken.toml"))
    assert "line 2" in text
    assert "broken.toml is not UTF-8 text" in text_of(parse_toml, b"name = '\xff'", "broken.toml")


def with_flags(config: Any, flags: list[str]) -> Any:
    """The config that a command makes of a file and its flags."""
    default = with_tables(config, flags)
    return merge(default, parse(type(config), flags, "hashray train", default=default), flags)


def test_flags_override_a_file() -> None:
    config = validate(TrainConfig, {"method": {"kind": "dseh", "rounds": 3}, "optim": {"lr": 0.1}}, "f")
    out = with_flags(config, ["--method.num-bits", "64", "--epochs=7", "--optim.name", "sgd"])
    assert (out.method.num_bits, out.method.rounds, out.epochs, out.optim.lr, out.optim.name) == (64, 3, 7, 0.1, "sgd")  # type: ignore[attr-defined]
    assert with_flags(config, []) == config
    assert config.epochs is None


def test_a_preset_on_the_command_line_works_as_in_a_file() -> None:
    config = validate(Whole, {"preset": {"rows": 2}}, "f")
    assert with_flags(config, ["--preset.style", "wide"]).preset == Preset(style="wide", rows=2)
    # A flag that says the default is still a flag.
    asked = with_flags(config, ["--preset.style", "wide", "--preset.columns", "1"]).preset
    assert asked == Preset(style="wide", rows=2, columns=1)
    config = validate(TrainConfig, {"method": {"kind": "dseh"}}, "f")
    method = with_flags(config, ["--method.preset", "paper"]).method
    assert method.label_hidden == 4096  # type: ignore[attr-defined]


def test_one_preset_replaces_another_whole() -> None:
    released = validate(TrainConfig, {"method": {"kind": "dseh", "preset": "released", "num_bits": 64}}, "f")
    paper = validate(TrainConfig, {"method": {"kind": "dseh", "preset": "paper", "num_bits": 64}}, "f")
    assert released.method != paper.method
    assert with_flags(released, ["--method.preset", "paper"]).method == paper.method
    kept = with_flags(released, ["--method.preset", "paper", "--method.beta", "0.7"]).method
    assert kept == paper.method.model_copy(update={"beta": 0.7})


@pytest.mark.parametrize(
    "method",
    [{"kind": "dseh", "ablation": "L"}, {"kind": "dseh", "gamma": 0.0}, {"kind": "lcgh", "label_weight": 0.0}],
)
def test_rounds_are_for_settings_that_learn_class_scores(method: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{method['kind']} with these settings learns no class scores"):
        validate(TrainConfig, {"method": method, "self_training": {}}, "f")
    assert validate(TrainConfig, {"method": {"kind": method["kind"]}, "self_training": {}}, "f").self_training


def test_rounds_are_for_methods_with_class_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaLabelHash, "class_scores", Method.class_scores)
    with pytest.raises(ConfigError, match="adalabelhash with these settings learns no class scores"):
        validate(TrainConfig, {"method": {"kind": "adalabelhash"}, "self_training": {}}, "f")


def test_a_flag_adds_the_optional_table_that_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    config = validate(TrainConfig, {"method": {"kind": "adalabelhash"}}, "f")
    assert with_flags(config, ["--epochs", "2"]).self_training is None
    rounds = with_flags(config, ["--self-training.rounds", "3", "--self_training.threshold=0.5"]).self_training
    assert rounds == SelfTrainingConfig(rounds=3, threshold=0.5)
    with pytest.raises(SystemExit):
        with_flags(config, ["--help"])
    assert "--self-training.rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--method.num-bis", "8"], "--method.num-bits"),
        (["--seed", "x"], "x"),
    ],
)
def test_a_wrong_flag_exits_2_and_says_so(flags: list[str], shown: str, capsys: pytest.CaptureFixture) -> None:
    config = validate(TrainConfig, {"method": {"kind": "dseh"}}, "f")
    with pytest.raises(SystemExit) as caught:
        with_flags(config, flags)
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err


def test_every_wrong_value_of_a_command_line_is_named_by_its_flag() -> None:
    config = validate(TrainConfig, {"method": {"kind": "dseh"}}, "f")
    flags = ["--method.num-bits", "12", "--optim.lr", "-1", "--optim.weight-decay", "inf", "--epochs", "0"]
    with pytest.raises(ConfigError) as caught:
        with_flags(config, flags)
    text = str(caught.value)
    assert text.startswith("the command line: 4 faults\n")
    for fault in (
        "--method.num-bits: num_bits = 12 is not a positive multiple of 8",
        "--epochs: Input should be greater than or equal to 1 (found 0)",
        "--optim.lr: Input should be greater than 0 (found -1.0)",
        "--optim.weight-decay: Input should be a finite number (found inf)",
    ):
        assert fault in text
    with pytest.raises(ConfigError, match=r"^f: 1 fault\n  optim\.lr: Input should be a finite number \(found inf\)$"):
        validate(TrainConfig, {"method": {"kind": "dseh"}, "optim": {"lr": float("inf")}}, "f")
    with pytest.raises(ConfigError, match=r"--workers: Input should be greater than or equal to 1"):
        parse(IngestConfig, ["x", "--out", "o", "--workers", "0"], "hashray ingest")  # of a table without a prefix


def test_flags_that_do_not_go_together() -> None:
    with pytest.raises((ConfigError, SystemExit)) as caught:
        with_flags(Whole(count=6), ["--name", "bad"])
    assert getattr(caught.value, "exit_code", getattr(caught.value, "code", None)) == 2


@pytest.mark.parametrize(
    ("given", "kept", "bounds"), [(3, 3, (3, 3)), ("3", 3, (3, 3)), ("2:8", "2:8", (2, 8)), ("4:4", 4, (4, 4))]
)
def test_workers_are_a_number_or_bounds(given: int | str, kept: int | str, bounds: tuple[int, int]) -> None:
    table = {"method": {"kind": "dseh"}}
    flagged = with_flags(validate(TrainConfig, table, "f"), ["--workers", str(given)])
    for config in (validate(TrainConfig, {**table, "workers": given}, "f"), flagged):
        assert (config.workers, config.bounds) == (kept, bounds)


@pytest.mark.parametrize("given", [0, "0:2", "3:2", "2:", "many", -1])
def test_workers_that_are_neither(given: int | str) -> None:
    with pytest.raises(ConfigError, match=f"workers = '?{given}'?: expected a number from 1 on, or fewest and most"):
        validate(TrainConfig, {"method": {"kind": "dseh"}, "workers": given}, "f")


def test_require_path() -> None:
    assert require_path("s3://b/p", "--out") == "s3://b/p"
    with pytest.raises(InputError, match="--out is missing: give --out PATH"):
        require_path(None, "--out")


def test_the_tree_of_errors_has_two_exit_codes() -> None:
    from hashray import errors

    tree = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.HashrayError)]
    for error in tree:
        assert error.__doc__ is not None
        assert error is errors.HashrayError or error.__name__ in (errors.__doc__ or "")
        assert error("x").exit_code == (2 if issubclass(error, errors.RequestError) else 1)
    assert StorageError("x").exit_code == 2
    assert perhaps("lrr", ["lr", "seed"]) == ", perhaps you meant 'lr'?"
