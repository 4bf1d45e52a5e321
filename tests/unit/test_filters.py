"""`where`: each form against plain Python, what is refused, and searches that keep few, most and all rows."""

from __future__ import annotations

import datetime as dt
import decimal
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashray import create_index
from hashray.artifact.bitmap import Bitmap
from hashray.codes import hamming
from hashray.errors import InputError
from hashray.index.filters import Filter
from hashray.index.shard import Shard, build_shard, open_shard, train_quantizer
from hashray.search.reader import open_index

DAY = dt.date(2026, 1, 1)
ROWS = [
    {"class": ["cat"], "year": 2024, "date": DAY, "path": "a/1.jpg", "score": 0.5, "good": True},
    {
        "class": ["dog", "cat"],
        "year": 2025,
        "date": DAY + dt.timedelta(1),
        "path": "b/2.jpg",
        "score": None,
        "good": False,
    },
    {"class": [], "year": None, "date": None, "path": "a/3.png", "score": -1.0, "good": None},
    {"class": None, "year": 2023, "date": DAY - dt.timedelta(9), "path": None, "score": 2.0, "good": True},
]
SCHEMA = pa.schema([
    ("class", pa.list_(pa.string())), ("year", pa.int32()), ("date", pa.date32()),
    ("path", pa.string()), ("score", pa.float32()), ("good", pa.bool_()),
])  # fmt: skip
TABLE = pa.Table.from_pylist(ROWS, SCHEMA)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("year == 2024", [0]),
        ("year >= 2024 and not good", [1]),
        ("2023 <= year < 2025", [0, 3]),
        ("year != 2024", [1, 3]),
        ("class == 'cat'", [0, 1]),
        ("class != 'cat'", [2]),
        ("class in ['dog', 'cow']", [1]),
        ("class not in ['dog', 'cow']", [0, 2]),
        ("date >= '2026-01-01'", [0, 1]),
        ("'2026-01-01' < date", [1]),
        ("starts_with(path, 'a/') | ends_with(path, '2.jpg')", [0, 1, 2]),
        ("contains(path, '.jpg') & (score > 0.1)", [0]),
        ("is_null(year) or is_valid(score) and score > 1", [2, 3]),
        ("year in (2023, 2025)", [1, 3]),
        ("year not in (2023, 2025)", [0]),
        ("not year in (2023, 2025)", [0, 2]),
        ("field('year') == 2023", [3]),
        ("pc.field('year') > field('score')", [0, 3]),
        ("good", [0, 3]),
        ("not (good == True)", [1]),
        ("score < -0.5", [2]),
        ("year > 2023.5", [0, 1]),
        ("True", [0, 1, 2, 3]),
    ],
)
def test_each_form(where, rows):
    assert Filter(where).rows(TABLE).positions().tolist() == rows


def test_an_expression_of_arrow():
    assert Filter(pc.field("year") < 2025).rows(TABLE).positions().tolist() == [0, 3]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("yaer == 3", "there is no attribute 'yaer', perhaps you meant 'year'"),
        ("year ==", "is no expression"),
        ("year = 3", "is no expression"),
        ("", "is no expression"),
        ("__import__('os').system('true')", "is not allowed; allowed is a comparison"),
        ("year.real == 3", "is not allowed"),
        ("year == [x for x in (1,)]", "is no expression"),
        ("year + 1 == 3", "is not allowed"),
        ("lambda: 3", "is no expression|is not allowed"),
        ("year == 'soon'", "cannot be answered: .*'soon'"),
        ("date >= 'soon'", "cannot be answered"),
        ("class > 'cat'", "is not allowed"),
        ("starts_with(year, '2')", "cannot be answered"),
        ("year is None", "is not allowed"),
        ("not " * 3000 + "good", "cannot be answered|is no expression|characters"),
        ("(" * 300 + "good" + ")" * 300, "is no expression"),
        ("good and " * 2000 + "good", "characters; at most"),
        ("3", "is not allowed"),
    ],
)
def test_what_is_refused(where, text):
    with pytest.raises(InputError, match=text):
        Filter(where).rows(TABLE)


