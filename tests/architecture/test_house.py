"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import hashray
from hashray.cli import main, names_of_commands
from hashray.config import Config, validate
from hashray.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted((ROOT / "hashray").rglob("*.py"))
MODULES = [info.name for info in pkgutil.walk_packages(hashray.__path__, "hashray.")]


def test_layers_and_the_pure_files_hold() -> None:
    completed = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
                           cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert completed.returncode == 0, completed.stdout


def test_no_file_is_long_and_none_is_called_after_nothing() -> None:
    for path in [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert not re.fullmatch(r"(utils?|common|helpers?|misc|managers?)", path.stem), path


def test_jobs_are_short_and_name_their_own_command() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert {job.stem for job in jobs} >= {"ingest", "train_dseh", "encode", "build_index", "evaluate", "pipeline"}
    for job in jobs:
        text = job.read_text()
        assert len(text.splitlines()) <= 35 and f"jobs/{job.name}" in text, job


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_every_job_is_its_command(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "jobs" / job), run_name="__main__")
    assert stopped.value.code == 0
    names = {f"{verb}_index.py": f"index {verb}" for verb in ("build", "append", "compact")}
    names["duplicates.py"] = "index duplicates"
    name = "train" if job.startswith("train_") else names.get(job, job.removesuffix(".py"))
    assert f"usage: hashray {name} " in capsys.readouterr().out


def test_every_cited_section_of_the_methods_is_there() -> None:
    sections = set(re.findall(r"^#{2,3} (\d(?:\.\d+)?)\.? |^(\d\.\d+) ", (ROOT / "docs/METHODS.md").read_text(), re.M))
    known = {number for pair in sections for number in pair if number}
    cited: dict[str, str] = {}
    for folder in ("hashray", "tests", "jobs", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                cited |= dict.fromkeys(
                    re.findall(r"METHODS(?:\.md)?(?:'s?)? (\d(?:\.\d+)?)", path.read_text()), str(path)
                )
    assert len(cited) > 10 and not {number: path for number, path in cited.items() if number not in known}


@pytest.mark.parametrize("command", names_of_commands())
def test_every_help_works(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: hashray {command} " in text
    assert f"Example:\n  hashray {command} " in text


def test_every_config_validates_and_its_header_tells_protocol_cost_and_expectation() -> None:
    configs = sorted((ROOT / "jobs/configs").glob("*.toml"))
    assert configs
    for path in configs:
        text = path.read_text()
        validate(TrainConfig, tomllib.loads(text), str(path))
        head = text.split("\n\n")[0]
        for word in ("Protocol", "Cost", "Expected"):
            (said,) = re.findall(rf"# {word}: (.*)", head)
            assert said.lower() != word.lower(), f"{path}: fill in {word}"


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"hashray ([a-z]+(?: build)?)\b", "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S))):
        assert any(stage.startswith(name.split()[0]) for stage in names_of_commands()), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z0-9-]+)`?", text):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"(?:jobs|cluster|benchmarks|tests|hashray)/[\w/.-]+\.\w+", text):
        assert (ROOT / path).exists(), path


def public_objects() -> list[tuple[str, object]]:
    objects = []
    for name in MODULES:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == name
            if defined_here and not key.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                objects.append((f"{name}.{key}", value))
    return objects


def test_public_names_are_documented_and_documented_arguments_exist() -> None:
    for name, value in public_objects():
        doc = inspect.getdoc(value)
        assert doc, name
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", doc, re.M)
        if section:
            parameters = set(inspect.signature(value).parameters)  # type: ignore[arg-type]
            listed = re.findall(r"^    ([\w, ]+):", section[1], re.M)
            documented = {word.strip() for names in listed for word in names.split(",")}
            # A line may document several by "a: …; b: …", which this reads the first of.
            assert documented <= parameters, f"{name}: {documented - parameters}"


def test_errors_are_drawn_in_their_tree() -> None:
    from hashray import errors

    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.HashrayError):
            assert re.search(rf"\b{name}\b", errors.__doc__ or ""), name


def test_the_product_never_raises_a_bare_assertion_for_users_or_swallows_errors() -> None:
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} catches everything"
                only = node.body[0]
                assert not (len(node.body) == 1 and isinstance(only, ast.Pass)), f"{path}:{node.lineno} hides an error"


def test_importing_the_package_is_cheap() -> None:
    code = "import hashray, sys; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'faiss')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_setting_says_what_it_is() -> None:
    def is_table(annotation: object) -> bool:
        return any(inspect.isclass(kind) and issubclass(kind, Config) for kind in (annotation, *get_args(annotation)))

    silent = []
    for name in MODULES:
        for _, config in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if issubclass(config, Config) and config.__module__ == name:
                silent += [
                    f"{config.__name__}.{key}"
                    for key, field in config.model_fields.items()
                    if not (field.description or is_table(field.annotation) or key in ("kind", "changes", "space"))
                ]
    assert not silent
