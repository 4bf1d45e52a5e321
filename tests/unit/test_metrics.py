"""mAP and its relatives against brute force over tie orders and against naive loops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from hashray.codes import binarize, hamming, unpack
from hashray.errors import ConfigError, InputError, MismatchError
from hashray.metrics import (
    TIES,
    average_precisions,
    code_health,
    mean_average_precision,
    mean_average_precision_float,
    rank,
    ranking,
)

Array = NDArray[Any]
Case = tuple[Array, Array, Array, Array]


def random_case(seed: int, q: int = 5, n: int = 40, c: int = 4, b: int = 1, multi: bool = False) -> Case:
    """Few distinct codes, so that ties abound; multi-label rows may be empty."""
    rng = np.random.default_rng(seed)

    def side(rows: int) -> tuple[Array, Array]:
        codes = rng.choice(np.array([0, 1, 3, 7, 129], np.uint8), size=(rows, b))
        return codes, (rng.random((rows, c)) < 0.3) if multi else np.eye(c, dtype=np.int64)[rng.integers(0, c, rows)]

    (query, query_labels), (database, database_labels) = side(q), side(n)
    return query, query_labels, database, database_labels


def naive_relevance(query_labels: Array, database_labels: Array) -> Array:
    pairs = [[any((q > 0) & (d > 0)) for d in database_labels] for q in query_labels]
    return np.array(pairs, dtype=bool)


def naive_list(case: Case) -> list[list[bool]]:
    """Relevance of the database in ranked order, ties by position, one list per query."""
    query, query_labels, database, database_labels = case
    relevant, lists = naive_relevance(query_labels, database_labels), []
    for i, code in enumerate(query):
        distances = [sum(int(x).bit_count() for x in code ^ other) for other in database]
        order = sorted(range(len(database)), key=lambda j: (distances[j], j))
        lists.append([bool(relevant[i, j]) for j in order])
    return lists


def precisions(ranked: list[bool], cut: int) -> tuple[float, int]:
    """Sum of the precisions at the relevant places up to the cut, and how many those are."""
    total, hits = 0.0, 0
    for place, hit in enumerate(ranked[:cut], start=1):
        if hit:
            hits += 1
            total += hits / place
    return total, hits


def all_orders(case: Case, cut: int) -> list[list[tuple[float, int]]]:
    """`precisions` of every query for every order of the database: every tie order, equally often."""
    query, query_labels, database, database_labels = case
    results: list[list[tuple[float, int]]] = [[] for _ in query]
    for order in itertools.permutations(range(len(database))):
        moved = (query, query_labels, database[list(order)], database_labels[list(order)])
        for values, ranked in zip(results, naive_list(moved), strict=True):
            values.append(precisions(ranked, cut))
    return results


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 5, 6, 60])
def test_expected_ap_is_the_average_over_all_tie_orders(seed: int, top_k: int | None) -> None:
    case = random_case(seed, q=2, n=6, c=2, multi=seed % 2 == 1)
    cut, whole = average_precisions(*case, top_k=top_k), rank(*case).average_precisions(top_k, whole=True)
    relevant = naive_relevance(case[1], case[3]).sum(1)
    for i, orders in enumerate(all_orders(case, top_k or 6)):
        if not relevant[i]:
            assert np.isnan(cut.values[i]) and np.isnan(whole.values[i])
            continue
        sums, hits = (np.array([order[j] for order in orders]) for j in (0, 1))
        expected = sums.mean() / hits.mean() if hits.any() else 0.0
        assert cut.values[i] == pytest.approx(expected, abs=1e-9)
        assert whole.values[i] == pytest.approx((sums / relevant[i]).mean(), abs=1e-9)
        if top_k in (None, 6, 60):
            assert cut.values[i] == pytest.approx((sums / hits).mean(), abs=1e-9)
    assert cut.num_without_relevant == (relevant == 0).sum()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.sampled_from([None, 1, 7, 39]), multi=st.booleans())
def test_a_shuffled_database_and_shuffled_queries_change_nothing(seed: int, top_k: int | None, multi: bool) -> None:
    query, query_labels, database, database_labels = random_case(seed, b=3, multi=multi)
    rng = np.random.default_rng(seed)
    there, here = rng.permutation(len(database)), rng.permutation(len(query))
    before = rank(query, query_labels, database, database_labels)
    after = rank(query[here], query_labels[here], database[there], database_labels[there])
    one, other = before.average_precisions(top_k).values[here], after.average_precisions(top_k).values
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    np.testing.assert_allclose(list(before.precision_at().values()), list(after.precision_at().values()), atol=1e-12)


def test_shuffles_leave_map_alone_to_1e_12_on_many_rows() -> None:
    case = random_case(3, q=50, n=5000, c=6, b=4)
    order = np.random.default_rng(0).permutation(5000)
    shuffled = (*case[:2], case[2][order], case[3][order])
    assert mean_average_precision(*case) == pytest.approx(mean_average_precision(*shuffled), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), b=st.sampled_from([1, 2, 3, 4, 8, 12, 33]), multi=st.booleans())
def test_histograms_equal_a_naive_count(seed: int, b: int, multi: bool) -> None:
    case = random_case(seed, b=b, multi=multi)
    histograms = rank(*case)
    relevant = naive_relevance(case[1], case[3])
    for i, row in enumerate(hamming(case[0], case[2])):
        assert histograms.total[i].tolist() == np.bincount(row, minlength=8 * b + 1).tolist()
        assert histograms.relevant[i].tolist() == np.bincount(row[relevant[i]], minlength=8 * b + 1).tolist()


def test_blocks_of_any_size_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(1, q=40, n=300, c=9, b=2, multi=True)
    whole, ordered = rank(*case), mean_average_precision(*case, ties="dseh")
    monkeypatch.setattr(ranking, "_COLUMNS", 7)
    monkeypatch.setattr(ranking, "PAIRS", 20)
    pieces = rank(*case)
    assert (whole.total == pieces.total).all() and (whole.relevant == pieces.relevant).all()
    assert mean_average_precision(*case, ties="dseh") == ordered


def test_no_ties_is_the_ordinary_average_precision() -> None:
    database = binarize(np.where(np.tri(24, k=-1) > 0, 1.0, -1.0))  # row i lies i bits from row 0
    labels = np.eye(2, dtype=np.uint8)[np.random.default_rng(0).integers(0, 2, 24)]
    expected = average_precision_score(labels[:, 1], -np.arange(24))
    query = database[:1], np.eye(2)[[1]]
    for ties in TIES:
        assert mean_average_precision(*query, database, labels, ties=ties) == pytest.approx(expected, abs=1e-12)


def naive_convention(case: Case, ties: str, top_k: int | None) -> float:
    """The table of METHODS 0, one query at a time."""
    relevant, values = naive_relevance(case[1], case[3]), []
    cut = len(case[2]) if top_k is None else top_k
    for i, ranked in enumerate(naive_list(case)):
        returned = ranked[:-1] if ties == "deephash_pytorch" and cut == -1 else ranked[:cut]
        total, hits = precisions(returned, len(returned))
        if ties == "hashnet" and hits == 0:
            continue
        denominator = int(relevant[i].sum()) if ties == "dseh" else hits
        values.append(total / denominator if denominator else 0.0)
    return sum(values) / len(values)


@pytest.mark.parametrize("ties", [name for name in TIES if name != "expected"])
@pytest.mark.parametrize("top_k", [None, 1, 4, 17, 40, 99])
@pytest.mark.parametrize("multi", [False, True])
def test_every_named_convention_equals_its_naive_loop(ties: str, top_k: int | None, multi: bool) -> None:
    for seed in range(3):
        case = random_case(seed, q=12, multi=multi)
        score = mean_average_precision(*case, top_k=top_k, ties=ties)
        assert score == pytest.approx(naive_convention(case, ties, top_k), abs=1e-12)


def test_deephash_pytorch_drops_the_last_item_at_minus_one_and_only_there() -> None:
    case = random_case(0, q=12)
    dropped = mean_average_precision(*case, top_k=-1, ties="deephash_pytorch")
    assert dropped == pytest.approx(naive_convention(case, "deephash_pytorch", -1), abs=1e-12)
    assert dropped != mean_average_precision(*case, ties="deephash_pytorch")
    for ties in set(TIES) - {"deephash_pytorch"}:
        with pytest.raises(ConfigError, match="top_k = -1 is not a whole number >= 1"):
            mean_average_precision(*case, top_k=-1, ties=ties)


def test_wide_codes_keep_distances_above_255_apart() -> None:
    query = np.zeros((1, 33), np.uint8)  # 264 bits: distance 256 would wrap to 0 in a byte
    database = np.stack([np.full(33, 255, np.uint8), np.r_[np.full(32, 255, np.uint8), np.uint8(0)], query[0]])
    labels = np.eye(2)[[1, 1, 0]]
    for ties in TIES:
        assert mean_average_precision(query, np.eye(2)[[0]], database, labels, ties=ties) == 1.0


def test_queries_without_anything_relevant() -> None:
    labels = np.eye(3, dtype=np.uint8)
    case = np.uint8([[0], [0]]), labels[[0, 2]], np.uint8([[0], [1]]), labels[[0, 1]]
    scores = average_precisions(*case)
    assert scores.mean == 1.0 and scores.num_without_relevant == 1 and np.isnan(scores.values).tolist() == [False, True]
    by_name = {ties: mean_average_precision(*case, ties=ties) for ties in TIES}
    assert by_name == {
        "expected": 1.0, "hashnet": 1.0, "deephash_pytorch": 0.5, "orthohash": 0.5, "dseh": 0.5, "adalabel": 0.5,
    }  # fmt: skip
    assert average_precisions(*case, ties="orthohash").num_without_relevant == 1


def test_something_relevant_beyond_the_cut_only_scores_zero() -> None:
    labels = np.eye(2, dtype=np.uint8)
    case = np.uint8([[0]]), labels[[0]], np.uint8([[0], [1]]), labels[[1, 0]]
    assert average_precisions(*case, top_k=1).values.tolist() == [0.0]
    assert np.isnan(average_precisions(*case, top_k=1, ties="hashnet").values).all()


def test_unknown_labels_are_not_positive() -> None:
    codes = np.uint8([[0], [1], [3]])
    labels = np.array([[1, -1], [-1, 1], [1, 0]])
    assert rank(codes[:1], labels[:1], codes, labels).relevant[0, :3].tolist() == [1, 0, 1]


def test_perfect_codes_score_one_and_random_codes_the_prior() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 10, 4000)
    labels, words = np.eye(10, dtype=np.uint8)[classes], rng.integers(0, 256, (10, 4), dtype=np.uint8)
    for ties in TIES:
        assert mean_average_precision(words, np.eye(10), words[classes], labels, ties=ties) == 1.0
    noise = rng.integers(0, 256, (4200, 4), dtype=np.uint8)
    ranking = rank(noise[:200], labels[:200], noise[200:], labels)
    assert ranking.prior == pytest.approx(0.1, abs=0.005)
    assert ranking.average_precisions().mean == pytest.approx(ranking.prior, abs=0.01)


def test_large_databases_lose_no_digit_to_harmonic_numbers() -> None:
    before, count = np.array([[0, 3, 250, 10**6, 10**9]]), np.array([[5, 300, 10, 3, 2]])
    spans = ranking._harmonic_span(before, count)[0]
    for i, (low, number) in enumerate(zip(before[0], count[0], strict=True)):
        exact = sum(1.0 / k for k in range(int(low) + 1, int(low + number) + 1))
        assert spans[i] == pytest.approx(exact, rel=1e-14)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), multi=st.booleans())
def test_values_are_shares_and_the_orders_average_to_the_expectation(seed: int, multi: bool) -> None:
    case = random_case(seed, multi=multi)
    values = average_precisions(*case).values
    assert ((values >= 0) & (values <= 1 + 1e-12) | np.isnan(values)).all()
    curve = rank(*case).precision_recall_curve()
    assert (np.diff(curve.recall) >= -1e-12).all() and curve.answered[-1] == 1.0


@pytest.mark.parametrize("multi", [False, True])
def test_precision_recall_and_radius_equal_naive_loops(multi: bool) -> None:
    case = random_case(5, q=9, n=30, multi=multi)
    relevant, apart, ranking = naive_relevance(case[1], case[3]), hamming(case[0], case[2]), rank(*case)
    curve = ranking.precision_recall_curve()
    for radius in range(9):
        precision, recall, some = [], [], []
        for i in range(9):
            inside = apart[i] <= radius
            hits = (inside & relevant[i]).sum()
            precision.append(hits / inside.sum() if inside.any() else 0.0)
            some.append(bool(inside.any()))
            if relevant[i].any():
                recall.append(hits / relevant[i].sum())
        assert curve.precision[radius] == pytest.approx(np.mean(precision), abs=1e-12)
        assert curve.recall[radius] == pytest.approx(np.mean(recall), abs=1e-12)
        assert curve.answered[radius] == pytest.approx(np.mean(some), abs=1e-12)
        assert ranking.precision_within_radius(radius) == curve.precision[radius]
    assert ranking.precision_within_radius(500) == curve.precision[8]


def test_precision_at_n_is_the_average_over_all_tie_orders() -> None:
    case = random_case(2, q=2, n=6, c=2)
    precisions = rank(*case).precision_at((1, 2, 4, 6, 100))
    for n, value in precisions.items():
        cut = min(n, 6)
        orders = [hits / cut for query in all_orders(case, cut) for _, hits in query]
        assert value == pytest.approx(np.mean(orders), abs=1e-9)


def test_float_map_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    query, database = rng.standard_normal((7, 5)), rng.standard_normal((60, 5))
    query_labels, database_labels = rng.random((7, 3)) < 0.4, rng.random((60, 3)) < 0.4
    query_labels[0] = False
    relevant = naive_relevance(query_labels, database_labels)
    for top_k in (None, 1, 10, 500):
        values = []
        for i in np.flatnonzero(relevant.any(1)):
            cosine = database @ query[i] / np.linalg.norm(database, axis=1)
            total, hits = precisions(list(relevant[i][np.argsort(-cosine)]), top_k or 60)
            values.append(total / hits if hits else 0.0)
        score = mean_average_precision_float(query, query_labels, database, database_labels, top_k)
        assert score == pytest.approx(np.mean(values), abs=1e-12)


def test_float_map_refuses_what_it_cannot_rank() -> None:
    labels = np.eye(2)
    with pytest.raises(ValueError, match="every number finite"):
        mean_average_precision_float([[np.nan], [1]], labels, [[1], [2]], labels)
    with pytest.raises(MismatchError, match="query features have 1 dimensions, database features 2"):
        mean_average_precision_float([[1], [1]], labels, np.ones((2, 2)), labels)
    with pytest.raises(InputError, match="no database feature"):
        mean_average_precision_float([[1], [1]], labels, np.ones((0, 1)), labels[:0])
    with pytest.raises(ConfigError, match="top_k = 0"):
        mean_average_precision_float([[1], [1]], labels, [[1], [2]], labels, top_k=0)


CODES, LABELS = np.uint8([[0], [1]]), np.eye(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((CODES, LABELS, CODES, LABELS), {"ties": "hashnett"}, ConfigError, "perhaps you meant 'hashnet'"),
        ((CODES, LABELS, CODES, LABELS), {"ties": "x"}, ConfigError, "allowed: expected, hashnet"),
        ((CODES, LABELS, CODES, LABELS), {"top_k": 0}, ConfigError, "top_k = 0 is not a whole number >= 1"),
        ((CODES, LABELS, CODES, LABELS), {"top_k": 2.5}, ConfigError, "top_k = 2.5"),
        ((CODES, LABELS, CODES, LABELS), {"top_k": True}, ConfigError, "top_k = True"),
        ((CODES, LABELS, np.zeros((2, 2), np.uint8), LABELS), {}, MismatchError, "have 8 bits, database codes 16"),
        ((CODES, LABELS, CODES, np.eye(3)[:2]), {}, MismatchError, "query labels have 2 classes, database labels 3"),
        ((CODES, LABELS[:1], CODES, LABELS), {}, MismatchError, "2 query rows, but 1 rows of query labels"),
        ((CODES, LABELS, CODES, np.eye(2)[[0, 1, 1]]), {}, MismatchError, "2 database rows, but 3"),
        ((CODES, LABELS, CODES[:0], LABELS[:0]), {}, InputError, "no database code"),
        ((CODES[:0], LABELS[:0], CODES, LABELS), {}, InputError, "no query code"),
        ((CODES, [0, 1], CODES, LABELS), {}, ValueError, r"multi-hot rows \[n, c\]"),
        ((CODES.astype(float), LABELS, CODES, LABELS), {}, ValueError, "expected packed uint8"),
        ((CODES[:1], LABELS[:1], CODES[1:], LABELS[1:]), {}, InputError, "none of the 1 queries has a relevant item"),
    ],
)
def test_error_texts(arguments: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mean_average_precision(*arguments, **options)


def test_error_texts_of_a_ranking() -> None:
    ranking = rank(CODES, LABELS, CODES, LABELS)
    with pytest.raises(ConfigError, match="radius = -1 is below 0"):
        ranking.precision_within_radius(-1)
    with pytest.raises(ConfigError, match="top_k = 0"):
        ranking.precision_at((0,))


def test_code_health_equals_naive_numbers() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 8))
    logits[:, 3] = 1.0  # a dead bit
    logits[0, 0] = 0.0
    codes, labels = binarize(logits), rng.random((50, 3)) < 0.4
    bits, health = unpack(codes).astype(float), code_health(codes, logits, labels)
    p = (bits == 1).mean(0)
    entropy = [0.0 if x in (0.0, 1.0) else -x * np.log2(x) - (1 - x) * np.log2(1 - x) for x in p]
    corr = [
        abs(np.corrcoef(bits[:, i], bits[:, j])[0, 1]) for i in range(8) for j in range(i) if 3 not in (i, j)
    ]  # fmt: skip
    collides = [
        any((codes[i] == codes[j]).all() and labels[j].any() and not (labels[i] & labels[j]).any() for j in range(50))
        for i in range(50)
        if labels[i].any()
    ]
    expected = {
        "bit_bias": np.abs(bits.mean(0)).mean(),
        "bit_entropy_mean": np.mean(entropy),
        "bit_entropy_min": 0.0,
        "bit_corr_mean": np.mean(corr),
        "bit_corr_max": np.max(corr),
        "distinct_codes": len({code.tobytes() for code in codes}),
        "near_zero": (np.abs(logits) < 0.1).mean(),
        "quantization": np.abs(np.abs(logits) - 1).mean(),
        "exact_zeros": 1,
        "collision_rate": np.mean(collides),
        "within_class_variance": np.mean([bits[labels[:, c]].var(0) for c in range(3)]),
    }
    assert any(collides) and not all(collides)
    assert health == pytest.approx(expected, abs=1e-6) and list(health) == list(expected)


def test_code_health_of_one_code_for_all() -> None:
    health = code_health(np.zeros((2000, 2), np.uint8), labels=np.eye(4)[np.arange(2000) % 4])
    assert health["distinct_codes"] == 1 and health["collision_rate"] == 1.0 and health["bit_bias"] == 1.0
    assert health["bit_corr_max"] == 0.0 and health["within_class_variance"] == 0.0
    assert code_health(np.zeros((2, 1), np.uint8), labels=np.zeros((2, 3)))["collision_rate"] == 0.0
    with pytest.raises(MismatchError, match="the codes unpack to"):
        code_health(np.zeros((2, 1), np.uint8), logits=np.zeros((2, 16)))
    with pytest.raises(InputError, match="no code"):
        code_health(np.zeros((0, 1), np.uint8))
