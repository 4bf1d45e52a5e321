"""The HTTP API: FastAPI over a `Service`. No Ray; a Ray Serve replica runs the same app."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hashray import __version__
from hashray.artifact import sha256_hex
from hashray.data.images import BadImage
from hashray.errors import HashrayError, InputError, RequestError
from hashray.search import messages
from hashray.search.groups import Kind
from hashray.search.guard import Guard, SafetyConfig, error_answer, refusal
from hashray.search.limits import MIB, Refused
from hashray.search.messages import Ask, BatchRequest, One, SearchRequest, parse_query
from hashray.search.metrics import log
from hashray.search.page import content_policy, page
from hashray.search.service import Service

PARAMETERS = tuple(Ask.model_fields)
VERSIONS = 100  # that /version lists, the newest
MOST_VALUES = 1 << 18  # in JSON; 11 M empty lists took 13 s (32 MiB, one Xeon core), in which nothing is answered
MOST_FIELDS = 32  # of an object in a body
LONGEST_NAME = 200  # characters of a field in an error
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": messages.ErrorAnswer, "description": text}
    for code, text in {
        400: "The request cannot be parsed", 401: "No bearer token, or a wrong one", 404: "No such id",
        413: "The body is too large", 415: "Another content type", 422: "A value cannot be used",
        429: "Overloaded: try again after Retry-After seconds", 503: "Not ready, or a shard does not answer",
        504: "It took too long",
    }.items()
}  # fmt: skip
BYTES = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "schema": {
        "type": "object", "required": ["image"],
        "properties": {"image": {"type": "string", "format": "binary"}, "k": {"type": "integer", "minimum": 1}},
    }
}  # fmt: skip


class _Text(Convertor[str]):
    """The rest of a path, with slashes and line feeds: an id may be any text."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _Text())


def _json_body(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}


def create_app(
    service: Service, safety: SafetyConfig | None = None, token: bytes | None = None, names: bool = True
) -> FastAPI:
    """The application; it answers once its event loop runs.

    Args:
        safety: who may ask; unset: pages of this site, for any host name.
        token: that requests need; None: none.
        names: as for `Guard`.
    """
    safety = safety or SafetyConfig()
    app = FastAPI(title="hashray", version=__version__, docs_url=None, redoc_url=None, description="Image search")
    app.state.service = service
    _add_search(app, service)
    _add_state(app, service)
    _add_looks(app, service)
    _add_errors(app)
    _describe_bodies(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(safety.allowed_hosts or ("*",)))
    app.add_middleware(Guard, service=service, token=token, names=names)
    if safety.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(safety.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )  # fmt: skip
    return app


def _add_search(app: FastAPI, service: Service) -> None:
    bodies = {"image/*": BYTES, "application/octet-stream": BYTES, "multipart/form-data": FORM}
    spoken = {"requestBody": {"content": {"application/json": _json_body(SearchRequest), **bodies}, "required": True}}

    @app.post("/search", response_model=messages.SearchAnswer, responses=ERRORS, openapi_extra=spoken)
    async def search(request: Request) -> Response:
        """Find the nearest rows of an image, a code, or a row of the index.

        The body is an image (parameters in the query string), a form with a file `image`, or JSON.
        """
        ask, one = await _parse_search(request, service.limits.batch)
        answers = await service.answer([one], ask)
        return _json({**answers[0], "request_id": request.state.request_id})

    spoken_batch = {"requestBody": {"content": {"application/json": _json_body(BatchRequest)}, "required": True}}

    @app.post("/search/batch", response_model=messages.BatchAnswer, responses=ERRORS, openapi_extra=spoken_batch)
    async def search_batch(request: Request) -> Response:
        """Find the nearest rows of several queries at once."""
        body = _validated(BatchRequest, _parsed_json(request, service.limits.batch))
        request_id = request.state.request_id
        answers = await service.answer([parse_query(one) for one in body.queries], _ask_of(body))
        # Up to 25 MB: in a thread, one answer at a time, so that other requests go on.
        each = await asyncio.to_thread(lambda: [_text({**one, "request_id": request_id}) for one in answers])
        head, tail = b'{"answers": [', b'], "request_id": ' + _text(request_id) + b"}"
        return Response(head + b", ".join(each) + tail, media_type="application/json")


async def _parse_search(request: Request, most_queries: int) -> tuple[Ask, messages.Query]:
    kind = _content_type(request)
    data: bytes = request.state.body
    given: dict[str, Any] = {key: value for key, value in request.query_params.items() if value != ""}
    if kind == "application/json":
        body = _validated(SearchRequest, {**given, **_parsed_json(request, most_queries)})
        one = _validated(One, {"code": body.code, "id": body.id, "image": body.image})
        return _ask_of(body), parse_query(one)
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=1, max_fields=16, max_part_size=MIB) as form:
                file = form.get("image")
                if not isinstance(file, UploadFile):
                    raise InputError("the form has no file named image")
                data = await file.read()
                given |= {key: value for key, value in form.items() if key != "image" and value != ""}
        except (MultiPartException, HTTPException) as error:
            raise Refused(400, f"the form cannot be parsed: {getattr(error, 'detail', error)}") from error
    elif not kind.startswith("image/") and kind != "application/octet-stream":
        raise Refused(415, f"content type {kind[:80]!r}: send image/*, application/octet-stream, a form or JSON")
    return _validated(Ask, given), messages.Query(image=data)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _ask_of(body: Ask) -> Ask:
    return Ask.model_construct(**{name: getattr(body, name) for name in PARAMETERS})