NAMES, PRICES = ["ann", "bob", "", "Ann"], [decimal.Decimal(text) for text in ("1.50", "-2.25", "0.10", "99.99")]
TIMES = [dt.time(10), dt.time(11, 30), dt.time(0), dt.time(23, 59, 59)]
COLUMNS: dict[str, tuple[pa.DataType, list[Any], list[Any]]] = {
    # what a column holds, and constants that are looked for, with their text
    "word": (pa.dictionary(pa.int8(), pa.string()), NAMES, [*NAMES, "zed"]),
    "view": (pa.string_view(), NAMES, [*NAMES, "zed"]),
    "count": (pa.dictionary(pa.int16(), pa.int64()), [1, 2, 3], [1, 2, 0]),
    "price": (pa.decimal128(4, 2), PRICES, [*PRICES, 1, 0, -3, 1.5, 0.1, 100000, "1.5", "0.105", "-2.251"]),
    "wide": (pa.decimal256(45, 20), PRICES, [*PRICES, 2, "0.10"]),
    "second": (pa.time32("s"), TIMES, ["10:00", "11:30:00", "23:59:59.5", "09:00"]),
    "micro": (pa.time64("us"), TIMES, ["10:00", "11:30:00", "23:59:59.5", "09:00"]),
    "nano": (pa.time64("ns"), TIMES, ["10:00", "11:30:00", "23:59:59.5", "09:00"]),
    "half": (pa.float16(), [0.5, 1.0, -2.0], [0.5, 1, 2.5]),
}
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def as_python(name: str, constant: Any) -> Any:
    if COLUMNS[name][1] is PRICES:
        return decimal.Decimal(str(constant))
    return dt.time.fromisoformat(constant) if COLUMNS[name][1] is TIMES else constant


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_dictionaries_decimals_and_times_answer_as_python_does(name: str, data: st.DataObject) -> None:
    kind, held, asked = COLUMNS[name]
    values = data.draw(st.lists(st.none() | st.sampled_from(held), max_size=12))
    chosen = data.draw(st.lists(st.sampled_from(asked), min_size=1, max_size=3))
    constants = [as_python(name, constant) for constant in chosen]
    written = [str(item) if isinstance(item, decimal.Decimal) else item for item in chosen]
    table = pa.table({name: pa.chunked_array([pa.array(some, kind) for some in (values[:5], values[5:])])})
    cases: list[tuple[str, Callable[[Any], bool]]] = [
        *((f"{name} {sign} {written[0]!r}", lambda v, f=f: f(v, constants[0])) for sign, f in OPERATORS.items()),
        (f"{written[0]!r} <= {name}", lambda v: constants[0] <= v),
        (f"{name} in {written!r}", lambda v: v in constants),
        (f"{name} not in {written!r}", lambda v: v not in constants),
        (f"not {name} == {written[0]!r}", lambda v: v != constants[0]),
        (f"is_valid({name})", lambda v: True),
    ]
    if held is NAMES:
        cases += [
            (f"starts_with({name}, {written[0]!r})", lambda v: v.startswith(constants[0])),
            (f"ends_with({name}, {written[0]!r})", lambda v: v.endswith(constants[0])),
            (f"contains({name}, 'nn')", lambda v: "nn" in v),
        ]
    for where, is_so in cases:
        expected = [row for row, value in enumerate(values) if value is not None and is_so(value)]
        assert Filter(where).rows(table).positions().tolist() == expected, where


def test_lists_of_dictionaries_and_columns_without_values() -> None:
    tags = pa.array([["a"], ["b", "a"], None, []], pa.list_(pa.dictionary(pa.int8(), pa.string())))
    table = pa.table(
        {"tags": tags, "nothing": pa.nulls(4), "other": pa.array(["a", "b", None, "a"]).dictionary_encode()}
    )
    answers = {
        "tags == 'a'": [0, 1], "tags in ['b', 'c']": [1], "tags != 'a'": [3], "nothing == 1": [], "nothing != 1": [],
        "nothing in ['a']": [], "nothing not in ['a']": [], "not nothing > 3": [], "is_null(nothing)": [0, 1, 2, 3],
        "other == 'a' and tags == 'a'": [0], "other == other": [0, 1, 3],
    }  # fmt: skip
    assert {where: Filter(where).rows(table).positions().tolist() for where in answers} == answers


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("price == 'dear'", "'dear' is no decimal number"),
        ("price in [True]", "True is no decimal number"),
        ("price < 1e999", "cannot be answered"),
        ("micro > 'noon'", "'noon' is no time of a day, such as '16:30:00'"),
        ("micro > '10:00+02:00'", "is no time of a day"),
        ("count == 'a'", "cannot be answered"),
        ("starts_with(count, 'a')", "cannot be answered"),
    ],
)
def test_values_of_other_types_are_refused(where: str, text: str) -> None:
    table = pa.table({name: pa.array(held[:1], kind) for name, (kind, held, _) in COLUMNS.items()})
    with pytest.raises(InputError, match=text):
        Filter(where).rows(table)


