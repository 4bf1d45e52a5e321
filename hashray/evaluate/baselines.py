"""Baselines that stand beside every result: codes from the same features without a learned hash (METHODS 6.8).

Random codes must score the class prior; a method that does not beat ITQ, or only equals the class code (the
predicted class as the code), has learned nothing that a classifier or PCA does not give. Each baseline is fitted by
`X.fit(train_features, num_bits, seed)` and encodes by `.codes(features)`; equal seeds give equal codes.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from hashray.codes import Codes, binarize, check_num_bits
from hashray.errors import InputError, MismatchError
from hashray.methods.base import LabelTable
from hashray.methods.codewords import Codewords, spread_codewords
from hashray.methods.linear import FLAT, rotate_to_signs
from hashray.methods.losses import label_margin

Features = NDArray[np.float32]

_LINEAR_STEPS = 1500
_BLOCK_ROWS = 8192  # of features in float64 at once


class Baseline(Protocol):
    """A fitted baseline, which turns features into codes."""

    def codes(self, features: Any) -> Codes:
        """Encode features float [n, d] into packed uint8 [n, num_bits // 8]."""


@final
@dataclass(frozen=True)
class RandomCodes:
    """Fair coin flips. Independent between any two different feature arrays, reproducible for the same one."""

    num_bits: int
    seed: int

    @classmethod
    def fit(cls, train_features: Any, num_bits: int, seed: int = 0) -> RandomCodes:
        """Keep `num_bits` and `seed`; the features are only checked.

        >>> RandomCodes.fit(np.zeros((3, 2)), num_bits=16).codes(np.zeros((3, 2))).shape
        (3, 2)
        """
        _check(train_features)
        return cls(check_num_bits(num_bits), seed)

    def codes(self, features: Any) -> Codes:
        """Draw codes uint8 [n, num_bits // 8] for features [n, d]."""
        values = _check(features)
        rng = np.random.default_rng([self.seed, zlib.crc32(values.tobytes())])
        return rng.integers(0, 256, size=(len(values), self.num_bits // 8), dtype=np.uint8)


@final
@dataclass(frozen=True)
class Projection:
    """Codes by the signs of linear projections: bit = ((x - mean) @ directions >= 0).

    Attributes:
        mean: float64 [d], of the training features.
        directions: float64 [d, num_bits].
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]

    def codes(self, features: Any) -> Codes:
        """Encode features float [n, d] into packed uint8 [n, num_bits // 8].

        Raises:
            MismatchError: d is not that of the training features.
        """
        values = _check(features)
        if values.shape[1] != len(self.mean):
            raise MismatchError(f"features have {values.shape[1]} dimensions, fitted on {len(self.mean)}")
        return binarize(self.project(values))

    def project(self, values: Features) -> NDArray[np.float64]:
        """The projections float64 [n, num_bits] of features float32 [n, d]."""
        blocks = (values[start : start + _BLOCK_ROWS] for start in range(0, len(values), _BLOCK_ROWS))
        return np.concatenate([(block - self.mean) @ self.directions for block in blocks])


@final
class LSH:
    """Random hyperplanes through the mean of the training features (Charikar, STOC 2002)."""

    @staticmethod
    def fit(train_features: Any, num_bits: int, seed: int = 0) -> Projection:
        """Draw `num_bits` Gaussian directions.

        Raises:
            ConfigError: `num_bits` is not a multiple of 8.
            ValueError: the features are not finite and two-dimensional.

        >>> LSH.fit(np.eye(3), num_bits=8).codes(np.eye(3)).shape
        (3, 1)
        """
        values = _check(train_features)
        shape = values.shape[1], check_num_bits(num_bits)
        return Projection(values.mean(0, dtype=np.float64), np.random.default_rng(seed).standard_normal(shape))


@final
class PCASign:
    """Signs of the first principal components, unrotated (Wang et al., CVPR 2010)."""

    @staticmethod
    def fit(train_features: Any, num_bits: int, seed: int = 0) -> Projection:
        """Fit PCA; `seed` is that of its randomised solver, taken for large inputs.

        Bits beyond the directions in which the training features vary (at most min(n - 1, d)) are constant: they
        change no distance, so that 128 bits of 64 features score as 64 bits do.

        Raises:
            ConfigError: `num_bits` is not a multiple of 8.
            ValueError: the features are not finite and two-dimensional.

        >>> PCASign.fit([[0], [1], [5]], num_bits=8).codes([[0], [1], [5]]).shape
        (3, 1)
        """
        return _principal(_check(train_features), check_num_bits(num_bits), seed)


@final
class ITQ:
    """Iterative quantization: PCA, then the rotation that brings the projections nearest to their signs.

    Equation: Gong and Lazebnik, CVPR 2011, Eq. 2, as `methods.linear.itq_rotation`.
    """

    @staticmethod
    def fit(train_features: Any, num_bits: int, seed: int = 0) -> Projection:
        """Fit PCA and 50 iterations of the rotation from a random orthogonal start.

        Raises:
            ConfigError: `num_bits` is not a multiple of 8.
            ValueError: the features are not finite and two-dimensional.

        >>> ITQ.fit([[0, 1], [1, 5], [5, 2]], num_bits=8).directions.shape
        (2, 8)
        """
        values = _check(train_features)
        principal = _principal(values, check_num_bits(num_bits), seed)
        rotation = rotate_to_signs(principal.project(values), seed)
        return Projection(principal.mean, principal.directions @ rotation)


@final
class ITQLinear:
    """ITQ's projection, trained on with labels: a linear head that starts from ITQ (METHODS 3.5).

    The supervised loss is LCGH's label margin with learned codewords; what a linear map keeps of ITQ makes it a strong
    rival on classes that training never saw.
    """

    @staticmethod
    def fit(train_features: Any, num_bits: int, seed: int = 0, *, train_labels: Any) -> Projection:
        """Fit ITQ, then 1,500 steps of Adam over 256 rows each of features [n, d] and multi-hot labels [n, c].

        Raises:
            ConfigError: `num_bits` is not a multiple of 8.
            ValueError: the features are not finite and two-dimensional.

        >>> ITQLinear.fit([[0, 1], [1, 5], [5, 2]], 8, train_labels=np.eye(2)[[0, 0, 1]]).directions.shape
        (2, 8)
        """
        values, start = _check(train_features), ITQ.fit(train_features, num_bits, seed)
        labels = torch.as_tensor(np.asarray(train_labels) > 0).to(torch.int8)
        scale = start.project(values).std(0) + 1e-12  # tanh begins neither flat nor linear
        inputs = torch.as_tensor(values - start.mean, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            words = Codewords(labels.shape[1], num_bits, "spread")
            directions = torch.nn.Parameter(torch.as_tensor(start.directions / scale, dtype=torch.float32))
            words.learn_classes(LabelTable.of(labels.to(torch.uint8)))
            step = 1e-2 * float(directions.detach().abs().mean())
            optimizer = torch.optim.Adam([{"params": [directions], "lr": step}, {"params": [words.z], "lr": 1e-2}])
            for _ in range(_LINEAR_STEPS):
                rows = torch.randint(len(inputs), (256,))
                known = words.known(labels[rows], torch.ones(len(rows)))
                optimizer.zero_grad()
                label_margin(torch.tanh(inputs[rows] @ directions), words(), known).backward()
                optimizer.step()
        return Projection(start.mean, directions.detach().double().numpy())


@final
@dataclass(frozen=True)
class ClassCode:
    """The predicted class as the code: what supervised hashing must beat (Sablayrolles et al., ICASSP 2017).

    Logistic regression on standardised features: multinomial where every training row has exactly one class, else
    one against the rest. A class is a fixed codeword; an item takes the sign of the sum of the codewords of the
    classes predicted for it (of the likeliest one where none is).

    Attributes:
        codewords: int8 [c, num_bits] in {-1, +1}.
        classes: int64 [k], the classes that the classifier's k outputs stand for.
        one_class: whether an item is given exactly one class.
        model: the fitted classifier.
    """

    codewords: NDArray[np.int8]
    classes: NDArray[np.int64]
    one_class: bool
    model: Pipeline

    @classmethod
    def fit(cls, train_features: Any, num_bits: int, seed: int = 0, *, train_labels: Any) -> ClassCode:
        """Fit the classifier on features [n, d] and multi-hot labels [n, c] (entries > 0 are positive).

        Raises:
            ConfigError: `num_bits` is not a multiple of 8, or cannot tell c classes apart.
            InputError: no training row has a class.
            MismatchError: rows of features and labels differ.
            ValueError: features or labels are not two-dimensional, or a feature is not finite.

        >>> ClassCode.fit([[0], [1], [5]], 8, train_labels=np.eye(2)[[0, 0, 1]]).codes([[0], [1]]).shape
        (2, 1)
        """
        values, positive = _check(train_features), np.asarray(train_labels) > 0
        if positive.ndim != 2:
            raise ValueError(f"train labels have shape {positive.shape}; expected multi-hot rows [n, c]")
        if len(positive) != len(values):
            raise MismatchError(f"{len(values)} train features, but {len(positive)} rows of train labels")
        classes = np.flatnonzero(positive.any(0))
        if not len(classes):
            raise InputError("no training row has a class; the class code needs labels")
        words = spread_codewords(positive.shape[1], num_bits, seed)
        one_class = bool((positive.sum(1) == 1).all())
        multinomial = one_class and len(classes) > 1
        regression = LogisticRegression(max_iter=300, random_state=seed)
        model = make_pipeline(StandardScaler(), regression if multinomial else OneVsRestClassifier(regression))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged in 300 steps, or a class that every row has
            model.fit(values, positive.argmax(1) if multinomial else positive[:, classes].astype(int))
        return cls(words, classes, one_class, model)

    def codes(self, features: Any) -> Codes:
        """Encode features float [n, d] into packed uint8 [n, num_bits // 8]."""
        outputs = np.asarray(self.model.predict_proba(_check(features)))
        probabilities = outputs[:, -len(self.classes) :]  # of a single class scikit-learn gives "not" and "yes"
        likeliest = np.eye(len(self.classes), dtype=bool)[probabilities.argmax(1)]
        chosen = likeliest if self.one_class else likeliest | (probabilities > 0.5)
        return binarize(chosen.astype(np.int64) @ self.codewords[self.classes].astype(np.int64))


CODE_BASELINES: dict[str, Any] = {
    "random": RandomCodes,
    "lsh": LSH,
    "pca-sign": PCASign,
    "itq": ITQ,
    "itq-linear": ITQLinear,
    "class-code": ClassCode,
}
"""By the name each is reported under."""


def fit_baselines(
    train_features: Any, train_labels: Any, num_bits: int, seed: int = 0, without: Collection[str] = ()
) -> Iterator[tuple[str, Baseline]]:
    """Fit every code baseline, one after the other, on features [n, d] and multi-hot labels [n, c].

    Those that learn from labels are left out where no row has any, and so are those named in `without`.

    >>> x, y = [[0.0], [1.0], [5.0], [6.0]], np.eye(2)[[0, 0, 1, 1]]
    >>> [name for name, _ in fit_baselines(x, y, num_bits=8)] == list(CODE_BASELINES)
    True
    """
    labelled = bool((np.asarray(train_labels) > 0).any())
    for name, baseline in CODE_BASELINES.items():
        supervised = baseline in (ITQLinear, ClassCode)
        if name in without or (supervised and not labelled):
            continue
        supervision = {"train_labels": train_labels} if supervised else {}
        yield name, baseline.fit(train_features, num_bits, seed, **supervision)


def _principal(values: Features, num_bits: int, seed: int) -> Projection:
    """First `num_bits` principal directions [d, num_bits]; zero where the features do not vary."""
    directions = np.zeros((values.shape[1], num_bits))
    pca = PCA(n_components=min(num_bits, *values.shape), copy=False, random_state=seed).fit(values.astype(np.float64))
    spread = np.sqrt(pca.explained_variance_)
    moving = spread > FLAT * spread.max(initial=0.0)
    directions[:, : len(spread)] = pca.components_.T * moving
    return Projection(np.asarray(pca.mean_, dtype=np.float64), directions)


def _check(features: Any) -> Features:
    """Return features as float32 [n, d], n and d at least 1, or raise ValueError."""
    values = np.asarray(features, dtype=np.float32)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(f"features have shape {values.shape}; expected [n, d], not empty, every number finite")
    return values
