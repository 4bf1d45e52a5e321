"""What learned class codewords say about the classes: distances, a graph of relations, its communities. No Ray.

As AdaLabelHash shows it (section 5.4, Figure 3): a graph of the classes with the nearer codewords joined by the thicker
lines, cut into communities by optimising modularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hashray.codes import Codes, hamming

NEAREST = 3


def analyse(codes: Codes, classes: Sequence[str], num_bits: int, seed: int = 0) -> dict[str, Any]:
    """Relations between c class codewords, JSON-able.

    Args:
        codes: packed uint8 [c, num_bits // 8], one for each class of `classes`.

    Returns:
        `distances` [c][c] in bits; `smallest`, between two classes; `duplicates`, pairs of equal codewords;
        `nearest`, the 3 nearest classes of each, ties by name; `edges`, [i, j, weight] of the graph, each class
        joined to those as near as its third nearest, if they are nearer than two classes are on average (codewords
        that are all equally far apart have no relations), weight 1 - distance / num_bits; `communities`, lists of
        class names (Louvain, seeded).
    """
    distances = hamming(codes, codes)
    count = len(classes)
    pairs = distances[np.triu_indices(count, 1)]
    usual = pairs.mean() if len(pairs) else 0.0
    edges: dict[tuple[int, int], float] = {}
    nearest = {}
    for i in range(count):
        others = sorted((j for j in range(count) if j != i), key=lambda j: (distances[i, j], classes[j]))[:NEAREST]
        nearest[classes[i]] = [{"class": classes[j], "distance": int(distances[i, j])} for j in others]
        third = distances[i, others[-1]] if others else 0
        for j in range(count):
            if j != i and distances[i, j] <= third and distances[i, j] < usual:
                edges[min(i, j), max(i, j)] = float(1 - distances[i, j] / num_bits)
    import networkx as nx  # half a second of imports, for models with codewords only

    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_weighted_edges_from((i, j, weight) for (i, j), weight in sorted(edges.items()))
    groups = nx.community.louvain_communities(graph, weight="weight", seed=seed)
    return {
        "classes": list(classes),
        "num_bits": num_bits,
        "distances": distances.tolist(),
        "smallest": int(pairs.min()) if len(pairs) else None,
        "duplicates": int((pairs == 0).sum()),
        "nearest": nearest,
        "edges": [[i, j, weight] for (i, j), weight in sorted(edges.items())],
        "communities": sorted(sorted(classes[i] for i in group) for group in groups),
    }
