"""Every command that the documents show exists and takes its flags; those of the front page are run, and print that."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASSES, png
from torchvision.models import mobilenet_v2

from hashray.cli import COMMANDS, Command, main, names_of_commands

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands of other programs, and why they are not run here.
NOT_RUN = {
    "make": "a target of the Makefile: `make check` and `make test` are how this test is run",
    "ray": "needs a cluster with a dashboard: tests/distributed/test_jobs.py submits every job to one",
    "docker": "no container runtime in the tests",
    "python": "part of a line above that submits a job",
    ".": "the shell's own",
}


def blocks(page: Path) -> list[str]:
    """Fenced and indented blocks of code of a page."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [*fenced, *re.findall(r"(?:^    .*\n)+", rest, re.M)]


def commands(page: Path) -> list[list[str]]:
    """Every command line of a page, a continued one joined."""
    lines = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.strip().removeprefix("$ ")
            if re.match(r"(hashray|make|ray|docker|python|kubectl|\.) ", text):
                lines.append(shlex.split(text, comments=True))
    return lines


SHOWN = [(page.name, words) for page in PAGES for words in commands(page)]


def test_the_pages_show_commands() -> None:
    assert len([words for _, words in SHOWN if words[0] == "hashray"]) >= 15


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_exists_and_takes_its_flags(page: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    if words[0] != "hashray":
        assert words[0] in NOT_RUN, words
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        for path in (word for word in words if re.fullmatch(r"(jobs|cluster|benchmarks)/[\w/.-]+\.\w+", word)):
            assert (ROOT / path).exists(), path
        return
    name = " ".join(words[1:3]) if " ".join(words[1:3]) in names_of_commands() else words[1]
    assert name in names_of_commands(), words
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        if flag not in ("--any.field", "--help", "--endpoint-url"):
            assert flag in text, f"{page}: {flag} is no flag of hashray {name}"
    for path in (word for word in words if re.fullmatch(r"jobs/[\w/.-]+\.toml", word)):
        assert (ROOT / path).exists(), path


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in names_of_commands():
        assert f"hashray {name}" in text, name
    assert all(isinstance(entry, Command | dict) for entry in COMMANDS.values())


def masked(line: str) -> str:
    """A line without what differs from run to run: numbers, hashes, the nearest rows, the width of a table."""
    text = re.sub(r"\b[0-9a-f]{12}\b|\w+/\d+\.jpg(?= │)|\w+ │ +(database|query)(\+train)?(?= │)", "#", line)
    return re.sub(r"[-\d.,]*\d", "0", re.sub(r"\s+", " ", text)).strip()


def served_until_ready(words: list[str]) -> str:
    """What a service prints in a process of its own, which is ended by SIGTERM once it is ready."""
    command = [sys.executable, "-m", "hashray", *words, "--port", "0"]
    lines = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if '"event": "ready"' in line:
                break
        process.terminate()
        lines += process.stderr.readlines()
    assert process.returncode == 0, lines
    return "".join(lines)


def test_the_front_page_commands_run_and_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [text for text in blocks(PAGES[0]) if "$ hashray ingest" in text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    for i in range(90):  # five classes, as on the page; enough rows for its protocol
        folder = tmp_path / "photos" / (*CLASSES, "dog", "emu")[i % 5]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i // 5 + 1:03d}.jpg").write_bytes(png(i))
    torch.manual_seed(0)
    torch.save(mobilenet_v2().state_dict(), tmp_path / "mobilenet_v2_features_fp32.pth")
    smaller = {"--query-per-class": "4", "--train-per-class": "10"}  # the page's own folder is larger
    extra = {"train": ["--backbone.image-size", "32", "--epochs", "2", "--ray", "never"]}
    for part in re.split(r"^\$ hashray ", block, flags=re.M)[1:]:
        line, *shown = part.splitlines()
        words = shlex.split(line)
        words = [smaller.get(words[i - 1], word) for i, word in enumerate(words)]
        if words[0] == "serve":
            text = served_until_ready(words)
        else:
            with contextlib.redirect_stdout(sys.stderr):  # one text, in the order of printing
                assert main([*words, *extra.get(words[0], [])]) == 0, words
            text = capsys.readouterr().err
        lines = [masked(line.replace(str(tmp_path), "…")) for line in text.splitlines()]
        printed = iter(lines)
        missing = [text for text in shown if text.strip() and masked(text) not in printed]  # in this order
        assert not missing, (words, missing, lines)

    (python,) = [text for text in blocks(PAGES[0]) if text.startswith("import hashray")]
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["ids"].shape == (1, 10) and names["distances"][0][0] == 0


def test_the_front_page_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 150
