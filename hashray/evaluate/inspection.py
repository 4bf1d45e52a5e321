"""What a look at the model itself shows: how sure its bits are, how its class codewords relate. No Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.codes import Codes, binarize
from hashray.data.corpus import Corpus
from hashray.evaluate.codewords import analyse
from hashray.evaluate.sides import Side
from hashray.metrics import code_health
from hashray.model import Model
from hashray.progress import say

HEALTH_ROWS = 256
CODEWORD_CLASSES = 1000  # above, a matrix of distances and a graph are no longer looked at


def logit_health(model: Model, corpus: Corpus, split: str, query: Side) -> dict[str, float]:
    """How far the logits of some queries lie from 0 (METHODS 6.7): of those in the first part that has any."""
    part = query.parts[0]
    ids = [row_id for row_id, number in zip(query.ids, query.parts, strict=True) if number == part]
    table = corpus.read_part(corpus.parts[part], split)
    table = table.filter(pc.is_in(table.column("id"), pa.array(ids, table.schema.field("id").type)))
    table = table.slice(0, HEALTH_ROWS)
    logits = model.logits(corpus.inputs(table, model.backbone.image_size, model.backbone.framing))
    whole = code_health(binarize(logits), logits=np.tanh(logits))
    return {name: whole[name] for name in ("near_zero", "quantization", "exact_zeros")}


def codewords(
    words: Codes | None, model: Model, corpus: Corpus, taught: NDArray[np.bool_], parts: set[int], seed: int
) -> dict[str, Any]:
    """Distances and communities of the class codewords, of the classes that have train rows; {} without any.

    Args:
        words: packed codewords uint8 [c, b], one for each class; None if the model has none.
        taught: bool [c], the classes of the train rows in `parts` of the corpus; the other parts are read here.
    """
    if words is None:
        return {}
    for number, record in enumerate(corpus.parts):
        if number not in parts and corpus.count_part(record, "train"):
            taught = taught | corpus.label_matrix(corpus.part_rows(record, "train")).any(0)
    shown = np.flatnonzero(taught)
    if not 1 < len(shown) <= CODEWORD_CLASSES:
        return {}
    if model.classes != corpus.classes:
        say("codewords left out: the model was trained on other classes than the corpus has")
        return {}
    names = [corpus.classes[i] for i in shown]
    return {"codewords": analyse(words[shown], names, model.num_bits, seed)}
