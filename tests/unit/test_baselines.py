"""Baselines on small synthetic features: what each must and must not reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashray.codes import hamming, unpack
from hashray.errors import ConfigError, InputError, MismatchError
from hashray.evaluate.baselines import ITQ, LSH, ClassCode, ITQLinear, PCASign, RandomCodes, fit_baselines
from hashray.methods.codewords import spread_codewords
from hashray.metrics import mean_average_precision, rank

Array = NDArray[Any]


def clusters(seed: int, n: int, classes: int = 10, d: int = 32, noise: float = 0.6) -> tuple[Array, Array]:
    """Gaussian classes round fixed centres whose coordinates shrink, so that PCA's bits are unequal."""
    centres = np.random.default_rng(99).standard_normal((classes, d)) * np.linspace(2, 0.4, d)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, classes, n)
    features = centres[ids] + noise * rng.standard_normal((n, d)) + 3.0
    return features.astype(np.float32), np.eye(classes, dtype=np.uint8)[ids]


TRAIN, QUERY, DATABASE = clusters(0, 600), clusters(1, 100), clusters(2, 1500)


def score(fitted: Any) -> float:
    return mean_average_precision(fitted.codes(QUERY[0]), QUERY[1], fitted.codes(DATABASE[0]), DATABASE[1])


@pytest.mark.parametrize("num_bits", [8, 16, 32, 48])
@pytest.mark.parametrize("baseline", [RandomCodes, LSH, PCASign, ITQ])
def test_codes_are_packed_and_reproducible(baseline: Any, num_bits: int) -> None:
    one, other = (baseline.fit(TRAIN[0], num_bits, seed=3).codes(QUERY[0]) for _ in range(2))
    assert one.dtype == np.uint8 and one.shape == (100, num_bits // 8)
    assert (one == other).all()


def test_random_codes_score_the_prior_even_on_the_same_class_sorted_rows() -> None:
    order = np.argsort(DATABASE[1].argmax(1))
    features, labels = DATABASE[0][order], DATABASE[1][order]
    fitted = RandomCodes.fit(TRAIN[0], 32, seed=0)
    ranking = rank(fitted.codes(features[:-1]), labels[:-1], fitted.codes(features), labels)
    assert ranking.average_precisions().mean == pytest.approx(ranking.prior, abs=0.01)


def test_itq_beats_pca_sign_and_both_beat_random() -> None:
    for num_bits in (16, 32):
        itq, pca = score(ITQ.fit(TRAIN[0], num_bits, seed=0)), score(PCASign.fit(TRAIN[0], num_bits))
        assert itq >= pca > 0.2 > score(RandomCodes.fit(TRAIN[0], num_bits))


def test_itq_is_pca_and_a_rotation_nearer_to_its_signs_than_any_random_one() -> None:
    pca, itq = PCASign.fit(TRAIN[0], 16), ITQ.fit(TRAIN[0], 16, seed=0)
    rotation = pca.directions.T @ itq.directions
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(16), atol=1e-9)
    V = (TRAIN[0] - pca.mean) @ pca.directions

    def loss(R: Array) -> float:
        return float(((V @ R - np.where(V @ R >= 0, 1, -1)) ** 2).sum())

    rng = np.random.default_rng(0)
    random = [loss(np.linalg.qr(rng.standard_normal((16, 16)))[0]) for _ in range(20)]
    assert loss(rotation) < min(random)


def test_more_bits_than_dimensions() -> None:
    narrow = TRAIN[0][:, :6]
    wide, exact = PCASign.fit(narrow, 16).codes(narrow), PCASign.fit(narrow, 8).codes(narrow)
    assert (hamming(wide, wide) == hamming(exact, exact)).all()
    itq = ITQ.fit(narrow, 16, seed=0)
    assert np.linalg.matrix_rank(itq.directions) == 6
    assert (np.abs(unpack(itq.codes(narrow)).mean(0)) < 1).all()  # no constant bit


def test_directions_that_do_not_vary_give_no_random_bits() -> None:
    features = np.zeros((50, 16), np.float32)
    features[:, 0] = np.arange(50)
    features[:, 1:] = 0.1  # like the border pixels of the digits
    assert len(np.unique(PCASign.fit(features, 8).codes(features), axis=0)) == 2


def test_lsh_distance_follows_the_angle() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 10))
    fitted = LSH.fit(np.concatenate([x, -x]), 4096, seed=1)  # the mean is 0
    codes, unit = fitted.codes(x), x / np.linalg.norm(x, axis=1, keepdims=True)
    angle = np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    np.testing.assert_allclose(hamming(codes, codes) / 4096, angle, atol=0.04)


def test_class_code_gives_every_item_the_codeword_of_its_class() -> None:
    easy, labels = clusters(5, 300, noise=0.05)
    fitted = ClassCode.fit(easy, 32, seed=0, train_labels=labels)
    assert (unpack(fitted.codes(easy)) == fitted.codewords[labels.argmax(1)]).all()
    assert len(np.unique(fitted.codes(QUERY[0]), axis=0)) <= 10


