"""`hashray COMMAND …`: every stage one function, every error one message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (run again to go on).
"""

from __future__ import annotations

import errno
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, NoReturn, Union

import tyro

from hashray import __version__, interrupt
from hashray.config import Config, merge, parse, validate, with_tables
from hashray.errors import HashrayError, InputError, perhaps
from hashray.progress import be_verbose, say


@dataclass(frozen=True)
class Command:
    """A command: the function that runs it and the config class of its flags, each as `module:name`.

    A command with `reads` takes a TOML file first; `reads` is the function that reads it, and flags override it.
    """

    function: str
    config: str
    line: str
    example: str
    reads: str | None = None


Commands = dict[str, "Command | Commands"]
COMMANDS: Commands = {
    "demo": Command(
        "hashray.demo:demo",
        "hashray.demo:DemoConfig",
        "Real images, the whole pipeline, a page at the end",
        "hashray demo --out demo-out",
    ),
    "ingest": Command(
        "hashray.data.ingest:ingest",
        "hashray.data.ingest:IngestConfig",
        "Images -> corpus",
        "hashray ingest photos/ --out runs/corpus --split-protocol per-class",
    ),
    "train": Command(
        "hashray.train.rounds:train_model",
        "hashray.train.config:TrainConfig",
        "Corpus -> trained model",
        "hashray train jobs/configs/photos.toml --corpus runs/corpus --out runs/model --method.num-bits 64",
        reads="hashray.train.config:read_training_config",
    ),
    "tune": Command(
        "hashray.tune.run:tune",
        "hashray.tune.space:SweepConfig",
        "Search for a better training config, by Ray Tune",
        "hashray tune jobs/sweeps/adalabelhash.toml --corpus runs/corpus --out runs/sweep --search.trials 32",
        reads="hashray.tune.space:read_sweep",
    ),
    "encode": Command(
        "hashray.encode.codes:encode",
        "hashray.encode.codes:EncodeConfig",
        "Model + corpus -> packed codes",
        "hashray encode --model runs/model --corpus runs/corpus --out runs/codes",
    ),
    "index": {
        "build": Command(
            "hashray.index.build:build_index",
            "hashray.index.build:IndexConfig",
            "Codes -> sharded FAISS index, published",
            "hashray index build --codes runs/codes --out runs/index",
        ),
        "append": Command(
            "hashray.index.edit:append",
            "hashray.index.edit:AppendConfig",
            "Add codes as new shards",
            "hashray index append runs/index --codes runs/new-codes",
        ),
        "delete": Command(
            "hashray.index.edit:delete",
            "hashray.index.edit:DeleteConfig",
            "Delete rows by id, at once",
            "hashray index delete runs/index --ids takedowns.txt",
        ),
        "compact": Command(
            "hashray.index.edit:compact",
            "hashray.index.edit:CompactConfig",
            "Join small shards, leave out deleted rows",
            "hashray index compact runs/index",
        ),
        "rollback": Command(
            "hashray.index.edit:rollback",
            "hashray.index.edit:RollbackConfig",
            "Make an old version the newest again",
            "hashray index rollback runs/index --to 3",
        ),
        "versions": Command(
            "hashray.index.edit:versions",
            "hashray.index.edit:VersionsConfig",
            "Every version, what it changed, its rows",
            "hashray index versions runs/index",
        ),
        "import": Command(
            "hashray.index.transfer:import_index",
            "hashray.index.transfer:ImportConfig",
            "Codes of FAISS, Parquet, NumPy, pgvector or Lance -> index",
            "hashray index import codes.parquet --out runs/imported",
        ),
        "export": Command(
            "hashray.index.transfer:export_index",
            "hashray.index.transfer:ExportConfig",
            "Index -> one Parquet or FAISS file",
            "hashray index export runs/index --out codes.parquet",
        ),
        "gc": Command(
            "hashray.index.edit:gc",
            "hashray.index.edit:GcConfig",
            "Delete files that no kept version names",
            "hashray index gc runs/index --keep 10 --dry-run",
        ),
        "duplicates": Command(
            "hashray.duplicates:duplicates",
            "hashray.index.duplicates:DuplicatesConfig",
            "Index -> pairs and groups of near rows, train-query leaks, a page",
            "hashray index duplicates runs/index --out runs/duplicates --corpus runs/corpus",
        ),
    },
    "search": Command(
        "hashray.search.command:search",
        "hashray.search.command:SearchConfig",
        "Query images -> nearest rows of an index",
        "hashray search runs/index --model runs/model --image query.jpg --k 10",
    ),
    "serve": Command(
        "hashray.search.serve:serve",
        "hashray.search.serve:ServeConfig",
        "An HTTP service and a page that search an index",
        "hashray serve runs/index --model runs/model --corpus runs/corpus",
    ),
    "evaluate": Command(
        "hashray.evaluate.run:evaluate",
        "hashray.evaluate.run:EvaluateConfig",
        "mAP beside baselines, figures, report.html",
        "hashray evaluate --model runs/model --corpus runs/corpus --out runs/evaluation",
    ),
    "figures": Command(
        "hashray.report.compare:compare",
        "hashray.report.compare:FiguresConfig",
        "Evaluations beside each other, drawn",
        "hashray figures runs/a/evaluation runs/b/evaluation --out runs/figures",
    ),
    "pipeline": Command(
        "hashray.pipeline:pipeline",
        "hashray.pipeline:PipelineConfig",
        "Ingest, train, encode, index and evaluate in a row",
        "hashray pipeline jobs/configs/photos.toml --source photos/ --out runs --split-protocol per-class",
    ),
    "plan": Command(
        "hashray.plan.command:plan",
        "hashray.plan.command:PlanConfig",
        "Rows, parts, memory, disk, requests, time and price of the stages ahead",
        "hashray plan jobs/configs/photos.toml photos/ --split-protocol per-class --rows 10000000",
    ),
    "describe": Command(
        "hashray.artifact.command:describe",
        "hashray.artifact.command:ArtifactConfig",
        "What an artifact is, its parents and its size",
        "hashray describe runs/index",
    ),
    "verify": Command(
        "hashray.index.proof:verify",
        "hashray.index.proof:VerifyConfig",
        "Every checksum, every row count, ids unique",
        "hashray verify runs/index",
    ),
}
GROUPS = {"index": "Build an index of codes, change it, find duplicates in it"}
ABOUT = (
    "hashray: from an image corpus to a searchable, sharded index of learned binary codes. Every path is a local "
    "folder or s3://bucket/prefix; --endpoint-url URL names a server other than AWS; --verbose says how many requests "
    "each stage sent to S3; --version prints the version."
)


