"""ITQ: principal directions, rotated to bring the projections nearest to their signs (Gong and Lazebnik, CVPR 2011).

It needs no labels and no steps. The directions come from the covariance of all training rows, the rotation from 65,536
of them at most.
"""

from __future__ import annotations

from typing import Literal, final

from hashray.methods.base import MethodConfig
from hashray.methods.linear import Floats, LinearCodes, rotate_to_signs


class ITQConfig(MethodConfig):
    """Settings of ITQ. It reads the seed of the training, and no epochs, batches or rates."""

    kind: Literal["itq"] = "itq"


@final
class ITQ(LinearCodes):
    """Frozen trunk -> principal directions -> ITQ's rotation."""

    kind = "itq"
    config: ITQConfig

    def rotation(self, projections: Floats, seed: int) -> Floats:
        """Equation: Gong and Lazebnik, Eq. 2, as `itq_rotation`.

        Differs: fitted on a draw of about 65,536 rows where there are more.
        """
        return rotate_to_signs(projections, seed)