def test_class_code_of_several_labels() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 4)) < 0.4).astype(np.uint8)
    features = labels @ rng.standard_normal((4, 8)) + 0.01 * rng.standard_normal((400, 8))
    fitted = ClassCode.fit(features, 64, seed=0, train_labels=labels)
    codes = fitted.codes(features)
    some = labels.any(1)
    expected = np.where(labels[some].astype(int) @ fitted.codewords.astype(int) >= 0, 1, -1)
    assert (unpack(codes)[some] == expected).mean() > 0.98
    score = mean_average_precision(codes[:50], labels[:50], codes[50:], labels[50:])
    assert score > rank(codes[:50], labels[:50], codes[50:], labels[50:]).prior + 0.2


@pytest.mark.parametrize("labels", [[[1, 0, 0]] * 6, [[1, 1, 0]] * 6, [[1, 0, 0]] * 3 + [[0, 0, 0]] * 3])
def test_class_code_of_classes_without_a_contrast(labels: Any) -> None:
    features = np.arange(6.0)[:, None]
    codes = ClassCode.fit(features, 16, train_labels=labels).codes(features)
    assert codes.shape == (6, 2) and len(np.unique(codes, axis=0)) == 1


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(1, 40), num_bits=st.sampled_from([8, 16, 24, 32, 48]), seed=st.integers(0, 5))
def test_codewords_are_distinct_and_hadamard_ones_far_apart(classes: int, num_bits: int, seed: int) -> None:
    words = spread_codewords(classes, num_bits, seed)
    assert words.shape == (classes, num_bits) and set(np.unique(words)) <= {-1, 1}
    distances = (num_bits - words.astype(int) @ words.T.astype(int)) // 2
    nearest = (distances + num_bits * np.eye(classes, dtype=int)).min()
    assert nearest >= (num_bits // 2 if num_bits in (8, 16, 32) and classes <= 2 * num_bits else 1)


def test_codewords_use_up_all_codes_and_refuse_one_more() -> None:
    assert len(np.unique(spread_codewords(256, 8), axis=0)) == 256
    with pytest.raises(ConfigError, match="8 bits cannot tell 257 classes apart"):
        spread_codewords(257, 8)


def test_fit_baselines_is_seeded_and_in_the_order_of_their_strength_on_clusters() -> None:
    fitted, again = (dict(fit_baselines(*TRAIN, num_bits=32, seed=0)) for _ in range(2))
    assert list(fitted) == ["random", "lsh", "pca-sign", "itq", "itq-linear", "class-code"]
    scores = {}
    for name, baseline in fitted.items():
        query, database = baseline.codes(QUERY[0]), baseline.codes(DATABASE[0])
        assert np.array_equal(query, again[name].codes(QUERY[0]))
        scores[name] = mean_average_precision(query, QUERY[1], database, DATABASE[1], top_k=100)
    assert scores["itq"] > scores["lsh"] > scores["random"] and scores["class-code"] > 0.9


def test_a_linear_head_from_itq_learns_what_the_labels_name() -> None:
    rng = np.random.default_rng(0)
    labels = np.eye(4, dtype=np.uint8)[rng.integers(0, 4, 800)]
    features = np.concatenate(
        [labels + 0.2 * rng.standard_normal((800, 4)), 2 * rng.standard_normal((800, 28))], axis=1
    )
    train, query = slice(0, 600), slice(600, 800)
    scores = {}
    for name, fitted in {
        "itq": ITQ.fit(features[train], 16),
        "linear": ITQLinear.fit(features[train], 16, train_labels=labels[train]),
    }.items():
        codes = fitted.codes(features)
        scores[name] = mean_average_precision(codes[query], labels[query], codes[train], labels[train])
    assert scores["linear"] > scores["itq"] + 0.1
    again = ITQLinear.fit(features[train], 16, train_labels=labels[train])
    assert np.array_equal(again.codes(features), codes)


def test_error_texts() -> None:
    for baseline in (RandomCodes, LSH, PCASign, ITQ):
        with pytest.raises(ConfigError, match="num_bits = 12 is not a positive multiple of 8"):
            baseline.fit(TRAIN[0], 12)
        with pytest.raises(ValueError, match="every number finite"):
            baseline.fit([[np.nan]], 8)
    with pytest.raises(MismatchError, match="features have 3 dimensions, fitted on 32"):
        LSH.fit(TRAIN[0], 8).codes(np.zeros((2, 3)))
    with pytest.raises(MismatchError, match="600 train features, but 5 rows of train labels"):
        ClassCode.fit(TRAIN[0], 8, train_labels=TRAIN[1][:5])
    with pytest.raises(InputError, match="no training row has a class"):
        ClassCode.fit(TRAIN[0], 8, train_labels=np.zeros((600, 2)))
    with pytest.raises(ValueError, match="multi-hot rows"):
        ClassCode.fit(TRAIN[0], 8, train_labels=np.zeros(600))