class _NotChosen(Config):
    """Stands for a command that the command line does not name: its module is not imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(_take_verbose(_take_endpoint(words)))
    except HashrayError as error:
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has gone, as in `hashray describe … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes the rest when it ends
        return 1
    except KeyboardInterrupt:
        say(f"interrupted. Finished work is kept; to go on, run the same command again: hashray {shlex.join(words)}")
        return 130
    except Exception as error:
        if not _is_of_full_disk(error):
            raise
        say(f"error: {error}. Free some space and run the same command again; finished files are kept")
        return 1


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command as this process: text is UTF-8 whatever the locale, and Ctrl-C leaves nothing running."""
    if sys.getfilesystemencoding().lower() != "utf-8":  # file names would depend on the locale
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whatever started this command, as in `hashray … >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123  # for as long as the process
        getattr(sys, name).reconfigure(errors="backslashreplace")
    interrupt.never_lose()
    code = main(arguments)
    interrupt.ignore()  # the work is over: one more Ctrl-C changes nothing
    # Not sys.exit: it would wait for threads that still decode, and a second for torch to be taken apart.
    if (ray := sys.modules.get("ray")) is not None and hasattr(ray, "shutdown"):
        ray.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def _is_of_full_disk(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or os.strerror(errno.ENOSPC) in str(error)  # as safetensors reports it


def _run(words: list[str]) -> int:
    if words == ["--version"]:
        print(f"hashray {__version__}")
        return 0
    try:
        os.getcwd()  # noqa: PTH109  # raises where the folder is gone; nothing else is wanted of it
    except FileNotFoundError as error:
        raise InputError("the working directory was deleted: change to one that exists, then run it again") from error
    path, command = _chosen(words)
    if command is None:
        try:
            asked = [*path, "--help"] if "help" in words or not words else words
            parse(_subcommands(COMMANDS, path, None), asked, "hashray", ABOUT)
        except SystemExit as stopped:  # tyro has printed the help, or what is wrong
            return int(stopped.code or 0) if words else 2
        return 2
    config_class: type[Config] = _load(command.config)
    flags, before = words[len(path) :], None
    if command.reads is not None:
        before, flags = _from_file(path[0], config_class, _load(command.reads), flags)
    leaf = (config_class,) if before is None else (config_class, before)
    config = parse(_subcommands(COMMANDS, path, leaf), [*path, *flags], "hashray", ABOUT)
    if before is not None:
        config = merge(before, config, flags)
    result = _load(command.function)(config)
    return result if isinstance(result, int) else 0


def names_of_commands() -> list[str]:
    """Every command as it is typed, groups before their commands."""
    lines = [[name] if isinstance(entry, Command) else [f"{name} {inner}" for inner in entry]
             for name, entry in COMMANDS.items()]  # fmt: skip
    return [name for line in lines for name in line]


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _chosen(words: Sequence[str]) -> tuple[list[str], Command | None]:
    """The command that the words name and its path in the table; no command where the words end in a group.

    Raises:
        InputError: a word that is no command.
    """
    table, path = COMMANDS, list[str]()
    for word in words:
        if word.startswith("-") or word == "help":
            break
        if word not in table:
            name = " ".join([*path, word])
            known = [" ".join([*path, other]) for other in table]
            raise InputError(f"{name!r} is not a command{perhaps(name, known) or '.'} Commands: {', '.join(known)}")
        path.append(word)
        entry = table[word]
        if isinstance(entry, Command):
            return path, entry
        table = entry
    return path, None


def _subcommands(table: Commands, path: Sequence[str], leaf: tuple[Any, ...] | None) -> Any:
    """The table as tyro's subcommands: `leaf` (config class, default) stands for the command at `path`.

    Only the module of that command is imported; the others are names with a line each.
    """
    kinds: list[Any] = []
    for name, entry in table.items():
        chosen = bool(path) and name == path[0]
        if not isinstance(entry, Command):
            inner = _subcommands(entry, path[1:] if chosen else (), leaf if chosen else None)
            marker = tyro.conf.subcommand(
                name, description=GROUPS[name], prefix_name=False, constructor_factory=partial(_same, inner)
            )
            kinds.append(Annotated[Any, marker])
        elif chosen and leaf is not None:
            default = {"default": leaf[1]} if len(leaf) > 1 else {}
            text = f"{leaf[0].__doc__}\n\nExample:\n  {entry.example}"
            kinds.append(Annotated[leaf[0], tyro.conf.subcommand(name, description=text, prefix_name=False, **default)])
        else:
            kinds.append(Annotated[_NotChosen, tyro.conf.subcommand(name, description=entry.line, prefix_name=False)])
    if len(kinds) == 1:  # a union of one is no union: tyro would leave the name out
        kinds.append(Annotated[_NotChosen, tyro.conf.subcommand("help", description="Print this", prefix_name=False)])
    return Union[tuple(kinds)]  # noqa: UP007  # of types that are known only now


def _same(kind: Any) -> Any:
    return kind


def _from_file(name: str, config_class: type[Config], read: Any, words: list[str]) -> tuple[Config, list[str]]:
    """The config of a command whose first argument is a TOML file, with the tables its flags are about; the flags."""
    if words and not words[0].startswith("-"):
        path, *flags = words
        return _with_kind(with_tables(read(path), flags), path, flags), flags
    if words and words[0] in ("-h", "--help"):
        say("The fields of the TOML file, with the defaults of method.kind = dseh:")
        default = validate(config_class, {"method": {"kind": "dseh"}}, "defaults")
        return with_tables(default, words), words
    raise InputError(f"hashray {name} needs a config first: hashray {name} CONFIG.toml [--any.field value]")


def _with_kind(config: Config, path: str, flags: list[str]) -> Config:
    """The config of the file with the method that a flag names: the other flags are about that one's fields."""
    kinds = [word.partition("=")[2] for word in flags if word.startswith("--method.kind=")]
    kinds += [value for word, value in pairwise(flags) if word == "--method.kind"]
    method = getattr(config, "method", None)
    if not kinds or method is None or kinds[-1] == method.kind:
        return config
    from hashray.methods import of_kind

    other, left_out = of_kind(method, kinds[-1])
    if left_out:
        say(f"note: {kinds[-1]} takes no {', '.join(f'method.{name}' for name in left_out)} from {path}")
    return config.model_copy(update={"method": other})


def _take_endpoint(words: list[str]) -> list[str]:
    """`--endpoint-url URL` is every command's, before what the environment names; workers inherit it."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--endpoint-url":
            if not equals and i + 1 == len(words):
                raise InputError("--endpoint-url needs a value, such as http://127.0.0.1:9000")
            url = value if equals else words[i + 1]
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url}
            return words[:i] + words[i + (1 if equals else 2) :]
    return words


def _take_verbose(words: list[str]) -> list[str]:
    """`--verbose` is every command's: the requests that each stage sent to S3 are said at its end."""
    if "--verbose" in words:
        be_verbose()
    return [word for word in words if word != "--verbose"]
