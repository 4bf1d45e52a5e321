"""What a ranking of codes is worth: counts at each distance, mAP that no order of ties changes, code health."""

from hashray.metrics.average_precision import (
    TIES,
    average_precisions,
    mean_average_precision,
    mean_average_precision_float,
)
from hashray.metrics.distances import distances
from hashray.metrics.health import code_health
from hashray.metrics.labels import LabelRows, label_rows
from hashray.metrics.ranking import (
    AveragePrecisions,
    Merged,
    PrecisionRecall,
    Ranking,
    check_sides,
    count,
    merge_side,
    rank,
)

__all__ = [
    "TIES",
    "AveragePrecisions",
    "LabelRows",
    "Merged",
    "PrecisionRecall",
    "Ranking",
    "average_precisions",
    "check_sides",
    "code_health",
    "count",
    "distances",
    "label_rows",
    "mean_average_precision",
    "mean_average_precision_float",
    "merge_side",
    "rank",
]
