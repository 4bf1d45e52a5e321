"""`hashray search`: query images -> nearest rows of an index, with thumbnails where a terminal shows them. No Ray."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from PIL import Image
from pydantic import Field, model_validator

from hashray.config import Config
from hashray.data.corpus import open_corpus
from hashray.data.images import BadImage, decode
from hashray.errors import InputError
from hashray.model import load_model
from hashray.progress import show_table
from hashray.search.metrics import Metrics
from hashray.search.nearest import Row, rows_of
from hashray.search.pictures import Pictures
from hashray.search.reader import Index, open_index
from hashray.search.terminal import CELL, TILE, Protocol, detect, picture_rows
from hashray.storage import read_url
from hashray.storage.cache import cache_folder

THUMBNAILS = 24  # of the nearest rows of a query; the table has all
COLUMNS = 6  # attributes in the table
LONGEST_TEXT = 60  # characters of an attribute
MOST_PIXELS = 50_000_000


class SearchConfig(Config):
    """Search an index with images."""

    index: Annotated[str, tyro.conf.Positional] = Field(description="Index, local folder or s3:// url")
    model: str = Field(description="Model that made the index's codes")
    image: tuple[str, ...] = Field(min_length=1, description="Image files, local or s3://")
    k: int = Field(10, ge=1, description="Neighbours of each query")
    within: int | None = Field(None, ge=0, description="All rows up to this distance in bits, instead of k")
    where: str | None = Field(None, description="Only rows for which this is true, such as \"class == 'cat'\"")
    version: int | None = Field(None, ge=1, description="Version of the index; unset: the newest")
    gpu: bool = Field(False, description="Search a flat index on the GPU, with the same answers")
    corpus: str | None = Field(None, description="Corpus with the images of the rows, for thumbnails")
    thumbnails: Protocol | Literal["auto"] = Field(
        "auto", description="How the terminal draws images; auto: as it says it can, none without --corpus"
    )
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON")

    @model_validator(mode="after")
    def _thumbnails_need_images(self) -> SearchConfig:
        if self.thumbnails not in ("auto", "none") and (self.corpus is None or self.json_):
            raise ValueError(
                f"thumbnails = {self.thumbnails!r} needs --corpus CORPUS, which has the images, and no --json"
            )
        return self


def search(config: SearchConfig) -> None:
    """Encode the images with the model and print each one's nearest rows."""
    index, model = open_index(config.index, version=config.version, gpu=config.gpu), load_model(config.model)
    images = []
    for path in config.image:
        try:
            images.append(decode(read_url(path)))
        except BadImage as error:
            raise InputError(f"{path} cannot be used as a query: {error}") from error
    codes = model.encode(images)
    if config.within is None:
        answer: Any = index.search(codes, min(config.k, max(1, index.rows)), config.where)
    else:
        answer = index.within(codes, config.within, config.where)
    ids, distances = answer
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
    _show(config, index, codes, images, answers)


def _show(
    config: SearchConfig, index: Index, codes: Any, images: Sequence[Image.Image], answers: Sequence[Mapping[str, Any]]
) -> None:
    """Print a table for each query, and above it the images where the terminal shows them."""
    protocol: Protocol = "none"
    if config.thumbnails != "auto":
        protocol = config.thumbnails
    elif config.corpus is not None:
        protocol = detect(os.environ, sys.stdout.isatty(), sys.stdout.encoding)
    pictures = None
    if protocol != "none" and config.corpus is not None:
        pictures = Pictures(open_corpus(config.corpus), cache_folder(), Metrics(), MOST_PIXELS)
    names = _columns(index)
    ids = [hit["id"] for answer in answers for hit in answer["hits"]]
    rows = rows_of(index, ids, codes) if names else {}
    for image, answer in zip(images, answers, strict=True):
        hits = answer["hits"]
        if pictures is not None:
            shown = hits[:THUMBNAILS]
            captions = ["query", *(f"{place}: {hit['distance']} bits" for place, hit in enumerate(shown, 1))]
            thumbnails = [image, *(_thumbnail(pictures, hit["id"]) for hit in shown)]
            for text in picture_rows(thumbnails, captions, protocol, shutil.get_terminal_size().columns):
                print(text)
        cells = [[hit["id"], str(hit["distance"]), *_texts(rows.get(hit["id"]), names)] for hit in hits]
        show_table(str(answer["query"]), ["id", f"distance of {index.num_bits}", *names], cells)


def _columns(index: Index) -> list[str]:
    """Names of the attributes that the table shows, the class first."""
    tables = [piece.attributes for piece in index.pieces if piece.attributes is not None]
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    return sorted(names, key=lambda name: name != "class")[:COLUMNS]


def _texts(row: Row | None, names: Sequence[str]) -> list[str]:
    """The attributes of a row as text; empty where it has none."""
    values = [None if row is None else row.attributes.get(name) for name in names]
    texts = [", ".join(map(str, v)) if isinstance(v, list) else "" if v is None else str(v) for v in values]
    return [text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…" for text in texts]


def _thumbnail(pictures: Pictures, row_id: str) -> Image.Image | None:
    """A row's image, small; None where the corpus does not have it, or it does not decode any more."""
    try:
        picture = pictures.thumbnail(row_id, TILE[0] * CELL[0])
    except BadImage:
        return None
    return None if picture is None else Image.open(io.BytesIO(picture.data))
