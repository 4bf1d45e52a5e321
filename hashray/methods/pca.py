"""PCA with a random rotation: principal directions, which are turned so that all bits carry about the same variance.

It needs no labels and no steps. It is the start of ITQ's iterations (Gong and Lazebnik, CVPR 2011, section 3.1: PCA-RR;
Jegou et al., CVPR 2010).
"""

from __future__ import annotations

from typing import Literal, final

from hashray.methods.base import MethodConfig
from hashray.methods.linear import Floats, LinearCodes, random_rotation


class PCAConfig(MethodConfig):
    """Settings of PCA with a random rotation. It reads the seed of the training, and no epochs, batches or rates."""

    kind: Literal["pca"] = "pca"


@final
class PCA(LinearCodes):
    """Frozen trunk -> principal directions -> a random rotation."""

    kind = "pca"
    config: PCAConfig

    def rotation(self, projections: Floats, seed: int) -> Floats:
        """Equation: the bits are sign((x - mean) W R), W the principal directions, R orthogonal and random."""
        return random_rotation(self.config.num_bits, seed)
