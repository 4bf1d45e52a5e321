"""What a ranking of codes is worth: counts at each distance, mAP that no order of ties changes, code health."""

from hashray.metrics.average_precision import (
    TIES,
    average_precisions,
    mean_average_precision,
    mean_average_precision_float,
)
from hashray.metrics.health import code_health
from hashray.metrics.ranking import AveragePrecisions, PrecisionRecall, Ranking, rank

__all__ = [
    "TIES",
    "AveragePrecisions",
    "PrecisionRecall",
    "Ranking",
    "average_precisions",
    "code_health",
    "mean_average_precision",
    "mean_average_precision_float",
    "rank",
]
