"""The training loop: the global batch is the unit, and a resumed run is the unbroken one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hashray.errors import Diverged, RunError
from hashray.methods import known_methods
from hashray.methods.base import LabelTable, Method, ParameterGroup, Phase, Term
from hashray.train.batches import EpochPlan, Slice, SliceSource
from hashray.train.config import OptimConfig
from hashray.train.loop import Loop, learning_rate
from tests.unit.worker_group import (
    CLASSES,
    DIM,
    Stop,
    build,
    config_of,
    make_rows,
    read,
    run_loop,
    run_processes,
)

RUN = {"epochs": 2, "method": {"rounds": 2}}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


# One step of plain SGD: the difference of the weights is the gradient. Rows of one and of two classes, so that the
# two workers' halves of 44 rows differ in what their terms are means over.
GRADIENT: dict[str, Any] = {"epochs": 1, "batch_size": 44, "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.0}}
PER_SAMPLE = {"rounds": 2, "bank": "per_sample", "label_epochs": 3}
SGD = {"name": "sgd", "lr": 0.05}
TWO_WORKERS = {
    # 300 rows in batches of 128: 128, 128, 44 and, of two workers with slices of 64, 44 + 0 in the last.
    "uneven": (config_of(epochs=1, batch_size=128, method={"rounds": 2}), 300),
    "five steps": (config_of(epochs=1, batch_size=128, method={"rounds": 1}, optim=SGD), 600),
    # In the second round the banks come from the images of both workers.
    "per sample": (config_of(epochs=1, batch_size=64, method=PER_SAMPLE, optim={"clip_value": 1e-3}), 64),
    **{kind: (config_of(**GRADIENT, method={"kind": kind}), 44) for kind in sorted(known_methods())},
    **{
        f"lcgh, {priority}": (config_of(**GRADIENT, method={"kind": "lcgh", "priority": priority}), 44)
        for priority in ("sum", "split", "gate")
    },
    # Five labelled rows among 44: the two workers' shares of them differ as no other mean does.
    "lcgh, unlabelled": (config_of(**GRADIENT, unlabelled=True, method={"kind": "lcgh"}), 44),
    # A step of labels alone, a step with the multiplier that it left.
    "lcgh, dual": (
        config_of(**{**GRADIENT, "epochs": 2}, method={"kind": "lcgh", "priority": "dual", "warmup_share": 0.5}),
        44,
    ),
}


@pytest.fixture(scope="module")
def two_workers() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_processes(TWO_WORKERS, world=2)


@pytest.mark.parametrize("name", TWO_WORKERS)
def test_two_workers_take_the_steps_of_one(name: str, two_workers: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    alone, loop = run_loop(*TWO_WORKERS[name])
    plan = loop.source.plan
    steps = {"uneven": (3, 44), "five steps": (5, 88), "per sample": (1, 64)}.get(name, (1, 44))
    assert (plan.steps, plan.batch_rows(plan.steps - 1)) == steps
    first, second = (worker[name] for worker in two_workers)
    assert largest_difference(first, second) == 0
    assert largest_difference(alone, first) < (1e-6 if steps == (1, 44) else 1e-5)


@pytest.mark.parametrize("place", [(0, 0, 0), (0, 1, 0), (0, 1, 2), (1, 0, 0), (1, 1, 0)])
def test_a_stopped_run_resumes_to_the_unbroken_one(tmp_path: Path, place: tuple[int, int, int]) -> None:
    config = config_of(**RUN, checkpoint_steps=2, ema_decay=0.9)
    whole, unbroken = run_loop(config, 150)
    with pytest.raises(Stop):
        run_loop(config, 150, stop_at=place, folder=tmp_path)
    resumed, loop = run_loop(config, 150, checkpoint=read(tmp_path))
    assert largest_difference(whole, resumed) < 1e-6
    assert loop.position.notes["history"] == unbroken.position.notes["history"]


class TwoParts(Method):
    """Each of its two phases trains a part of the network that the other leaves alone."""

    kind = "two-parts"

    def __init__(self) -> None:
        super().__init__(config_of().method, build(config_of(), torch.float64).trunk, CLASSES)
        torch.manual_seed(0)
        self.hash = nn.Linear(DIM, 16, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(16, dtype=torch.float64))

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return Phase("scale", 0, epochs), Phase("hash", 1, epochs)

    def trained(self, phase: Phase) -> list[ParameterGroup]:
        return [ParameterGroup("head", [self.scale] if phase.name == "scale" else list(self.hash.parameters()))]

    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        wanted = 2.0 * (labels == 1).repeat(1, 16 // CLASSES) - 1
        gap = (torch.tanh(self.logits(inputs)) - wanted).square().mean(1)
        return {"gap": Term((gap * weight).sum(), weight.sum())}

    def logits(self, inputs: Tensor) -> Tensor:
        return self.hash(inputs) * self.scale


@pytest.mark.parametrize("place", [(0, 1, 0), (1, 0, 0), (1, 1, 0)])
def test_a_phase_that_trains_other_parameters_resumes_with_its_moments(
    tmp_path: Path, place: tuple[int, int, int]
) -> None:
    config = config_of(epochs=2)
    whole, _ = run_loop(config, 100, method=TwoParts())
    with pytest.raises(Stop):
        run_loop(config, 100, stop_at=place, folder=tmp_path, method=TwoParts())
    resumed, _ = run_loop(config, 100, checkpoint=read(tmp_path), method=TwoParts())
    assert largest_difference(whole, resumed) < 1e-9
    start = TwoParts().state_dict()
    assert all(largest_difference({n: whole[n]}, {n: start[n]}) > 1e-4 for n in ("scale", "hash.weight"))


class NoRows(SliceSource):
    """A stream whose tasks give nothing."""

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan

    def epoch(self, number: int, first_step: int) -> Iterator[Slice]:
        return iter(())

    def scan(self) -> Iterator[tuple[Any, Any]]:
        return iter(())


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("dseh", "epoch 0: 0 rows were trained on, the plan has 40"), ("lcgh", "a scan .* gave 0 rows, the plan has 40")],
)
def test_a_stream_without_rows_is_named(kind: str, fault: str) -> None:
    config = config_of(method={"kind": kind})
    plan, table = EpochPlan((40,), 32, 64, 0), LabelTable.of(torch.as_tensor(make_rows(40)[1]))
    device = torch.device("cpu")
    loop = Loop(build(config, torch.float64), config, table, NoRows(plan), lambda line, write: None, None, device)
    with pytest.raises(RunError, match=fault):
        loop.run()


@pytest.mark.parametrize("kind", sorted(known_methods()))
def test_the_same_run_twice_is_bitwise_the_same(kind: str) -> None:
    run = {"epochs": 2, "method": {"kind": kind, **({"rounds": 2} if kind == "dseh" else {})}}
    first = run_loop(config_of(**run), 100)[0]
    assert largest_difference(first, run_loop(config_of(**run), 100)[0]) == 0
    assert largest_difference(first, run_loop(config_of(**run, seed=1), 100)[0]) > 0


def test_validation_keeps_the_weights_of_the_best_score() -> None:
    scores = iter([0.2, 0.9, 0.5, 0.4])
    seen: list[torch.Tensor] = []

    def validate(method: torch.nn.Module) -> float:
        seen.append(method.state_dict()["hash.weight"].clone())
        return next(scores)

    chosen, loop = run_loop(config_of(**RUN, validation_every=1), 100, validate=validate)
    assert torch.equal(chosen["hash.weight"], seen[1])
    assert (loop.position.best_score, loop.position.best_at) == (0.9, "phase 0, epoch 2")


def test_a_loss_that_is_not_finite_stops_the_run_with_advice() -> None:
    with pytest.raises(RunError, match=r"not finite at phase 0, epoch .*lower optim\.lr"):
        run_loop(config_of(optim={"name": "sgd", "lr": 1e30, "weight_decay": 0.0}, epochs=4), 100)


def test_a_last_step_that_breaks_the_weights_stops_the_run_with_advice() -> None:
    optim = {"name": "sgd", "lr": 3e38, "weight_decay": 0.0, "warmup_share": 0.0}
    config = config_of(optim=optim, epochs=1, batch_size=64, method={"rounds": 1, "eta": 1e6})
    with pytest.raises(Diverged, match=r"is not finite at phase 0, after epoch 1; lower optim\.lr"):
        run_loop(config, 40, dtype=torch.float32)


def test_learning_rates() -> None:
    phase = run_loop(config_of(epochs=1, method={"rounds": 2}), 40)[1].phases[1]
    assert phase.lr_factor == pytest.approx(10**-0.5)
    step = OptimConfig(lr=1e-3, schedule="step")
    assert learning_rate(step, phase, 0, 2) == pytest.approx(10**-3.5)
    assert learning_rate(step, phase, 20, 2) == pytest.approx(1e-4)
    cosine = OptimConfig(lr=1.0, warmup_share=0.5)
    rates = [learning_rate(cosine, phase, at, 10) for at in range(10)]
    assert rates[4] == pytest.approx(phase.lr_factor) and rates[0] < rates[1] and rates[9] < rates[6]


def test_clipping_bounds_each_entry_of_the_step() -> None:
    plain = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "warmup_share": 0.0}
    run = {"epochs": 1, "batch_size": 64, "method": {"rounds": 1}}
    start = run_loop(config_of(**run, optim=plain | {"lr": 1e-30}), 64)[0]
    for clip in (1e-4, None):
        moved = run_loop(config_of(**run, optim=plain | {"clip_value": clip}), 64)[0]
        largest = max(float((moved[n] - start[n]).abs().max()) for n in ("hash.weight", "semantic.weight"))
        assert largest <= 1e-4 + 1e-12 if clip else largest > 1e-3