def test_an_index_without_attributes(tmp_path):
    catalog = create_index(tmp_path, 32)
    catalog.append(["a"], np.zeros((1, 4), np.uint8))
    with pytest.raises(InputError, match="rows of this index have no attributes"):
        open_index(tmp_path).search(np.zeros((1, 4), np.uint8), 1, where="year == 3")


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.9, 0.999, 1.0])
def test_searches_among_allowed_rows(tmp_path, kind, share):
    """Exact, ties at the end too, whether few or most rows are allowed, and where the nearest are not."""
    rng = np.random.default_rng(int(share * 1000))
    words = rng.integers(0, 256, (40, 4), dtype=np.uint8)
    codes = words[rng.integers(40, size=3000)]
    codes[:, -1] ^= rng.choice([0, 0, 1, 2, 7], 3000).astype(np.uint8)
    mask = rng.random(3000) < share
    mask[hamming(codes[:1], codes)[0] < 6] = False  # nothing near the first query
    trained = train_quantizer(codes, 5) if kind == "ivf" else None
    (tmp_path / "shard").write_bytes(build_shard(codes, kind, trained))
    shard, allowed = open_shard(tmp_path / "shard", kind, 32, 3000, 5), Bitmap.of_mask(mask)
    queries = np.concatenate([codes[:4], rng.integers(0, 256, (4, 4), dtype=np.uint8)])
    assert_exact(shard, codes, mask, queries, allowed)
    assert (shard.codes() == codes).all()


def assert_exact(shard: Shard, codes, mask, queries, allowed):
    for k in (1, 10, 200):
        distances, positions = shard.search(queries, k, allowed)
        for row, query in enumerate(queries):
            away = hamming(query[None], codes)[0]
            nearest = sorted((int(away[place]), int(place)) for place in np.flatnonzero(mask))[:k]
            pairs = [(int(d), int(p)) for d, p in zip(distances[row], positions[row], strict=True) if p >= 0]
            assert pairs == nearest
            assert (distances[row, len(nearest) :] == 2**31 - 1).all()
    for distance in (0, 3, 12, 32):
        for query, (near, places) in zip(queries, shard.within(queries, distance, allowed), strict=True):
            away = hamming(query[None], codes)[0]
            expected = sorted((int(away[place]), int(place)) for place in np.flatnonzero(mask & (away <= distance)))
            assert [*zip(near.tolist(), places.tolist(), strict=True)] == expected


def test_rows_without_an_attribute_have_null(tmp_path):
    catalog = create_index(tmp_path, 32)
    for number, attributes in enumerate(
        [{"year": [1, 2]}, None, {"tag": ["x", "y"]}, {"year": [2.5, 3], "tag": ["x", None]}]
    ):
        catalog.append([f"{number}a", f"{number}b"], np.full((2, 4), number, np.uint8), attributes)
    index = open_index(tmp_path)

    def ids(where):
        return [name for name in index.search(np.zeros((1, 4), np.uint8), 9, where)[0][0] if name]

    assert ids("year >= 2") == ["0b", "3a", "3b"] and ids("tag == 'x'") == ["2a", "3a"]
    assert ids("is_null(year) and is_null(tag)") == ["1a", "1b"] and ids("year == 1 or tag == 'y'") == ["0a", "2b"]
    with pytest.raises(InputError, match="types that do not join"):
        catalog.append(["x"], np.zeros((1, 4), np.uint8), {"year": ["soon"]})
    assert catalog.compact() == 6
    index = open_index(tmp_path)
    assert ids("year >= 2") == ["0b", "3a", "3b"] and ids("is_null(year) and is_null(tag)") == ["1a", "1b"]


def test_long_lists_that_look_the_same_are_different_filters(tmp_path):
    catalog = create_index(str(tmp_path / "index"), 8)
    catalog.append([f"{n:03d}" for n in range(300)], np.zeros((300, 1), np.uint8), {"year": [*range(300)]})
    index, query = open_index(str(tmp_path / "index")), np.zeros((1, 1), np.uint8)
    first = [*range(100)]
    second = [*first[:50], 200, *first[51:]]
    assert str(pc.field("year").isin(first)) == str(pc.field("year").isin(second))  # Arrow leaves out the middle
    for years in (first, second):
        ids = index.search(query, 100, pc.field("year").isin(years))[0][0].tolist()
        assert ids == [f"{year:03d}" for year in sorted(years)]


@pytest.mark.parametrize("where", ["year == 99999999999999999999999", r"path == '\ud800'", r"contains(path, '\ud800')"])
def test_values_that_arrow_does_not_hold_are_refused(where):
    with pytest.raises(InputError, match="cannot be answered"):
        Filter(where).rows(TABLE)


def test_integers_of_numpy_are_numbers(tmp_path):
    catalog = create_index(str(tmp_path / "index"), 8)
    catalog.append(["a", "b"], np.array([[0], [1]], np.uint8))
    index, query = open_index(str(tmp_path / "index")), np.zeros((1, 1), np.uint8)
    assert index.search(query, np.int64(2))[0].tolist() == [["a", "b"]]
    assert [ids.tolist() for ids in index.within(query, np.int64(0))[0]] == [["a"]]
    with pytest.raises(InputError, match=r"k = 1\.5: expected a whole number"):
        index.search(query, 1.5)
    with pytest.raises(InputError, match="distance = None: expected a whole number"):
        index.within(query, None)
