"""Which radius finds duplicates, from the distances of a sample of an index's own codes. No Ray.

Two bits are much at 32 and nothing at 128, and how near unrelated images lie depends on the model. So the default is
the largest radius at which a code still has at most one neighbour on average, up to an eighth of the bits: what has
more neighbours than that says "same kind of picture", not "same picture".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.index.pairs import distances, to_words

SAMPLE = 1 << 15
BLOCK = 256
NEIGHBOURS = 1.0  # of a code, on average
SHARE_OF_BITS = 8
SURE = 100  # pairs of a sample; a count has an error of its square root


@dataclass(frozen=True)
class Density:
    """How near the codes of an index lie: pairs of a sample within each distance, and what follows for all codes.

    Attributes:
        within: int64 [d + 1], pairs of the sample within 0 to d bits.
        sample: codes of the sample, all different.
        codes: different codes of the index.
    """

    within: NDArray[np.int64]
    sample: int
    codes: int

    @property
    def pairs(self) -> NDArray[np.float64]:
        """Pairs to be expected among all codes within each distance, float64 [d + 1]."""
        of_sample, of_all = self.sample * (self.sample - 1), self.codes * (self.codes - 1)
        return self.within.astype(np.float64) * (of_all / max(1, of_sample))

    @property
    def neighbours(self) -> NDArray[np.float64]:
        """Neighbours to be expected of a code within each distance, float64 [d + 1]."""
        return 2 * self.pairs / max(1, self.codes)

    def radius(self) -> int:
        """The largest distance within which a code has at most one neighbour, in bits, up to an eighth of them."""
        return max(0, int(np.searchsorted(self.neighbours, NEIGHBOURS, side="right")) - 1)


def measure_density(sample: Codes, codes: int, most: int) -> Density:
    """Count the pairs of a sample within 0 to `most` bits.

    Args:
        sample: different codes uint8 [n, b], drawn from all.
        codes: number of different codes in the index.
    """
    words = to_words(sample)
    counts = np.zeros(most + 2, np.int64)
    for start in range(0, len(words), BLOCK):
        near = distances(words[start : start + BLOCK, None], words[None, start:])
        near = np.minimum(near, most + 1)
        later = np.arange(near.shape[1]) > np.arange(near.shape[0])[:, None]
        counts += np.bincount(near[later], minlength=most + 2)
    return Density(np.cumsum(counts)[:-1], len(words), codes)


def largest_radius(num_bits: int) -> int:
    """The largest radius that is chosen without being asked for.

    >>> largest_radius(64), largest_radius(8)
    (8, 1)
    """
    return num_bits // SHARE_OF_BITS
