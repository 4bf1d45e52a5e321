"""Attributes of the rows of an index, from a corpus or from a Parquet or CSV file with a column of ids. No Ray.

A corpus gives `class`, the names of a row's classes (a list), `split`, and the columns that ingest kept. A task that
builds a shard reads the parts of the corpus that its codes come from; a file it reads whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashray.artifact import FileRecord, Manifest, is_finished
from hashray.data.attributes import read_described
from hashray.data.corpus import ROW_SCHEMA, Corpus, open_corpus
from hashray.errors import InputError
from hashray.index.ids import one_array
from hashray.storage import open_store, split_url

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Described:
    """Where attributes come from; `parts` are the row tables of the corpus, one for each part of the codes."""

    url: str
    digest: str
    parts: tuple[FileRecord, ...] | None = None

    def read(self, part_numbers: Sequence[int]) -> pa.Table:
        """The attributes of the rows of some parts of the codes, with a column id: more rows, in any order."""
        if self.parts is None:
            folder, name = split_url(self.url)
            with open_store(folder).open(name) as file:
                return read_described(file, name)
        corpus = open_corpus(self.url)
        records = {self.parts[number].name: self.parts[number] for number in part_numbers}
        return pa.concat_tables([_of_corpus(corpus, record) for record in records.values()])


def describe_codes(url: str, codes: Manifest, code_parts: Sequence[FileRecord]) -> Described:
    """Open a source of attributes for some codes.

    Raises:
        InputError: it is no corpus and no Parquet file with a column id, or an id stands in it twice.
    """
    if is_finished(open_store(url)):
        corpus = open_corpus(url)
        split = str(codes.info.get("split", "all"))
        parts = [part for part in corpus.parts if corpus.count_part(part, split)]
        if codes.parents.get("corpus") != corpus.manifest.id or len(parts) != len(code_parts):
            raise InputError(f"{url} is not the corpus that these codes are of; name it, or a Parquet or CSV file")
        return Described(url, corpus.manifest.id, tuple(parts))
    folder, name = split_url(url)
    digest = hashlib.sha256()
    try:
        with open_store(folder).open(name) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            file.seek(0)
            table = read_described(file, name, ["id"])
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"{url} is no corpus, and no Parquet or CSV file with a column id: {error}") from error
    if table.num_columns != 1 or table.column("id").null_count:
        raise InputError(f"{url} needs a column id, with an id in every row")
    if (twice := len(table) - len(table.column("id").unique())) > 0:
        raise InputError(f"{url}: {twice:,} rows have the id of another row; each id needs one row of attributes")
    return Described(url, digest.hexdigest())


def aligned(table: pa.Table, ids: pa.Array) -> pa.Table:
    """The attributes of `ids` [n], in their order: n rows without the column id, null for ids that have none."""
    known = one_array(table.column("id").cast(ids.type)) if len(table) else pa.array([], ids.type)
    places = pc.index_in(ids, value_set=known)
    return table.drop_columns(["id"]).take(places)


def _of_corpus(corpus: Corpus, record: FileRecord) -> pa.Table:
    rows = corpus.whole_rows(record)
    labels = rows.column("labels").combine_chunks()
    names = pa.array(corpus.classes, pa.string()).take(pc.list_flatten(labels).cast(pa.int64()))
    ends = np.cumsum([0, *pc.fill_null(pc.list_value_length(labels), 0).to_pylist()])
    classes = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), names)
    columns = {"id": rows.column("id"), "class": classes, "split": rows.column("split")}
    given = rows.drop_columns(ROW_SCHEMA.names)
    return pa.table(columns | dict(zip(given.column_names, given.columns, strict=True)))
