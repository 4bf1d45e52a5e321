"""Which number format a training multiplies in: decided once, for every worker and every resume. No Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TypeVar

import torch

from hashray.artifact import canonical
from hashray.errors import AlreadyExists
from hashray.progress import say
from hashray.storage import Store
from hashray.train.config import TrainConfig

Precision = Literal["fp32", "bf16"]
AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)
SLOW = (
    'note: precision = "bf16" on a CPU that does not multiply bf16 natively: a step takes about ten times as long as '
    "in fp32 (1,763 ms against 178 ms, measured on AVX2). Leave `precision` out to take what fits the processor"
)


def multiplies_bf16(gpu: bool) -> bool:
    """Whether this machine's GPU, or its CPU (AVX512-BF16, AMX), multiplies bfloat16 natively; asked of torch."""
    if gpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def with_precision(config: AnyTrainConfig, store: Store, run: str, ask: Callable[[], bool]) -> AnyTrainConfig:
    """The config with `precision` decided: as an earlier start of this run did, else by the processor.

    Args:
        store: keeps the decision until the run is finished.
        run: the plan of the run.
        ask: says whether the workers' processors multiply bfloat16 natively.
    """
    if config.backbone.frozen:  # cached features are fp32, and nothing else goes through the trunk
        if config.precision == "bf16":
            say('note: precision = "bf16" changes nothing with a frozen trunk: its features are fp32')
        return config.model_copy(update={"precision": "fp32"})
    key = f"progress/precision-{run}.json"
    if not store.exists(key):
        native = ask()
        if config.precision == "bf16" and not native and not config.gpu:
            say(SLOW)
        chosen = ("bf16" if native else "fp32") if config.precision == "auto" else config.precision
        with suppress(AlreadyExists):  # another run of this plan was first: both take what it decided
            store.create(key, canonical(chosen))
    return config.model_copy(update={"precision": json.loads(store.read(key))})
