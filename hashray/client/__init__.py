"""Programs search a running `hashray serve` with this client, over HTTP with retries. No torch, no faiss, no Ray.

client = hashray.Client("http://127.0.0.1:8000")  # .search(image | path | id, k) .search_batch .image .version
for hit in client.search("query.jpg", k=10).hits:
    print(hit.id, hit.distance, hit.attributes)
"""

from hashray.client.calls import Answer, Hit, Query, ServedIndex, ServiceVersion
from hashray.client.clients import AsyncClient, Client

__all__ = ["Answer", "AsyncClient", "Client", "Hit", "Query", "ServedIndex", "ServiceVersion"]
