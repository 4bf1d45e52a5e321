"""The bodies of requests, as pydantic models: their fields are the API's documentation. No Ray."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hashray.errors import InputError

LONGEST_WHERE = 4096
Name = Literal["main", "compare"]
ONE_OF: dict[str, Any] = {"oneOf": [{"required": [name]} for name in ("code", "id", "image")]}
MISSING_CODE = "expected exactly one of code, id and image"


class Ask(BaseModel):
    """What is wanted of the neighbours of each query."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(10, ge=1, description="Neighbours of each query")
    offset: int = Field(0, ge=0, description="Neighbours to leave out, nearest first")
    within: int | None = Field(None, ge=0, description="Only rows up to this distance in bits")
    where: str | None = Field(
        None, max_length=LONGEST_WHERE, description="Only rows for which this is true: class == 'cat'"
    )
    version: int | None = Field(None, ge=1, description="Version of the index; unset: the newest")
    index: Name = Field("main", description="main, or the index that the service compares it with")


class One(BaseModel):
    """One query: exactly one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=ONE_OF)

    code: str | None = Field(None, description="Packed code in hexadecimal, num_bits / 4 digits")
    id: str | None = Field(None, description="An id in the index: its neighbours are wanted")
    image: str | None = Field(None, description="Bytes of an image in base64")

    @model_validator(mode="after")
    def _one(self) -> One:
        if sum(value is not None for value in (self.code, self.id, self.image)) != 1:
            raise ValueError(MISSING_CODE)
        return self


class SearchRequest(Ask):
    """A query and what is wanted of its neighbours."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=ONE_OF)

    code: str | None = Field(None, description="Packed code in hexadecimal, num_bits / 4 digits")
    id: str | None = Field(None, description="An id in the index: its neighbours are wanted")
    image: str | None = Field(None, description="Bytes of an image in base64")


class BatchRequest(Ask):
    """Several queries, and what is wanted of the neighbours of each."""

    queries: list[One] = Field(min_length=1, description="The queries")


class Hit(BaseModel):
    """A neighbour."""

    id: str
    distance: int = Field(description="Bits in which its code differs")
    code: str = Field(description="Its packed code in hexadecimal")
    attributes: dict[str, Any]


class QueryEcho(BaseModel):
    """The query as it was understood."""

    id: str | None
    code: str


class SearchAnswer(BaseModel):
    """The neighbours of a query, ascending by distance, ties by id."""

    version: int
    index: Name
    num_bits: int
    rows: int
    query: QueryEcho
    hits: list[Hit]
    more: bool = Field(description="Whether there are further rows behind these")
    degraded: bool = Field(description="Whether some shards did not answer")
    missing_shards: int
    took_ms: float
    request_id: str


class BatchAnswer(BaseModel):
    """The answer to each query, in their order."""

    answers: list[SearchAnswer]
    request_id: str


class ErrorAnswer(BaseModel):
    """Why a request failed."""

    error: str
    request_id: str


@dataclass(frozen=True)
class Query:
    """One query, parsed: exactly one of its fields is set."""

    code: bytes | None = None
    id: str | None = None
    image: bytes | None = None


def parse_query(one: One) -> Query:
    """The bytes of a query.

    Raises:
        InputError: no hexadecimal, no base64, or an id that is no Unicode text.
    """
    if one.code is not None:
        try:
            return Query(code=bytes.fromhex(one.code))
        except ValueError as error:
            raise InputError(f"code {one.code[:80]!r} is not hexadecimal") from error
    if one.image is not None:
        try:
            return Query(image=base64.b64decode(one.image, validate=True))
        except (binascii.Error, ValueError) as error:
            raise InputError(f"image is not base64: {error}") from error
    try:
        (one.id or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(f"id {one.id!r:.80} is not Unicode text: {error.reason}") from error
    return Query(id=one.id)
