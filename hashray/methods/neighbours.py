"""Neighbourhood codes: a small head that learns without labels to keep the neighbours that the features have.

It starts from ITQ of normalised features. Every training row is then compared with the same draw of rows, the anchors:
once by features, once by codes. The loss is the divergence between the two, as of stochastic neighbour embedding
(Hinton and Roweis, NeurIPS 2002) with the softmax of contrastive losses on the codes (van den Oord et al.,
arXiv 1807.03748). Rows share no term with each other, so that any number of workers gives the same gradient.
"""

from __future__ import annotations

import math
from typing import Literal, final

import numpy as np
import torch
from pydantic import Field
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from hashray.errors import InputError
from hashray.methods.backbone import Trunk
from hashray.methods.base import LabelTable, Method, MethodConfig, Phase, Term, WorkerGroup
from hashray.methods.linear import Floats, Moments, no_direction, principal_directions, rotate_to_signs
from hashray.methods.losses import full_precision, outside_autocast, weighted_mean

START_ROWS = 8192  # about as many rows give the anchors and ITQ's rotation: 42 MB of 1,280 features
ROUNDING = 1e-6  # of features of length 1 in float32: a direction with a smaller deviation is none
SAME = 1e-5  # an anchor this near, as a share of the mean squared length, is the row itself or a copy of it
AWAY = -1e9  # logit of an anchor that does not count; finite, so that a row without any other has no gradient


class NeighboursConfig(MethodConfig):
    """Settings of neighbourhood codes."""

    kind: Literal["neighbours"] = "neighbours"
    anchors: int = Field(1024, ge=2, description="Training rows that every row is compared with")
    directions: int = Field(128, ge=8, description="Principal directions of the features that the head reads")
    hidden: int = Field(512, ge=0, description="Width of the layer beside the linear head; 0: the linear head alone")
    feature_temperature: float = Field(
        0.05, gt=0, description="Width of a neighbourhood of features, as a share of their variance"
    )
    code_temperature: float = Field(0.2, gt=0, description="Width of a neighbourhood of codes, as a share of num_bits")


@outside_autocast
def neighbour_divergence(
    points: Tensor, anchors: Tensor, codes: Tensor, anchor_codes: Tensor, variance: float, code_temperature: float
) -> Tensor:
    """Divergence [n] of the neighbourhoods of codes from those of points, in nats; 0 where they are the same.

    Args:
        points, anchors: [n, p] and [m, p], whose distances say how near an anchor is to a row.
        codes, anchor_codes: relaxed codes [n, K] and [m, K] in (-1, 1) of the same rows.
        variance: of the Gaussian around a point, sigma^2.
        code_temperature: tau.

    Equation: sum_j p_ij log(p_ij / q_ij), where over the anchors j
        p_ij = softmax_j(-|x_i - x_j|^2 / (2 sigma^2)) (Hinton and Roweis, NeurIPS 2002, Eqs. 1, 2 and 4) and
        q_ij = softmax_j(b_i . b_j / (K tau)).
    Differs: one variance for all rows, which the paper fits to a perplexity. q compares codes by inner products, as
        Hamming distances do. Anchors at the place of the row do not count, whether they are the row or a copy.
    """
    points, anchors, codes, anchor_codes = map(full_precision, (points, anchors, codes, anchor_codes))
    square = points.square().sum(1, keepdim=True) + anchors.square().sum(1) - 2 * points @ anchors.T
    same = square < SAME * anchors.square().sum(1).mean()
    near = F.log_softmax((-square / (2 * variance)).masked_fill(same, AWAY), dim=1)
    coded = F.log_softmax((codes @ anchor_codes.T / (codes.shape[1] * code_temperature)).masked_fill(same, AWAY), dim=1)
    return (near.exp() * (near - coded)).sum(1)


