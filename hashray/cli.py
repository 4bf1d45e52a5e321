"""`hashray STAGE …`: every stage one function, every error one message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (run again to go on).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray import __version__
from hashray.config import Config, ConfigT, override, parse_flags, validate
from hashray.errors import HashrayError, InputError, perhaps
from hashray.progress import say, show_table

# command -> (module, function, config class or None where the function parses its own arguments, one line)
STAGES: dict[str, tuple[str, str, str | None, str]] = {
    "demo": ("hashray.demo", "demo", "DemoConfig", "real images, the whole pipeline, a page at the end"),
    "ingest": ("hashray.data.ingest", "ingest", "IngestConfig", "images -> corpus"),
    "train": ("hashray.cli", "train_command", None, "CONFIG.toml [--corpus C] [--out MODEL] [--any.field value]"),
    "tune": ("hashray.cli", "tune_command", None, "SWEEP.toml [--corpus C] [--out SWEEP] [--search.trials N]"),
    "encode": ("hashray.encode.codes", "encode", "EncodeConfig", "model + corpus -> packed codes"),
    "index build": ("hashray.index.build", "build_index", "IndexConfig", "codes -> sharded FAISS index, published"),
    "search": ("hashray.cli", "search_command", "SearchConfig", "query images -> nearest rows of an index"),
    "evaluate": ("hashray.evaluate.run", "evaluate", "EvaluateConfig", "mAP beside baselines, figures, report.html"),
    "figures": ("hashray.report.compare", "compare", "FiguresConfig", "evaluations beside each other, drawn"),
    "pipeline": (
        "hashray.pipeline",
        "pipeline",
        "PipelineConfig",
        "ingest, train, encode, index and evaluate in a row",
    ),
    "describe": ("hashray.cli", "describe_command", "ArtifactConfig", "what an artifact is, from what, how big"),
    "verify": ("hashray.cli", "verify_command", "ArtifactConfig", "every checksum, every row count, ids unique"),
}


class ArtifactConfig(Config):
    """Look at one artifact: corpus, features, pseudo-labels, model, codes, index, evaluation or sweep."""

    artifact: Annotated[str, tyro.conf.Positional] = Field(description="local folder or s3:// url")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="print JSON")


class SearchConfig(Config):
    """Search an index with images."""

    index: Annotated[str, tyro.conf.Positional] = Field(description="index, local folder or s3:// url")
    model: str = Field(description="the model that made the index's codes")
    image: tuple[str, ...] = Field(description="image files, local or s3://")
    k: int = Field(10, ge=1, description="neighbours a query")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="print JSON")


def train_command(arguments: Sequence[str]) -> None:
    """Train from a TOML file, overridden by flags."""
    from hashray.train.config import TrainConfig, read_training_config
    from hashray.train.rounds import train_model

    train_model(_from_file("train", TrainConfig, read_training_config, arguments))


def tune_command(arguments: Sequence[str]) -> None:
    """Search from a TOML file, overridden by flags."""
    from hashray.tune.run import tune
    from hashray.tune.space import SweepConfig, read_sweep

    tune(_from_file("tune", SweepConfig, read_sweep, arguments))


def _from_file(
    stage: str, config_class: type[ConfigT], read: Callable[[str], ConfigT], arguments: Sequence[str]
) -> ConfigT:
    """The config of a stage whose first argument is a TOML file and whose flags override it."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: hashray {stage} CONFIG.toml [--corpus C] [--out OUT] [--any.field value]\n")
            print("All fields, with the defaults of method.kind = dseh:\n")
            override(validate(config_class, {"method": {"kind": "dseh"}}, "defaults"), ["--help"], f"hashray {stage}")
        raise InputError(f"hashray {stage} needs a config first: hashray {stage} CONFIG.toml [--any.field value]")
    path, *flags = arguments
    return override(read(path), list(flags), f"hashray {stage} {path}")


def search_command(config: SearchConfig) -> None:
    """Encode the images with the model and print each one's nearest rows."""
    from hashray.data.images import BadImage, decode
    from hashray.model import load_model
    from hashray.search.reader import open_index
    from hashray.storage import read_url

    index, model = open_index(config.index), load_model(config.model)
    images = []
    for path in config.image:
        try:
            images.append(decode(read_url(path)))
        except BadImage as error:
            raise InputError(f"{path} cannot be used as a query: {error}") from error
    ids, distances = index.search(model.encode(images), config.k)
    answers = [
        {
            "query": path,
            "hits": [
                {"id": str(row_id), "distance": int(distance)}
                for row_id, distance in zip(ids[i], distances[i], strict=True)
                if row_id is not None
            ],
        }
        for i, path in enumerate(config.image)
    ]
    if config.json_:
        print(json.dumps(answers))
        return
    for answer in answers:
        rows = [[str(hit["id"]), str(hit["distance"])] for hit in answer["hits"]]  # type: ignore[index]
        show_table(str(answer["query"]), ["id", f"distance of {model.num_bits}"], rows)


def describe_command(config: ArtifactConfig) -> None:
    """Print what an artifact is."""
    from hashray.artifact import describe

    found = describe(config.artifact)
    if config.json_:
        print(json.dumps(found))
        return
    for key, value in found.items():
        text = json.dumps(value) if isinstance(value, dict | list) else f"{value:,}" if _is_count(value) else str(value)
        print(f"{key:<16} {text}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def verify_command(config: ArtifactConfig) -> int:
    """Check everything about an artifact; print what is wrong, exit 1 if anything is."""
    from hashray.artifact import verify

    problems = verify(config.artifact)
    if config.json_:
        print(json.dumps({"artifact": config.artifact, "whole": not problems, "problems": problems}))
    elif not problems:
        print(f"{config.artifact} is whole")
    for problem in problems:
        say(f"error: {problem}")
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(_take_endpoint(words))
    except HashrayError as error:
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # who read the output has gone, as in `hashray describe … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes the rest when it ends
        return 1
    except KeyboardInterrupt:
        say("interrupted; finished parts are kept, the same command goes on from them")
        return 130


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"hashray {__version__}")
        return 0
    if words[0] == "index" and (len(words) == 1 or words[1] in ("-h", "--help")):
        known = [name for name in STAGES if name.startswith("index ")]
        print(f"usage: hashray index build …     (hashray index build --help for its flags)\nknown: {', '.join(known)}")
        return 0 if len(words) > 1 else 2
    name = " ".join(words[:2]) if words[0] == "index" else words[0]
    if name not in STAGES:
        raise InputError(f"{name!r} is not a command{perhaps(name, STAGES) or '.'} Commands: {', '.join(STAGES)}")
    module_name, function_name, config_name, _ = STAGES[name]
    module = importlib.import_module(module_name)
    function: Callable[[Any], Any] = getattr(module, function_name)
    rest = words[len(name.split()) :]
    if config_name is None:
        function(rest)
        return 0
    result = function(parse_flags(getattr(module, config_name), rest, f"hashray {name}"))
    return result if isinstance(result, int) else 0


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


def _help() -> str:
    lines = [f"  {name:<12} {line}" for name, (_, _, _, line) in STAGES.items()]
    return (
        "hashray: from an image corpus to a searchable, sharded index of learned binary codes\n\n"
        "usage: hashray COMMAND …     (hashray COMMAND --help for its flags)\n\n"
        + "\n".join(lines)
        + "\n\nEvery path is a local folder or s3://bucket/prefix; --endpoint-url URL for other servers than AWS."
    )


if __name__ == "__main__":
    sys.exit(main())
