"""hashray: from an image corpus to a searchable, sharded index of learned binary codes.

model = hashray.load_model("s3://bucket/models/dseh-64")     # .encode(images) -> uint8 [n, num_bits // 8]
index = hashray.open_index("s3://bucket/indexes/photos")     # .search(codes, k) -> ids [n, k], distances [n, k]
catalog = hashray.open_catalog("s3://bucket/indexes/photos") # .append(ids, codes) .delete(ids) -> the new version
client = hashray.Client("http://127.0.0.1:8000")             # .search(image | path | id, k) of a running hashray serve
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Client",
    "__version__",
    "create_index",
    "load_model",
    "open_catalog",
    "open_index",
]

if TYPE_CHECKING:
    from hashray.client import AsyncClient, Client
    from hashray.index.catalog import create_index, open_catalog
    from hashray.model import load_model
    from hashray.search.reader import open_index


_HOMES = {
    "AsyncClient": "hashray.client",
    "Client": "hashray.client",
    "create_index": "hashray.index.catalog",
    "load_model": "hashray.model",
    "open_catalog": "hashray.index.catalog",
    "open_index": "hashray.search.reader",
}


def __getattr__(name: str) -> Any:
    """Import torch and faiss when they are asked for, not before."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hashray' has no attribute {name!r}")
