"""The requests of the service's API and its answers as plain data: what a client sends, and how it reads a reply."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

from hashray.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Target: TypeAlias = str | Path | bytes | Image.Image
    Code: TypeAlias = str | bytes | np.ndarray

T = TypeVar("T")
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Hit:
    """A neighbour: its id, its distance in bits, its code in hexadecimal and its attributes."""

    id: str
    distance: int
    code: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The neighbours of one query, ascending by distance, ties by id.

    `more`: there are further rows behind these. `degraded`: `missing_shards` shards did not answer, so nearer rows may
    be missing. `query_id` is None where the query is an image or a code.
    """

    hits: tuple[Hit, ...]
    query_code: str
    query_id: str | None
    version: int
    index: str
    num_bits: int
    rows: int
    more: bool
    degraded: bool
    missing_shards: int
    took_ms: float
    request_id: str


@dataclass(frozen=True)
class ServedIndex:
    """An index of the service; `versions` are those that can be searched, `model` is the fingerprint of its model."""

    name: str
    version: int
    versions: tuple[int, ...]
    rows: int
    num_bits: int
    kind: str
    model: str | None
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class ServiceVersion:
    """What a service is: its hashray, its indexes, what else it serves, and its limits by name."""

    hashray: str
    indexes: tuple[ServedIndex, ...]
    images: bool
    duplicates: bool
    limits: Mapping[str, int]


@dataclass(frozen=True)
class Query:
    """One query; exactly one field is set. It tells `search_batch` what a str is: a path or an id."""

    image: Target | None = None
    id: str | None = None
    path: str | Path | None = None
    code: Code | None = None


@dataclass(frozen=True)
class Options:
    """What is wanted of the neighbours; None is the service's default."""

    k: int
    offset: int
    within: int | None
    where: str | None
    version: int | None
    index: str

    def given(self) -> dict[str, Any]:
        """Names and values of the options that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how the body of its answer is read; `arguments` are httpx's: params, json, files, data."""

    method: str
    path: str
    read: Callable[[bytes], T]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def search_call(query: Query, options: Options) -> Call[Answer]:
    """The request for the neighbours of one query; an image goes as a form, so that it is not a third longer."""
    plain = plain_query(query)
    given = options.given()
    if isinstance(image := plain.get("image"), bytes):
        form = {name: str(value) for name, value in given.items()}
        arguments: dict[str, Any] = {"files": {"image": ("image", image)}, "data": form}
    else:
        arguments = {"json": plain | given}
    return Call("POST", "/search", lambda body: _answer(_object(body)), arguments)


def batch_call(queries: Sequence[Target | Query], options: Options) -> Call[list[Answer]]:
    """The request for the neighbours of several queries."""
    each = [plain_query(query if isinstance(query, Query) else Query(query)) for query in queries]
    lines = [{name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
              for name, value in one.items()} for one in each]  # fmt: skip

    def read(body: bytes) -> list[Answer]:
        answers = [_answer(one) for one in _object(body)["answers"]]
        if len(answers) != len(lines):
            raise ValueError(f"{len(answers)} answers to {len(lines)} queries")
        return answers

    return Call("POST", "/search/batch", read, {"json": {"queries": lines, **options.given()}})


def image_call(row_id: str, size: int) -> Call[bytes]:
    """The request for a row's image."""
    return Call("GET", f"/image/{quote(row_id, safe='', errors='replace')}", bytes, {"params": {"size": size}})


def version_call() -> Call[ServiceVersion]:
    """The request for what is served."""

    def read(body: bytes) -> ServiceVersion:
        answer = _object(body)
        indexes = [_taken(ServedIndex, {**one, "versions": tuple(one["versions"])}) for one in answer["indexes"]]
        return _taken(ServiceVersion, {**answer, "indexes": tuple(indexes)})

    return Call("GET", "/version", read)


def plain_query(query: Query) -> dict[str, str | bytes]:
    """The one field of a query as JSON has it: {"id": str}, {"code": hexadecimal} or {"image": bytes}.

    Raises:
        InputError: not exactly one field is set, a file cannot be read, or the type is none of those allowed.
    """
    fields_set = [name for name in ("image", "id", "path", "code") if getattr(query, name) is not None]
    if len(fields_set) != 1:
        raise InputError(f"expected exactly one of image, id, path and code; {len(fields_set)} are given")
    if query.code is not None:
        return {"code": _hexadecimal(query.code)}
    if query.id is not None:
        return {"id": query.id}
    if query.path is not None:
        return {"image": _bytes_of(Path(query.path))}
    return _target(query.image)


def _target(target: Target | None) -> dict[str, str | bytes]:
    """A query by its type: a str is a path where such a file exists, else an id."""
    if isinstance(target, str):
        try:
            there = Path(target).is_file()
        except (OSError, ValueError):  # too long for a path, or no path at all
            there = False
        return {"image": _bytes_of(Path(target))} if there else {"id": target}
    if isinstance(target, Path):
        return {"image": _bytes_of(target)}
    if isinstance(target, bytes | bytearray | memoryview):
        return {"image": bytes(target)}
    from PIL import Image  # only for those that have one

    if not isinstance(target, Image.Image):
        raise InputError(f"{type(target).__name__} is no query: expected a PIL image, bytes, a path or an id")
    return {"image": _png(target)}


def _png(image: Image.Image) -> bytes:
    """The image with what the service looks at: its pixels, transparency, and the EXIF orientation."""
    from PIL import Image

    image.load()  # which turns a TIFF, and changes its tag
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = image.getexif().get(ORIENTATION_TAG, 1)
    if image.mode not in PNG_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    sink = io.BytesIO()
    image.save(sink, "PNG", exif=exif)
    return sink.getvalue()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', error)}") from error


def _hexadecimal(code: Code) -> str:
    if isinstance(code, str):
        return code
    if isinstance(code, bytes | bytearray):
        return code.hex()
    if getattr(code, "dtype", None) != "uint8" or code.ndim != 1:
        raise InputError(f"code {code!r}: expected hexadecimal text, bytes or uint8 [num_bits // 8]")
    return code.tobytes().hex()


def _object(body: bytes) -> dict[str, Any]:
    value = json.loads(body)
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return value


def _answer(answer: Mapping[str, Any]) -> Answer:
    query = answer["query"]
    hits = tuple(_taken(Hit, hit) for hit in answer["hits"])
    return _taken(Answer, {**answer, "hits": hits, "query_code": query["code"], "query_id": query["id"]})


def _taken(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of its fields in `values`; others are left out, so that a newer service can say more."""
    return kind(**{name.name: values[name.name] for name in fields(kind)})  # type: ignore[arg-type]