def _parsed_json(request: Request, most_queries: int) -> dict[str, Any]:
    """The object in the body. One of very many values is refused: to parse them, or list their faults, takes long."""
    if _content_type(request) != "application/json":
        raise Refused(415, "send application/json")
    data: bytes = request.state.body
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise InputError(f"the body holds more than {MOST_VALUES:,} values")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"the body is {type(value).__name__}; expected an object")
    queries = value.get("queries")
    queries = queries if isinstance(queries, list) else []
    if len(queries) > most_queries:
        raise InputError(f"queries = {len(queries):,}; at most {most_queries:,} are taken")
    for one in (value, *queries):
        if isinstance(one, dict) and len(one) > MOST_FIELDS:
            raise InputError(f"an object of {len(one):,} fields; at most {MOST_FIELDS} are taken")
    return value


def _validated(model: type[BaseModel], data: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, f['loc']))[:LONGEST_NAME] or 'body'}: {f['msg']}" for f in error.errors()[:5]
        )
        raise InputError(faults) from error


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Not ready"}})
    async def ready() -> JSONResponse:
        """Whether queries are answered; 503 while the service ends."""
        if service.draining:
            return JSONResponse({"ready": False, "why": "the service is ending"}, 503, {"Retry-After": "1"})
        return JSONResponse({"ready": True})

    @app.get("/version", responses={401: ERRORS[401]})
    async def version() -> dict[str, Any]:
        """What is served: indexes, their versions, limits."""
        limits = service.limits
        return {
            "hashray": __version__,
            "indexes": [_facts(name, served) for name, served in service.indexes.items()],
            "images": service.pictures is not None,
            "duplicates": service.groups is not None,
            "limits": {
                "k": limits.k, "offset": limits.offset, "batch": limits.batch,
                "body_bytes": limits.body_mib * MIB, "pixels": limits.pixels,
            },
        }  # fmt: skip

    @app.get("/metrics", responses={401: ERRORS[401]}, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _facts(name: str, served: Any) -> dict[str, Any]:
    facts = asdict(served.at().facts)
    oldest = max(facts.pop("oldest_kept"), served.newest - VERSIONS + 1)
    return {"name": name, "model": facts.pop("fingerprint"), **facts, "versions": [*range(oldest, served.newest + 1)]}


def _add_looks(app: FastAPI, service: Service) -> None:
    html, front_headers = page(), {"Content-Security-Policy": content_policy(), "Cache-Control": "no-cache"}

    @app.get("/", response_class=HTMLResponse)
    async def front() -> HTMLResponse:
        """The search page."""
        return HTMLResponse(html, headers=front_headers)

    refused: dict[int | str, dict[str, Any]] = {code: ERRORS[code] for code in (401, 404, 422, 429, 503, 504)}

    seen: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": BYTES}}, 304: {"description": "Not changed"}}

    @app.get("/image/{row_id:text}", responses={**refused, **seen}, response_class=Response)
    async def image(row_id: str, request: Request, size: Annotated[int, Query(ge=0, le=1024)] = 256) -> Response:
        """A row's image with its longer side at `size` pixels; with size=0 its bytes as they were ingested."""
        if service.pictures is None:
            raise Refused(404, "this service has no images: start it with --corpus")
        look = service.pictures.original if size == 0 else partial(service.pictures.thumbnail, size=max(size, 16))
        with service.admission.work(1):
            try:
                picture = await asyncio.get_running_loop().run_in_executor(service.decoders, look, row_id)
            except BadImage as error:
                raise Refused(404, f"the image cannot be decoded: {error}") from error
        if picture is None:
            raise Refused(404, f"no image has the id {row_id[:200]!r}")
        tag = f'"{sha256_hex(picture.data)[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=3600", "Content-Security-Policy": "sandbox"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(picture.data, media_type=picture.media_type, headers=headers)

    @app.get("/duplicates", responses=refused)
    async def duplicates(
        request: Request,
        offset: Annotated[int, Query(ge=0, le=1 << 53)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        kind: Annotated[Kind | None, Query()] = None,
    ) -> Response:
        """Groups of near rows, the largest first."""
        if service.groups is None:
            raise Refused(404, "this service has no duplicates: start it with --duplicates")
        with service.admission.work(1):
            total, groups = await asyncio.to_thread(service.groups.some, offset, limit, kind)
        answer = {"total": total, "within": service.groups.within, "groups": groups}
        return _json({**answer, "request_id": request.state.request_id})


def _json(value: Any) -> Response:
    return Response(_text(value), media_type="application/json")


def _text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, f['loc'][1:]))}: {f['msg']}" for f in error.errors()[:5])
        return error_answer(request.scope, 422, faults)

    @app.exception_handler(HTTPException)
    async def refused_by_route(request: Request, error: HTTPException) -> Response:
        return error_answer(request.scope, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(HashrayError)
    async def known(request: Request, error: HashrayError) -> Response:
        if isinstance(error, Refused):
            return refusal(request.scope, error)
        if isinstance(error, RequestError):
            return error_answer(request.scope, 422, str(error))
        log("failed", "error", request_id=request.state.request_id, error=str(error))
        return error_answer(
            request.scope, 503, "the index or the corpus cannot be read at the moment", {"Retry-After": "1"}
        )


def _describe_bodies(app: FastAPI) -> None:
    """Add the models of bodies that are parsed by hand to the OpenAPI document."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (SearchRequest, BatchRequest):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {})
                schemas[model.__name__] = schema
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
