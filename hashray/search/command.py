"""`hashray search`: query images -> the nearest rows of an index. No Ray."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro
from pydantic import Field

from hashray.config import Config
from hashray.data.images import BadImage, decode
from hashray.errors import InputError
from hashray.model import load_model
from hashray.progress import show_table
from hashray.search.reader import open_index
from hashray.storage import read_url


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
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON")


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
    for answer in answers:
        rows = [[str(hit["id"]), str(hit["distance"])] for hit in answer["hits"]]
        show_table(str(answer["query"]), ["id", f"distance of {model.num_bits}"], rows)
