"""The losses of the papers as plain, differentiable functions of torch tensors, computed in float32.

Every function first converts its inputs to float32 (float64 stays float64) and switches autocast off. So a bfloat16
trunk does not cost an inner product its last bits: near 64, bfloat16 has steps of 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

PosWeightMode = Literal["linear", "bce", "hashnet"]
Quantization = Literal["none", "l1", "l2", "log_cosh", "cosine"]
Arguments = ParamSpec("Arguments")


def full_precision(x: Tensor) -> Tensor:
    """Convert half precision to float32. float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def outside_autocast(loss: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Run a function of tensors with autocast off, because autocast computes a float32 matmul in bfloat16."""

    @wraps(loss)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*args, **kwargs)

    return run


@outside_autocast
def share_a_class(left: Tensor, right: Tensor) -> Tensor:
    """s_ij = 1 if label rows of [n, c] and [m, c] have a positive class in common, else 0; float32 [n, m].

    Equation: DSEH 3.1. Only entries equal to 1 count; -1 (unknown) is not a class.
    """
    return ((left == 1).float() @ (right == 1).float().T > 0).float()


@outside_autocast
def pairwise_terms(
    theta: Tensor,
    similarity: Tensor,
    positive_weight: float = 1.0,
    mode: PosWeightMode = "linear",
    similar_share: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of every pair [n, m], from theta [n, m] and similarity [n, m] in {0, 1}.

    Equation: DSEH Eqs. 5, 7, 12: softplus(theta) - w * s * theta; d/dtheta = sigmoid(theta) - w * s.
    Differs: `bce` is w * s * softplus(-theta) + (1 - s) * softplus(theta), bounded below for w > 1;
        `hashnet` is `bce` without w, and weighs similar pairs by |S|/|S1| and other pairs by |S|/|S0|. |S1|/|S| is
        `similar_share`, by default the mean similarity of this call.
    """
    theta = full_precision(theta)
    similarity = similarity.to(theta.dtype)
    if mode == "linear":
        return F.softplus(theta) - positive_weight * similarity * theta
    positive, negative = similarity * F.softplus(-theta), (1 - similarity) * F.softplus(theta)
    if mode == "bce":
        return positive_weight * positive + negative
    share = (similarity.mean() if similar_share is None else similar_share).clamp(1e-6, 1 - 1e-6)
    return positive / share + negative / (1 - share)


@outside_autocast
def pairwise_likelihood(
    left: Tensor, right: Tensor, similarity: Tensor, scale: float = 0.5, positive_weight: float = 1.0
) -> Tensor:
    """Mean over all pairs of softplus(theta) - w * s * theta, theta = scale * left_i . right_j.

    Args:
        left: [n, d] features or relaxed codes.
        right: [m, d] the other side of every pair.
        similarity: [n, m] in {0, 1}.
        scale: 1/2 as in the authors' code (theta = K/2 - Hamming distance for codes), 1 in the paper.
        positive_weight: w of METHODS 1.3; 0.999 (NUS-WIDE), 0.8 (COCO), 5 (ImageNet) in the authors' code.

    Equation: DSEH Eqs. 5, 7, 12. softplus instead of log(1 + exp) is finite for any theta.
    """
    left, right = full_precision(left), full_precision(right)
    return pairwise_terms(scale * left @ right.T, similarity, positive_weight).mean()


@outside_autocast
def weighted_pairwise_likelihood(
    left: Tensor,
    right: Tensor,
    similarity: Tensor,
    left_weight: Tensor,
    right_weight: Tensor,
    scale: float = 0.5,
    positive_weight: float = 1.0,
    mode: PosWeightMode = "linear",
    similar_share: Tensor | None = None,
) -> Tensor:
    """`pairwise_likelihood` in which row i counts left_weight[i] times and column j counts right_weight[j] times.

    Equal to the plain mean over the repeated rows (METHODS 1.7). A padding row has weight 0.
    `similar_share` is |S1|/|S| for mode `hashnet`, by default that of this call. If several workers share the global
    batch, the method must give it. Else the loss would depend on their number.
    """
    left, right = full_precision(left), full_precision(right)
    left_weight, right_weight = left_weight.to(left.dtype), right_weight.to(left.dtype)
    total = (left_weight.sum() * right_weight.sum()).clamp_min(1e-12)
    if similar_share is None:
        similar_share = left_weight @ similarity.to(left.dtype) @ right_weight / total
    terms = pairwise_terms(scale * left @ right.T, similarity, positive_weight, mode, similar_share.to(left.dtype))
    return left_weight @ terms @ right_weight / total


@outside_autocast
def weighted_mean(per_row: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the values [n] with weights [n]; 0 if every weight is 0."""
    per_row = full_precision(per_row)
    weight = weight.to(per_row.dtype)
    return (per_row * weight).sum() / weight.sum().clamp_min(1e-12)


@outside_autocast
def quantization_l1(codes: Tensor) -> Tensor:
    """Mean of | |h| - 1 | over relaxed codes [n, K]; exactly 0 if every |h| is 1.

    Equation: DSEH Eq. 8.
    Differs: a mean over rows and bits as in the authors' code; the paper sums over pairs.
    """
    return quantization(codes, "l1").mean()


def signs(values: Tensor) -> Tensor:
    """The bits of logits or relaxed codes as -1 and +1 in the same dtype. 0 becomes +1, as in codes.py."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


@outside_autocast
def quantization(codes: Tensor, kind: Quantization) -> Tensor:
    """Distance [n] of each relaxed code [n, K] from its signs; exactly 0 if every |u| is 1.

    Equation: METHODS 6.4: the mean over bits of | |u| - 1 | (l1), of its square (l2) or of its log cosh, or
    1 - cos(u, sign u).
    """
    codes = full_precision(codes)
    gap = codes.abs() - 1
    if kind == "none":
        return torch.zeros_like(gap[:, 0])
    if kind == "cosine":
        return 1 - codes.abs().sum(1) / (codes.norm(dim=1).clamp_min(1e-12) * codes.shape[1] ** 0.5)
    if kind == "log_cosh":  # log cosh x = |x| + log(1 + exp(-2|x|)) - log 2 does not overflow
        return (gap.abs() + F.softplus(-2 * gap.abs()) - math.log(2)).mean(1)
    return gap.abs().mean(1) if kind == "l1" else gap.square().mean(1)


@outside_autocast
def adaptive_margin(
    codes: Tensor,
    codewords: Tensor,
    labels: Tensor,
    margin: float = 1.0,
    negative_floor: Literal["zero", "strict"] = "zero",
) -> Tensor:
    """Hinge between each positive class and the hardest negative class, averaged over the positive entries.

    Args:
        codes: [n, K] relaxed codes u.
        codewords: [c, K] relaxed class codewords v.
        labels: [n, c] in {0, 1, -1}; -1 is unknown and has zero loss and zero gradient.
        margin: m; 1 in the paper.
        negative_floor: `zero` is Eq. 1 as written and released: a masked class counts as inner product 0, so the inner
            maximum is never below 0. `strict` masks with -inf.

    Equation: AdaLabelHash Eq. 1: sum_i sum_{j: s_ij=1} max(0, m - u_i.v_j + max_t(u_i.v_t [s_it != 1])).
    Differs: divided by the number of positive entries, as in the authors' code; the paper sums.
    """
    scores = full_precision(codes) @ full_precision(codewords).T
    positive, negative = labels == 1, labels == 0
    if negative_floor == "zero":
        hardest = torch.where(negative, scores, 0).amax(1).clamp_min(0)
    else:
        hardest = torch.where(negative, scores, -torch.inf).amax(1)
    hinge = torch.relu(margin - scores + hardest[:, None])
    return torch.where(positive, hinge, 0).sum() / positive.sum().clamp_min(1)


@outside_autocast
def label_surprise(codes: Tensor, codewords: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy [n] of the positive classes against the negative ones; 0 for a row without a positive class.

    Args:
        codes: [n, K] relaxed codes u; codewords: [c, K] relaxed class codewords v.
        labels: [n, c] in {0, 1, -1}; -1 is unknown and takes no part.
        temperature: T; inner products are divided by K, so that the same T suits any number of bits.

    Equation: METHODS 6.11, with s_t = u.v_t / (K T): the mean over classes j with y_j = 1 of
    log(e^{s_j} + sum_{t: y_t=0} e^{s_t}) - s_j. With one class a row that is softmax cross-entropy over the codewords.
    """
    scores = full_precision(codes) @ full_precision(codewords).T / (codes.shape[1] * temperature)
    positive = labels == 1
    negatives = torch.where(labels == 0, scores, -torch.inf).logsumexp(1, keepdim=True)
    surprise = torch.where(positive, F.softplus(negatives - scores), 0)
    return surprise.sum(1) / positive.sum(1).clamp_min(1)


@outside_autocast
def label_margins(codes: Tensor, codewords: Tensor, labels: Tensor) -> Tensor:
    """Signed label margin Delta_i [n] in [-2, 2]; +inf for a row without a positive or without a negative class.

    Equation: METHODS 3.2: (min_{j: y_ij=1} u_i.v_j - max_{t: y_it=0} u_i.v_t) / K.
    """
    scores = full_precision(codes) @ full_precision(codewords).T / codes.shape[1]
    worst_positive = torch.where(labels == 1, scores, torch.inf).amin(1)
    best_negative = torch.where(labels == 0, scores, -torch.inf).amax(1)
    return worst_positive - best_negative


@outside_autocast
def label_margin(codes: Tensor, codewords: Tensor, labels: Tensor, margin: float = 0.5) -> Tensor:
    """Mean over rows of max(0, margin - Delta_i), which is zero for a row that is consistent by the margin.

    Args:
        codes: [n, K] relaxed codes; codewords: [c, K]; labels: [n, c] in {0, 1, -1}.
        margin: m in (0, 1].

    Equation: METHODS 3.2 (LCGH, reimplemented from the abstract). A row without a positive or without a negative class
    contributes 0, for example if all labels are unknown.
    """
    return torch.relu(margin - label_margins(codes, codewords, labels)).mean()


@outside_autocast
def reconstruction_rows(decoded: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
    """`reconstruction` of each row, [n]."""
    return ((full_precision(decoded) - full_precision(target).detach()).square() / variance).mean(1)


@outside_autocast
def reconstruction(decoded: Tensor, target: Tensor, variance: Tensor | float) -> Tensor:
    """Mean of (decoded - target)^2 / variance. A decoder that predicts the mean scores 1.0.

    Args:
        decoded: [n, D].
        target: [n, D]; it gets no gradient.
        variance: [D] or a scalar.

    Equation: METHODS 3.2.
    """
    return reconstruction_rows(decoded, target, variance).mean()
