"""The losses of the papers against loops over single pairs, rows and classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hashray.methods.losses import (
    adaptive_margin,
    label_margin,
    label_margins,
    pairwise_likelihood,
    pairwise_terms,
    quantization_l1,
    reconstruction,
    share_a_class,
    weighted_mean,
    weighted_pairwise_likelihood,
)

MODES = ["linear", "bce", "hashnet"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(n: int, c: int, seed: int = 0, low: int = 0) -> Tensor:
    return torch.randint(low, 2, (n, c), generator=torch.Generator().manual_seed(seed))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def naive_pairwise(left: Tensor, right: Tensor, similarity: Tensor, scale: float, weight: float, mode: str) -> float:
    share = float(similarity.double().mean())
    total = 0.0
    for i in range(len(left)):
        for j in range(len(right)):
            theta, s = scale * dot(left[i], right[j]), float(similarity[i, j])
            if mode == "linear":
                total += softplus(theta) - weight * s * theta
            elif mode == "bce":
                total += weight * s * softplus(-theta) + (1 - s) * softplus(theta)
            else:
                total += s * softplus(-theta) / share + (1 - s) * softplus(theta) / (1 - share)
    return total / (len(left) * len(right))


def naive_adaptive(codes: Tensor, words: Tensor, labels: Tensor, margin: float, floor: str) -> float:
    total, positives = 0.0, 0
    for u, row in zip(codes, labels, strict=True):
        negatives = [dot(u, words[t]) for t in range(len(words)) if row[t] == 0]
        hardest = max([0.0, *negatives]) if floor == "zero" else max(negatives, default=-math.inf)
        for j in range(len(words)):
            if row[j] == 1:
                positives += 1
                total += max(0.0, margin - dot(u, words[j]) + hardest)
    return total / max(positives, 1)


def naive_label_margin(codes: Tensor, words: Tensor, labels: Tensor, margin: float) -> float:
    total = 0.0
    for u, row in zip(codes, labels, strict=True):
        ups = [dot(u, words[j]) for j in range(len(words)) if row[j] == 1]
        downs = [dot(u, words[t]) for t in range(len(words)) if row[t] == 0]
        if ups and downs:
            total += max(0.0, margin - (min(ups) - max(downs)) / codes.shape[1])
    return total / len(codes)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 2), st.floats(0.1, 5), st.integers(0, 99)
)
def test_pairwise_likelihood(n: int, m: int, d: int, scale: float, weight: float, seed: int) -> None:
    left, right, similarity = normal(n, d, seed=seed), normal(m, d, seed=seed + 1), labels_of(n, m, seed)
    expected = naive_pairwise(left, right, similarity, scale, weight, "linear")
    assert float(pairwise_likelihood(left, right, similarity, scale, weight)) == pytest.approx(expected, abs=1e-12)
    single = pairwise_likelihood(left.float(), right.float(), similarity, scale, weight)
    assert single.dtype == torch.float32
    assert single.shape == ()
    assert float(single) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 999))
def test_weighted_pairwise_is_the_plain_one_over_repeated_rows(mode: str, seed: int) -> None:
    left, right, similarity = normal(4, 3, seed=seed), normal(5, 3, seed=seed + 1), labels_of(4, 5, seed)
    similarity[0, 0], similarity[0, 1] = 0, 1
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, 4, (k,), generator=generator) for k in (4, 5))
    rows[0] = columns[0] = columns[1] = 1  # the other weights may be 0, which leaves a row out
    repeated = similarity.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    expected = naive_pairwise(
        left.repeat_interleave(rows, 0), right.repeat_interleave(columns, 0), repeated, 0.5, 0.9, mode
    )
    got = weighted_pairwise_likelihood(left, right, similarity, rows, columns, 0.5, 0.9, mode)  # type: ignore[arg-type]
    assert float(got) == pytest.approx(expected, rel=1e-10)


def test_padding_rows_weigh_nothing() -> None:
    left, right, similarity = normal(4, 3), normal(5, 3, seed=1), labels_of(4, 5)
    plain = pairwise_likelihood(left[:2], right, similarity[:2])
    left.requires_grad_()
    weight = torch.tensor([1, 1, 0, 0])
    padded = weighted_pairwise_likelihood(left, right, similarity, weight, torch.ones(5))
    assert float(padded.detach()) == pytest.approx(float(plain), rel=1e-12)
    (gradient,) = torch.autograd.grad(padded, left)
    assert torch.equal(gradient[2:], torch.zeros(2, 3, dtype=torch.float64))
    nothing = weighted_pairwise_likelihood(left, right, similarity, torch.zeros(4), torch.ones(5))
    assert float(nothing.detach()) == 0.0
    assert float(weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]))) == 2.0
    assert float(weighted_mean(torch.tensor([1.0, 5.0]), torch.zeros(2))) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_theta_of_a_thousand_stays_finite(mode: str) -> None:
    theta = torch.tensor([[1e3, -1e3], [-1e3, 1e3]], requires_grad=True)
    loss = pairwise_terms(theta, torch.eye(2), 5.0, mode).sum()  # type: ignore[arg-type]
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, theta)[0]).all()
    big = torch.full((2, 10), 10.0)
    assert torch.isfinite(pairwise_likelihood(big, big, torch.eye(2), scale=1.0))


@given(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1.0]), st.floats(0.1, 5))
def test_gradient_is_sigmoid_of_theta_minus_w_s(value: float, s: float, w: float) -> None:
    theta = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(pairwise_terms(theta, torch.tensor([[s]]), w).sum(), theta)
    assert float(gradient) == pytest.approx(float(torch.sigmoid(theta.detach())) - w * s, abs=1e-9)


def test_share_a_class_counts_only_ones() -> None:
    left = torch.tensor([[1, 0, -1], [0, 1, 1], [0, 0, 0]])
    right = torch.tensor([[1, 1, 0], [-1, 0, 1], [-1, -1, -1]])
    assert share_a_class(left, right).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert share_a_class(left.to(torch.int8), right.to(torch.int8)).dtype == torch.float32


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_quantization_l1(n: int, bits: int, seed: int) -> None:
    codes = normal(n, bits, seed=seed)
    expected = sum(abs(abs(float(x)) - 1) for x in codes.flatten()) / codes.numel()
    assert float(quantization_l1(codes)) == pytest.approx(expected, rel=1e-12)
    assert float(quantization_l1(torch.where(codes >= 0, 1.0, -1.0))) == 0.0


@pytest.mark.parametrize("floor", ["zero", "strict"])
@given(n=st.integers(1, 5), c=st.integers(1, 5), margin=st.floats(0.1, 8), seed=st.integers(0, 999))
def test_adaptive_margin(floor: str, n: int, c: int, margin: float, seed: int) -> None:
    codes, words, labels = normal(n, 6, seed=seed), normal(c, 6, seed=seed + 1), labels_of(n, c, seed, low=-1)
    got = adaptive_margin(codes, words, labels, margin, floor)  # type: ignore[arg-type]
    assert float(got) == pytest.approx(naive_adaptive(codes, words, labels, margin, floor), rel=1e-10, abs=1e-12)


def test_the_two_floors_differ_where_every_negative_is_far_below_zero() -> None:
    codes, words = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.25, 0.25], [-1.0, -1.0]])
    labels = torch.tensor([[1, 0]])
    assert float(adaptive_margin(codes, words, labels, 1.0, "zero")) == 0.5  # 1 - 0.5 + 0
    assert float(adaptive_margin(codes, words, labels, 1.0, "strict")) == 0.0  # 1 - 0.5 - 2 < 0
    words.requires_grad_()
    (gradient,) = torch.autograd.grad(adaptive_margin(codes, words, labels, 4.0, "zero"), words)
    assert gradient.tolist() == [[-1.0, -1.0], [0.0, 0.0]]  # METHODS 2.2: a negative below 0 gets no gradient
    (gradient,) = torch.autograd.grad(adaptive_margin(codes, words, labels, 4.0, "strict"), words)
    assert gradient.tolist() == [[-1.0, -1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    "loss",
    [
        lambda u, v, y: adaptive_margin(u, v, y, 4.0, "zero"),
        lambda u, v, y: adaptive_margin(u, v, y, 4.0, "strict"),
        lambda u, v, y: label_margin(u, v, y, 1.0),
    ],
)
def test_unknown_labels_give_no_gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    codes, words = normal(4, 8).requires_grad_(), normal(5, 8, seed=1).requires_grad_()
    labels = torch.tensor([[1, 0, 0, -1, -1], [-1] * 5, [0] * 5, [1] * 5])
    value = loss(codes, words, labels)
    by_code, by_word = torch.autograd.grad(value, (codes, words))
    assert torch.isfinite(value)
    assert torch.isfinite(by_code).all()
    assert torch.isfinite(by_word).all()
    assert torch.equal(by_code[1:3], torch.zeros(2, 8, dtype=torch.float64))
    unknown = torch.full((4, 5), -1)
    by_code, by_word = torch.autograd.grad(loss(codes, words, unknown), (codes, words))
    assert float(by_code.abs().sum()) == float(by_word.abs().sum()) == 0.0
    first = torch.tensor([[1, 0, 0, -1, -1]])
    (by_word,) = torch.autograd.grad(loss(codes[:1], words, first), words)
    assert float(by_word[3:].abs().sum()) == 0.0


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0.05, 1), st.integers(0, 999))
def test_label_margin(n: int, c: int, margin: float, seed: int) -> None:
    codes, words = torch.tanh(normal(n, 8, seed=seed)), torch.tanh(normal(c, 8, seed=seed + 1))
    labels = labels_of(n, c, seed, low=-1)
    expected = naive_label_margin(codes, words, labels, margin)
    assert float(label_margin(codes, words, labels, margin)) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    finite = label_margins(codes, words, labels)
    assert bool(((finite.abs() <= 2) | finite.isposinf()).all())


def test_label_margin_is_zero_once_a_row_is_consistent() -> None:
    words = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]], requires_grad=True)
    codes, labels = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]], requires_grad=True), torch.eye(2).long()
    assert label_margins(codes, words, labels).tolist() == [1.0, 1.0]
    loss = label_margin(codes, words, labels, 0.5)
    assert float(loss.detach()) == 0.0
    assert all(float(g.abs().sum()) == 0 for g in torch.autograd.grad(loss, (codes, words)))
    assert float(label_margin(codes, words, 1 - labels, 0.5).detach()) == 1.5


def test_reconstruction() -> None:
    decoded, target = normal(3, 4), normal(3, 4, seed=1)
    variance = normal(4, seed=2).square() + 0.1
    expected = sum(
        (float(decoded[i, j]) - float(target[i, j])) ** 2 / float(variance[j]) for i in range(3) for j in range(4)
    )
    assert float(reconstruction(decoded, target, variance)) == pytest.approx(expected / 12, rel=1e-12)
    assert float(reconstruction(decoded, target, 2.0)) == pytest.approx(float((decoded - target).square().mean()) / 2)
    many = normal(4000, 4)
    mean = many.mean(0, keepdim=True).expand_as(many)
    assert float(reconstruction(mean, many, many.var(0, correction=0))) == pytest.approx(1.0)
    target.requires_grad_()
    decoded.requires_grad_()
    assert torch.autograd.grad(reconstruction(decoded, target, 1.0), target, allow_unused=True)[0] is None


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pairwise": lambda u, v: pairwise_likelihood(u, v, labels_of(len(u), len(v)), 0.5, 0.9),
    **{
        mode: lambda u, v, mode=mode: weighted_pairwise_likelihood(  # type: ignore[misc]
            u, v, labels_of(len(u), len(v)), torch.arange(len(u)), torch.ones(len(v)), 0.5, 0.9, mode
        )
        for mode in MODES
    },
    "quantization": lambda u, v: quantization_l1(u) + quantization_l1(v),
    "adaptive zero": lambda u, v: adaptive_margin(u, v, labels_of(len(u), len(v), low=-1), 3.0, "zero"),
    "adaptive strict": lambda u, v: adaptive_margin(u, v, labels_of(len(u), len(v), low=-1), 3.0, "strict"),
    "label margin": lambda u, v: label_margin(u, v, labels_of(len(u), len(v), low=-1), 1.0),
    "reconstruction": lambda u, v: reconstruction(u, v[: len(u)].detach() + 0 * v[:1].sum(), 2.0),
    "terms": lambda u, v: pairwise_terms(u @ v.T, labels_of(len(u), len(v)), 0.9).mean(),
    "mean": lambda u, v: weighted_mean(u.square().sum(1) * v.sum(), torch.arange(len(u))),
}


@pytest.mark.parametrize("name", [name for name in CASES if name != "reconstruction"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    codes, words = normal(4, 6).requires_grad_(), normal(5, 6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(CASES[name], (codes, words))


def test_gradient_of_the_reconstruction() -> None:
    assert torch.autograd.gradcheck(
        lambda x: reconstruction(x, normal(3, 4), 2.0), (normal(3, 4, seed=1).requires_grad_(),)
    )


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("terms", "mean")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_costs_no_bits(name: str, dtype: torch.dtype) -> None:
    # Near 64, bfloat16 has steps of 0.5, so a product in bfloat16 would show.
    codes, words = (normal(8, 64).to(dtype), normal(8, 64, seed=1).to(dtype))
    plain = CASES[name](codes.float(), words.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = CASES[name](codes, words)
    outside = CASES[name](codes, words)
    assert inside.dtype == outside.dtype == torch.float32
    assert float(inside) == float(outside) == float(plain)


def test_the_gradient_under_autocast_is_exact_too() -> None:
    gradients = []
    for enabled in (False, True):
        codes = normal(8, 64).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = pairwise_likelihood(codes, codes, torch.eye(8))
        gradients.append(torch.autograd.grad(loss, codes)[0])
    assert torch.equal(*gradients)
