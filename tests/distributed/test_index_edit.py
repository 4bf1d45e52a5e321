"""`hashray index append | delete | compact | …` on Ray and without: the same index, every row accounted for."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from test_index_build import check_answers, draw, write_codes
from tiny import CLASSES, files_of, write_corpus, write_tiny_model

from hashray import artifact, open_catalog, open_index
from hashray.artifact import versions
from hashray.cli import main
from hashray.encode.codes import EncodeConfig, encode
from hashray.engine.session import WorkersConfig
from hashray.errors import InputError, MismatchError
from hashray.index import edit
from hashray.index.build import IndexConfig, build_index
from hashray.index.edit import AppendConfig, CompactConfig

pytestmark = pytest.mark.usefixtures("ray_session")
RAY = {"always": WorkersConfig(ray="always"), "never": WorkersConfig(ray="never")}


def built(tmp_path, rows=900, first=600):
    """An index of the first rows; ids and codes of all, and the codes of the others as an artifact."""
    ids, codes = draw(0, rows)
    write_codes(tmp_path / "first", ids[:first], codes[:first])
    write_codes(tmp_path / "more", ids[first:], codes[first:])
    build_index(IndexConfig(codes=str(tmp_path / "first"), out=str(tmp_path / "index"), shards=3, pool=RAY["never"]))
    return str(tmp_path / "index"), ids, codes


def test_append_and_compact_are_the_same_on_ray_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr(edit, "ROWS_PER_SHARD", 100)
    stores = []
    for how, pool in RAY.items():
        url, ids, codes = built(tmp_path / how)
        edit.append(AppendConfig(index=url, codes=str(tmp_path / how / "more"), pool=pool))
        assert open_index(url).rows == 900 and len(open_index(url).pieces) == 6
        check_answers(url, ids, codes)
        open_catalog(url).delete(ids[100:400])
        kept = [*range(100), *range(400, 900)]
        edit.compact(CompactConfig(index=url, rows_per_shard=450, pool=pool))
        assert open_index(url).rows == 600 and len(open_index(url).pieces) == 2
        check_answers(url, [ids[row] for row in kept], codes[kept])
        assert artifact.verify(url) == [] and not list((tmp_path / how / "index").rglob("progress/*/*"))
        stores.append(files_of(url))
    assert stores[0] == stores[1]


def test_an_append_that_is_run_again(tmp_path, capsys):
    url, ids, codes = built(tmp_path)
    config = AppendConfig(index=url, codes=str(tmp_path / "more"), pool=RAY["never"])
    edit.append(config)
    edit.append(config)
    assert "these codes are there already, since version 2" in capsys.readouterr().err
    assert open_catalog(url).version == 2
    open_catalog(url).delete(ids[650:660])
    with pytest.raises(InputError, match="290 of the ids are in the index already"):
        edit.append(config)
    assert open_index(url).rows == 890
    edit.append(config.model_copy(update={"replace": True}))
    assert open_index(url).rows == 900 and artifact.verify(url) == []
    check_answers(url, ids, codes)


def test_an_append_after_a_garbage_collection(tmp_path):
    """A rerun is looked for in the manifests of versions whose files are gone."""
    url, _, codes = built(tmp_path)
    catalog = open_catalog(url)
    for number in range(4):
        catalog.append([f"x{number}"], codes[:1])
    table = artifact.load_manifest(url, "index", artifact.version_key(3)).tables[-1].name
    catalog.gc(keep=1, grace_s=0)
    assert not catalog.store.exists(table)
    for kept in (sys.modules["hashray.artifact.publish"]._records, versions._parsed):  # as in a new process
        kept.cache_clear()
    edit.append(AppendConfig(index=url, codes=str(tmp_path / "more"), pool=RAY["never"]))
    assert catalog.version == 7 and open_index(url).rows == 904


def test_codes_whose_rows_were_replaced_are_not_there(tmp_path):
    url, ids, codes = built(tmp_path)
    config = AppendConfig(index=url, codes=str(tmp_path / "more"), pool=RAY["never"])
    edit.append(config)
    open_catalog(url).append(ids[650:660], codes[:10], replace=True)
    with pytest.raises(InputError, match="of the ids are in the index already"):
        edit.append(config)


def test_codes_that_do_not_fit(tmp_path):
    url, ids, codes = built(tmp_path)
    write_codes(tmp_path / "narrow", ids[:5], codes[:5, :4])
    with pytest.raises(MismatchError, match="codes of 32 bits cannot be appended to an index of 48 bits"):
        edit.append(AppendConfig(index=url, codes=str(tmp_path / "narrow")))
    write_codes(tmp_path / "twice", ["x", *ids[600:], "x"], codes[: len(ids) - 598])
    with pytest.raises(InputError, match="1 ids stand in more than one row, the first 'x'"):
        edit.append(AppendConfig(index=url, codes=str(tmp_path / "twice"), pool=RAY["never"]))
    assert open_catalog(url).version == 1
    write_codes(tmp_path / "none", [], codes[:0], num_parts=1)
    edit.append(AppendConfig(index=url, codes=str(tmp_path / "none")))
    assert open_catalog(url).version == 1


def test_attributes_of_a_parquet_file(tmp_path):
    _, ids, codes = built(tmp_path)
    order = np.random.default_rng(3).permutation(850)
    table = pa.table({"id": [ids[row] for row in order], "row": order, "tag": [f"t{row % 3}" for row in order]})
    pq.write_table(table, tmp_path / "tags.parquet")
    config = IndexConfig(codes=str(tmp_path / "first"), out=str(tmp_path / "tagged"), shards=3, pool=RAY["never"],
                         attributes=str(tmp_path / "tags.parquet"))  # fmt: skip
    manifest = build_index(config)
    assert build_index(config) == manifest
    append = AppendConfig(
        index=config.out, codes=str(tmp_path / "more"), attributes=config.attributes, pool=RAY["never"]
    )
    edit.append(append)
    index = open_index(config.out)
    answers, _ = index.search(codes[:1], 900, "row >= 500 and tag == 't1'")
    assert sorted(name for name in answers[0] if name) == sorted(ids[row] for row in range(500, 850) if row % 3 == 1)
    assert sorted(name for name in index.search(codes[:1], 900, "is_null(row)")[0][0] if name) == sorted(ids[850:])
    csv.write_csv(table, tmp_path / "tags.csv")
    again = {"out": str(tmp_path / "csv"), "attributes": str(tmp_path / "tags.csv")}
    build_index(config.model_copy(update=again))
    answer = open_index(again["out"]).search(codes[:1], 900, "row < 40 and tag != 't0'")[0][0]
    assert sorted(name for name in answer if name) == sorted(ids[row] for row in range(40) if row % 3)
    pq.write_table(table.append_column("id2", table.column("id")).drop_columns(["id"]), tmp_path / "no.parquet")
    for name, text in (("no.parquet", "needs a column id|no corpus"), ("nothing.parquet", "not found")):
        with pytest.raises(InputError, match=text):
            edit.append(append.model_copy(update={"replace": True, "attributes": str(tmp_path / name)}))
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="850 rows have the id of another row"):
        edit.append(append.model_copy(update={"replace": True, "attributes": str(tmp_path / "twice.parquet")}))


def test_the_commands(tmp_path, capsys):
    url, ids, codes = built(tmp_path)
    (tmp_path / "gone.txt").write_text("\n".join(ids[:7]) + "\n")
    lines = [
        (["append", url, "--codes", str(tmp_path / "more"), "--ray", "never"], 0, "900 rows in 4 shards, version 2"),
        (["delete", url, "--ids", str(tmp_path / "gone.txt")], 0, "893 rows in 4 shards, version 3"),
        (["delete", url, "--ids", ids[0], ids[8]], 2, f"1 of the ids are not in version 3 .* {ids[0]!r}"),
        (["delete", url, "--ids", ids[0], ids[8], "--missing-ok"], 0, "892 rows in 4 shards, version 4"),
        (["delete", url, "--ids", ids[0], "--missing-ok"], 0, "none of the 1 ids is there: version 4 stays as it is"),
        (["delete", url, "--ids", str(tmp_path / "typo.txt"), "--missing-ok"], 2, "typo.txt not found"),
        (["compact", url, "--ray", "never"], 0, "892 rows in 1 shard, version 5"),
        (["compact", url, "--ray", "never"], 0, "version 5 stays as it is"),
        (["rollback", url, "--to", "2"], 0, "900 rows in 4 shards, version 6"),
        (["rollback", url, "--to", "9"], 2, "the newest version is 6"),
        (["gc", url, "--keep", "1", "--grace-hours", "0", "--dry-run"], 0, "files of .* would be deleted"),
        (["gc", url, "--keep", "1", "--grace-hours", "0"], 0, "deleted; versions 6 to 7 are kept"),
        (["rollback", url, "--to", "5"], 2, "the files of version 5 were removed by garbage collection"),
    ]
    for words, code, text in lines:
        assert main(["index", *words]) == code, words
        assert re.search(text, capsys.readouterr().err), (words, text)
    assert main(["index", "versions", url, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [line["operation"] for line in facts] == ["build", "append", "delete", "delete", "compact", "rollback", "gc"]
    assert [line["kept"] for line in facts] == [False] * 5 + [True] * 2
    assert main(["verify", url]) == 0
    check_answers(url, ids, codes)


def test_attributes_of_the_corpus(tmp_path):
    """The classes of the rows that were encoded, from the parts of the corpus that they come from."""
    labels = [[[], [0], [1, 2]][number % 3] for number in range(50)]
    corpus = str(tmp_path / "corpus")
    write_corpus(corpus, 50, 8, labels_of=labels.__getitem__, split_of=lambda n: "query" if 8 <= n < 18 else "database")
    write_tiny_model(tmp_path / "model")
    encode(EncodeConfig(model=str(tmp_path / "model"), corpus=corpus, out=str(tmp_path / "codes"), pool=RAY["never"]))
    config = IndexConfig(codes=str(tmp_path / "codes"), out=str(tmp_path / "index"), attributes=corpus, shards=2,
                         pool=RAY["never"])  # fmt: skip
    build_index(config)
    index = open_index(config.out)
    query = index.pieces[0].shard.codes()[:1]
    for where, wanted in (
        (f"class == '{CLASSES[0]}'", [0]),
        (f"class in ['{CLASSES[2]}', 'none']", [1, 2]),
        (f"class == '{CLASSES[1]}' and class == '{CLASSES[0]}'", None),
        ("split == 'database' and class != 'x'", "all"),
    ):
        ids = sorted(name for name in index.search(query, 50, where)[0][0] if name)
        rows = [n for n in range(50) if not 8 <= n < 18 and (wanted == "all" or labels[n] == wanted)]
        assert ids == [f"{n:04d}" for n in rows]
    write_corpus(tmp_path / "other", 50, 8)
    with pytest.raises(InputError, match="is not the corpus that these codes are of"):
        build_index(config.model_copy(update={"attributes": str(tmp_path / "other"), "out": str(tmp_path / "again")}))
