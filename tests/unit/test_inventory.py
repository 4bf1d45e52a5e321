"""The inventory of a source by tasks: the same rows however it is shared out, equal ids always seen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from listing import list_source

from hashray.data import listed
from hashray.data.inventory import take_inventory
from hashray.data.listing import SourceConfig, SourceRow
from hashray.data.splits import order_key
from hashray.data.unique import equal_hashes
from hashray.engine.session import WorkersConfig
from hashray.errors import InputError
from hashray.storage import open_store

HERE = WorkersConfig(ray="never")


def table(ids: list[str], values: list[Any], seed: int = 0) -> pa.Table:
    rows = [SourceRow(row_id, f"at {row_id}", value, None, 1) for row_id, value in zip(ids, values, strict=True)]
    (out,) = (
        listed.to_tables(rows, seed, True, len(rows) + 1, lambda chunk: None)
        if rows
        else (listed.SCHEMA.empty_table(),)
    )
    return out


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=1), st.integers(1, 5), st.booleans())
def test_shares_of_hashes_hold_every_row_once(numbers: list[int], count: int, in_order: bool) -> None:
    whole = table([str(number) for number in numbers], numbers)
    data = listed.to_bytes(listed.in_order(whole) if in_order else whole)
    shares = [listed.between(io.BytesIO(data), "key", (n, count)).column("id").to_pylist() for n in range(count)]
    assert sorted(row_id for share in shares for row_id in share) == sorted(map(str, numbers))
    if in_order:  # one after the other they are the seeded order
        assert [i for share in shares for i in share] == sorted(map(str, numbers), key=lambda i: order_key(0, i))


def test_only_row_groups_that_reach_into_a_share_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "PRUNE_ROWS", 100)
    ids = [str(i) for i in range(1000)]
    data = listed.to_bytes(listed.in_order(table(ids, ids)))
    read: list[int] = []
    read_row_groups = pq.ParquetFile.read_row_groups

    def count(self: pq.ParquetFile, groups: list[int], **options: Any) -> pa.Table:
        read.extend(groups)
        return read_row_groups(self, groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", count)
    assert len(listed.between(io.BytesIO(data), "key", (3, 10))) > 50
    assert 1 <= len(read) <= 3


@given(st.integers(0, 30), st.integers(1, 12))
def test_tables_of_listed_rows_are_of_bounded_size(count: int, most: int) -> None:
    rows = [SourceRow(f"{i}", "", [], None) for i in range(count)]
    chunks: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listed, "CHUNK_ROWS", 5)
        tables = list(listed.to_tables(rows, 0, False, most, lambda chunk: chunks.append(len(chunk))))
    assert [len(table) for table in tables] == [most] * (count // most) + [count % most] * (count % most > 0)
    assert [i for table in tables for i in table.column("id").to_pylist()] == [f"{i}" for i in range(count)]
    assert sum(chunks) == count and all(0 < size <= 5 for size in chunks)


def equal_ids(rows: pa.Table, column: str) -> list[list[str]]:
    hashes = listed.between(io.BytesIO(listed.sorted_hashes(rows, column)), "hash", (0, 1)).column("hash").to_numpy()
    return listed.equal_ids(listed.ids_of(rows, column, equal_hashes(hashes.copy())), column)


@given(st.lists(st.sampled_from(["a", "A", "b", "ä", "a\u0308", "c"]), max_size=12))
def test_equal_ids_and_ids_that_look_equal(ids: list[str]) -> None:
    rows = table(ids, ids)
    equal = {i: ids.count(i) for i in ids if ids.count(i) > 1}
    assert {group[0]: len(group) for group in equal_ids(rows, "key")} == equal
    looks: dict[str, list[str]] = {}
    for row_id in ids:
        looks.setdefault({"A": "a", "a\u0308": "ä"}.get(row_id, row_id), []).append(row_id)
    expected = sorted(sorted(group) for group in looks.values() if len(group) > 1)
    assert sorted(sorted(group) for group in equal_ids(rows, "fold")) == expected


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 3)), unique_by=lambda pair: pair[0]), st.integers(1, 4))
def test_the_first_rows_of_each_value(pairs: list[tuple[int, int]], count: int) -> None:
    ids, values = [str(number) for number, _ in pairs], [value for _, value in pairs]
    drawn = listed.smallest(table(ids, values, seed=7), count)
    for value in set(values):
        mine = sorted((i for i, v in zip(ids, values, strict=True) if v == value), key=lambda i: order_key(7, i))
        assert drawn[str(value)] == (tuple(mine[:count]), len(mine) > count)
    assert len(drawn) == len(set(values))


def test_a_folder_shared_out_by_prefixes_has_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"train/n{i % 5:02d}/deep/er/{i:03d}.JPEG" for i in range(60)]
    keys += [f"val/images/v{i}.JPEG" for i in range(6)] + ["top.png", "train/.hidden/x.png", "train/n00/notes.md"]
    for key in keys:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    lines = "".join(f"v{i}.JPEG\tn{i % 5:02d}\t0\n" for i in range(6))
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    (tmp_path / "train" / "n01" / "again").symlink_to(tmp_path / "train")
    (tmp_path / "top.png").unlink()
    whole = list_source(str(tmp_path), SourceConfig())
    assert len(whole.rows) == 66
    for most, prefixes in ((5, 256), (5, 3), (20, 1)):
        monkeypatch.setattr("hashray.data.inventory.LISTED_AT_ONCE", most)
        monkeypatch.setattr("hashray.data.sources.MOST_PREFIXES", prefixes)
        monkeypatch.setattr("hashray.data.inventory.MIXED_ROWS", 10)
        shared = list_source(str(tmp_path), SourceConfig())
        assert shared.rows == whole.rows
        assert (shared.survey.seen, +shared.survey.skipped) == (whole.survey.seen, +whole.survey.skipped)
        assert {row.id for row in shared.survey.lost} == {row.id for row in whole.survey.lost}


def test_an_id_twice_is_seen_in_any_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashray.data.sources.UNIT_BYTES", 1)
    monkeypatch.setattr("hashray.data.inventory.EQUAL_ROWS", 3)
    monkeypatch.setattr("hashray.data.inventory.BLOCK_ROWS", 2)
    for number in range(5):
        ids = [f"{number}-{i}" for i in range(4)] + (["twice"] if number in (1, 4) else [])
        pq.write_table(pa.table({"id": ids, "image": [b"x"] * len(ids)}), tmp_path / f"{number}.parquet")
    with pytest.raises(InputError, match=r"1 ids occur more than once, for example 'twice' \(2 times\); ids must be"):
        list_source(str(tmp_path), SourceConfig())


def test_the_files_of_listed_rows_are_parts_within_their_bounds(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(1, 100, 50).tolist()
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(b"x" * size)
    with take_inventory(str(tmp_path), SourceConfig(), 3, 8, 300, HERE, open_store("unused")) as inventory:
        (block,) = inventory.blocks
        parts = _groups(inventory.store.read(block.name))
    assert [len(part) for part in parts] == list(block.part_rows)
    assert [row_id for part in parts for row_id in part.column("id").to_pylist()] == sorted(
        (f"{number}.png" for number in range(50)), key=lambda row_id: order_key(3, row_id)
    )
    assert all(
        len(part) <= 8 and (len(part) == 1 or sum(part.column("size_bytes").to_pylist()) <= 300) for part in parts
    )


def _groups(data: bytes) -> list[pa.Table]:
    file = pq.ParquetFile(pa.BufferReader(data))
    return [file.read_row_group(n) for n in range(file.num_row_groups)]
