"""`hashray index build --kind auto`: the recall it promises, over all shards; the same bytes again; resume; refusal."""

from __future__ import annotations

import numpy as np
import pytest
from test_duplicates import write_codes

from hashray import artifact
from hashray.artifact import version_key
from hashray.codes import hamming
from hashray.engine.session import WorkersConfig
from hashray.errors import InputError
from hashray.index import build as module
from hashray.index import choose as choosing
from hashray.index.build import IndexConfig, build_index
from hashray.search.reader import open_index
from hashray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")
HERE = WorkersConfig(ray="never")


def draw(rows=40_000, clusters=300):
    rng = np.random.default_rng(0)
    words = rng.random((clusters, 24)) < 0.5
    codes = np.packbits(words[rng.integers(clusters, size=rows)] ^ (rng.random((rows, 24)) < 0.02), axis=1)
    return [f"{name:06d}" for name in rng.permutation(rows)], codes


@pytest.fixture(scope="module")
def codes_url(tmp_path_factory):
    url = tmp_path_factory.mktemp("auto")
    write_codes(url, *draw())
    return str(url / "codes")


def test_the_index_has_the_recall_that_was_asked_for(tmp_path, codes_url, capsys):
    _, codes = draw()
    config = IndexConfig(codes=codes_url, out=str(tmp_path / "index"), kind="auto", shards=2, min_recall=0.95)
    manifest = build_index(config)
    info, (chosen, *others) = manifest.info, manifest.info["choice"]["candidates"]
    assert (info["kind"], info["nlist"], info["nprobe"]) == (chosen["kind"], chosen["nlist"], chosen["nprobe"])
    assert info["kind"] == "ivf" and chosen["recall"] >= 0.95 and all(other["lost"] for other in others)
    assert "ms" in chosen and all(candidate["ms"] is None for candidate in (chosen, *others))
    assert "flat: recall 1.0000, 40,000 codes a query, 160,000 bytes: compares" in capsys.readouterr().err
    queries = codes[::400]
    exact = np.sort(hamming(queries, codes), axis=1)[:, 99:100]
    answers = open_index(config.out).search(queries, 100)[1]
    assert ((answers <= exact) & (answers >= 0)).mean() >= 0.95
    assert artifact.verify(config.out) == [] and build_index(config) == manifest
    # No time is in it: another build, in this process, publishes the same bytes.
    again = build_index(config.model_copy(update={"out": str(tmp_path / "again"), "pool": HERE}))
    assert again == manifest


def test_a_choice_of_an_earlier_run_stands(tmp_path, codes_url, monkeypatch):
    config = IndexConfig(codes=codes_url, out=str(tmp_path / "index"), kind="auto", max_ms=1e6, pool=HERE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "index_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(config)
    monkeypatch.setattr(choosing, "measure", None)  # a second measurement would have other times
    manifest = build_index(config)
    assert manifest.info["kind"] == "flat" and manifest.info["choice"]["candidates"][0]["ms"] > 0
    assert manifest.info["nprobe"] is None and build_index(config) == manifest


def test_what_does_not_fit_is_refused_before_anything_is_built(tmp_path, codes_url):
    config = IndexConfig(codes=codes_url, out=str(tmp_path / "index"), kind="auto", max_ram="100 KB", pool=HERE)
    with pytest.raises(
        InputError, match=r"40,000 codes need 160,000 bytes .* --max-ram allows 100,000\. Use fewer bits"
    ):
        build_index(config)
    assert not open_store(config.out).exists(version_key(1)) and not (tmp_path / "index/shards").exists()
    fits = config.model_copy(update={"max_ram": "200 KB", "out": str(tmp_path / "fits")})
    assert build_index(fits).info["kind"] == "flat"  # ivf needs 8 bytes more a code