@final
class Neighbours(Method):
    """Frozen trunk -> normalised features -> principal directions -> head. Trained without labels."""

    kind = "neighbours"
    uses_unlabelled = True
    needs_labels = False
    trains_trunk = False
    config: NeighboursConfig
    mean: Tensor
    directions: Tensor
    anchors: Tensor

    def __init__(self, config: NeighboursConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__(config, trunk, num_classes)
        self.width = max(config.num_bits, min(config.directions, trunk.feature_dim))
        self.hash = nn.Linear(self.width, config.num_bits)
        self.bend = _bend(self.width, config.hidden, config.num_bits)
        self.register_buffer("mean", torch.zeros(trunk.feature_dim))
        self.register_buffer("directions", torch.zeros(trunk.feature_dim, self.width))
        self.register_buffer("anchors", torch.zeros(config.anchors, self.width))

    @classmethod
    def learns_from_labels(cls, config: MethodConfig) -> bool:
        return False

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return (Phase("neighbours", 0, epochs),)

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        """Start from ITQ, and draw the anchors. After `init` only the anchors are new.

        Returns:
            `variance_kept`, the share of the variance along the principal directions.

        Raises:
            InputError: a feature is not finite, or all rows have the same features.
        """

        def factors(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            rows = F.pad(self._normalised(inputs).double(), (0, 1), value=1.0)
            return rows, rows

        sums = workers.sum_products(factors).numpy()
        if not np.isfinite(sums).all():
            raise InputError(
                "training rows have features that are not finite numbers; the weights of the trunk are broken"
            )
        moments = Moments.of_products(sums)
        rows = workers.gather_rows(self._normalised, START_ROWS)[0].double().numpy()
        return workers.run_on_first(self, lambda: self._start(moments, rows, seed))

    def _start(self, moments: Moments, rows: Floats, seed: int) -> dict[str, float]:
        with torch.no_grad(), threadpool_limits(1):  # LAPACK's last digits depend on the number of threads
            fresh = not self.directions.any()
            if fresh:
                self._find_directions(moments)
            along = self.directions.double().cpu().numpy()
            points = (rows - self.mean.double().cpu().numpy()) @ along
            points = points[np.argsort(points[:, 0], kind="stable")]  # labels change the order of `gather_rows`
            if fresh:
                self._start_from_itq(points[:, : self.config.num_bits], seed)
            order = np.random.default_rng(seed).permutation(len(points))
            self.anchors.copy_(torch.as_tensor(points[np.resize(order, self.config.anchors)]))
        kept = _variance_along(along, moments) / np.square(along[:, 0]).sum()
        return {"variance_kept": kept / float(np.trace(moments.covariance))}

    def _find_directions(self, moments: Moments) -> None:
        directions = principal_directions(moments.covariance, self.width, ROUNDING)
        variance = _variance_along(directions, moments)
        if not variance:
            raise no_direction(moments.rows)
        self.mean.copy_(torch.as_tensor(moments.mean))
        self.directions.copy_(torch.as_tensor(directions * math.sqrt(self.width / variance)))

    def _start_from_itq(self, widest: Floats, seed: int) -> None:
        rotation = rotate_to_signs(widest, seed)
        rotation /= math.sqrt(np.square(widest @ rotation).mean())
        nn.init.zeros_(self.hash.bias)
        nn.init.zeros_(self.hash.weight)
        self.hash.weight[:, : self.config.num_bits] = torch.as_tensor(rotation.T)

    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """Equation: `neighbour_divergence` of tanh(logits), sigma^2 = feature_temperature * mean |x|^2."""
        points = self._points(inputs)
        codes, anchor_codes = torch.tanh(self._head(points)), torch.tanh(self._head(self.anchors))
        variance = self.config.feature_temperature * self.width
        rows = neighbour_divergence(points, self.anchors, codes, anchor_codes, variance, self.config.code_temperature)
        return {"neighbours": Term.of_mean(weighted_mean(rows, weight), weight)}

    def logits(self, inputs: Tensor) -> Tensor:
        return self._head(self._points(inputs))

    def _head(self, points: Tensor) -> Tensor:
        straight = full_precision(self.hash(points))
        return straight if self.bend is None else straight + full_precision(self.bend(points))

    def _points(self, inputs: Tensor) -> Tensor:
        return (self._normalised(inputs) - self.mean) @ self.directions

    def _normalised(self, inputs: Tensor) -> Tensor:
        return F.normalize(full_precision(self.trunk(inputs)), dim=1)


def _bend(width: int, hidden: int, num_bits: int) -> nn.Sequential | None:
    """What a head adds to a linear one: a hidden layer, which adds nothing at first."""
    if not hidden:
        return None
    last = nn.Linear(hidden, num_bits)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)


def _variance_along(directions: Floats, moments: Moments) -> float:
    return float(np.einsum("ij,ik,kj->", directions, moments.covariance, directions, optimize=True))
