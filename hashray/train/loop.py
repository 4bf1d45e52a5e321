"""The training loop: phases, epochs, steps. Knows no method by name and no Ray.

The global batch is the unit: each worker takes its slice, its sums are divided by the mass that all
workers count together, and DistributedDataParallel's mean over workers is then the mean over the global batch,
uneven last batch included. Random numbers are seeded at every step from (seed, epoch, step, worker), so a
resumed run draws what an unbroken one draws.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hashray.errors import Diverged, RunError
from hashray.methods.base import LabelTable, Method, ParameterGroup, Phase, Term
from hashray.train.batches import Slice, SliceSource
from hashray.train.checkpoint import Checkpoint, Position, save_checkpoint
from hashray.train.config import OptimConfig, TrainConfig
from hashray.train.copies import OnDevice, copied
from hashray.train.group import Report, TorchWorkerGroup

NO_MASS = 1e-12  # of a term that no row of a step has


def learning_rate(config: OptimConfig, phase: Phase, step: int, steps_per_epoch: int) -> float:
    """Rate of the new layers at a step of a phase.

    Equation: METHODS 1.5 for `step`: start * 10^(-0.5 * (floor(e / 10) + r)), r in `phase.lr_factor`.
    """
    peak = config.lr * phase.lr_factor
    total = phase.epochs * steps_per_epoch
    if config.schedule == "step":
        return peak * 10 ** (-0.5 * (step // steps_per_epoch // 10))
    if config.schedule == "inverse_time":  # METHODS 2.4: the decay of AdaLabelHash's Keras code
        return peak / (1 + 1e-5 * step)
    warm = max(1, round(total * config.warmup_share))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def build_optimizer(config: OptimConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """One optimiser over the groups that have parameters; `trunk` learns at its factor times `trunk_lr_factor`."""
    lists = [
        {
            "params": group.parameters,
            "name": group.name,
            "factor": group.lr_factor * (config.trunk_lr_factor if group.name == "trunk" else 1.0),
            "weight_decay": config.weight_decay if group.decay else 0.0,
        }
        for group in groups
        if group.parameters
    ]
    if config.name == "sgd":
        return torch.optim.SGD(lists, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(lists, lr=config.lr)


def _parameters(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


@final
class Loop:
    """One worker's side of a training run."""

    def __init__(
        self, method: Method, config: TrainConfig, table: LabelTable, source: SliceSource,
        report: Report, validate: Callable[[Method], float] | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.method, self.config, self.table, self.source = method, config, table, source
        self.report, self.validate, self.device = report, validate, device
        self.workers = TorchWorkerGroup(source, table, device, report)
        self.phases = method.phases(config.num_epochs)
        self.position = Position()
        self.best: dict[str, Tensor] | None = None
        self.average: dict[str, Tensor] | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.waiting_share = 0.0  # of this epoch's time so far: the wait for data
        method.trunk.amp = config.precision == "bf16"

    def run(self, checkpoint: Checkpoint | None = None, until: int | None = None) -> dict[str, Tensor]:
        """Train from a checkpoint or from the start, to the end or until `until` epochs are done.

        Returns the chosen weights, the same on every worker. A later call can continue from the checkpoint reported
        with the last epoch.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        while self.position.phase < len(self.phases) and not self._reached(until):
            phase = self.phases[self.position.phase]
            self._run_phase(phase, until)
            if self.position.epoch < phase.epochs:
                break
            self.position.phase += 1
            self.position.epoch, self.position.step, self.position.phase_begun = 0, 0, False
        return self.best if self.best is not None else self._current()

    def _reached(self, until: int | None) -> bool:
        return until is not None and self.position.epochs_done(self.phases) >= until

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.position, self.best = checkpoint.position, checkpoint.best()
        self.method.load_state_dict(checkpoint.under("method"))
        if self.config.ema_decay is not None:
            self.average = checkpoint.under("average") or None
        if self.position.phase_begun:
            self.method.bind(self.table)
        state = checkpoint.moments()
        if state is not None:
            phase = self.phases[min(self.position.phase, len(self.phases) - 1)]
            self.optimizer = build_optimizer(self.config.optim, self.method.trained(phase))
            # Its moments, not its rates and decays: those are the config's, and may have changed.
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _begin_optimizer(self, phase: Phase) -> None:
        """A phase has rates and decays of its own. It keeps the moments of one that trains the same parameters."""
        before, self.optimizer = self.optimizer, build_optimizer(self.config.optim, self.method.trained(phase))
        if before is not None and _parameters(before) == _parameters(self.optimizer):
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": before.state_dict()["state"]})

    def _run_phase(self, phase: Phase, until: int | None) -> None:
        if not self.position.phase_begun:
            if self.workers.rank == 0:
                self.report({"event": "begin", "phase": phase.name, "round": phase.round}, None)
            seed = self.config.seed * 1000 + self.position.phase
            notes = self.method.begin_phase(phase, self.table, seed, self.workers)
            self.position.notes.setdefault("phases", []).append({"phase": phase.name, "round": phase.round, **notes})
            self.position.phase_begun = True
            if phase.steps:  # before the checkpoint, which must not hold the moments of the phase before
                self._begin_optimizer(phase)
            self._report({"event": "phase", **self.position.notes["phases"][-1]}, save=True)
        if not phase.steps:
            if self.position.epoch < phase.epochs:
                self._end_epoch(phase, {}, until)
            return
        if self.optimizer is None:
            self._begin_optimizer(phase)
        wrapped: nn.Module = self.method
        if self.workers.world > 1:
            wrapped = DistributedDataParallel(
                self.method, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        self.method.train()
        while self.position.epoch < phase.epochs and not self._reached(until):
            self._run_epoch(phase, wrapped, until)

    def _run_epoch(self, phase: Phase, wrapped: nn.Module, until: int | None) -> None:
        position, plan = self.position, self.source.plan
        number = position.epochs_done(self.phases)
        sums: dict[str, float] = position.notes.pop("sums", {})
        for batch in self._in_step(copied(self._waited(self.source.epoch(number, position.step)), self.device)):
            step = position.epoch * plan.steps + position.step
            rate = learning_rate(self.config.optim, phase, step, plan.steps)
            self._seed(number, position.step)
            for name, value in self._step(phase, wrapped, batch, rate).items():
                sums[name] = sums.get(name, 0.0) + value
            position.step += 1
            self._progress(number, position.step, plan.steps)
            due = self.config.checkpoint_steps
            if due and position.step % due == 0 and position.step < plan.steps:
                position.notes["sums"] = sums
                self._report({"event": "step", "epoch": number + 1, "step": position.step}, save=True)
                position.notes.pop("sums", None)
        rows = sums.pop("rows", 0)
        if rows != plan.rows:
            raise RunError(f"epoch {number}: {rows:,.0f} rows were trained on, the plan has {plan.rows:,}")
        loss = sums.pop("loss") / plan.steps
        self._end_epoch(phase, {"lr": rate, "loss": loss, **{name: sums[name] / plan.steps for name in sums}}, until)

    def _end_epoch(self, phase: Phase, means: dict[str, float], until: int | None) -> None:
        position = self.position
        self._require_finite_weights()
        position.epoch, position.step = position.epoch + 1, 0
        line = {"event": "epoch", "epoch": position.epochs_done(self.phases), "phase": phase.name, "round": phase.round,
                "phase_epoch": position.epoch, **means}  # fmt: skip
        last = position.epoch == phase.epochs
        if self.validate is not None and (last or position.epoch % self.config.validation_every == 0):
            place = f"phase {position.phase}, epoch {position.epoch}" if phase.selectable else None
            line["validation_map"] = self._select(place)
            if "random_map" in position.notes:  # the first worker's, which reports
                line["random_map"] = statistics.mean(position.notes["random_map"])
        position.notes.setdefault("history", []).append(line)
        self._report(line, save=last or self._reached(until) or position.epoch % self.config.checkpoint_every == 0)

    def _require_finite_weights(self) -> None:
        """The loss of a step is that before it: it says nothing about what the last step of an epoch did."""
        for name, tensor in self.method.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise Diverged(
                    f"{name} is not finite at phase {self.position.phase}, after epoch {self.position.epoch + 1}; "
                    "lower optim.lr, or set optim.clip_norm"
                )

    def _progress(self, number: int, step: int, steps: int) -> None:
        if step < steps and self.workers.is_due():
            line = {"event": "progress", "epoch": number + 1, "step": step, "waiting_share": self.waiting_share}
            self.report(line, None)

    def _waited(self, slices: Iterator[Slice]) -> Iterator[Slice]:
        """The slices, measuring the share of the time that goes into waiting for them."""
        start_s, waited_s = time.monotonic(), 0.0
        while True:
            asked_s = time.monotonic()
            piece = next(slices, None)
            if piece is None:
                return
            now_s = time.monotonic()
            waited_s += now_s - asked_s
            self.waiting_share = waited_s / max(now_s - start_s, 1e-9)
            yield piece

    def _in_step(self, batches: Iterator[OnDevice]) -> Iterator[OnDevice]:
        for batch in batches:
            piece = batch.piece
            if piece.step != self.position.step or piece.rows != self.source.plan.batch_rows(piece.step):
                raise RunError(
                    f"the data stream gave step {piece.step} ({piece.rows} rows) where step {self.position.step} was "
                    "due: workers are out of step; this is a fault of the input pipeline, not of your data"
                )
            yield batch

    def _step(self, phase: Phase, wrapped: nn.Module, batch: OnDevice, rate: float) -> dict[str, float]:
        assert self.optimizer is not None
        piece, inputs, labels = batch
        count = len(inputs)
        if inputs.ndim == 2:
            inputs = inputs.to(self.method.trunk.mean.dtype)
        weight = torch.ones(count, device=self.device)
        if count == 0:  # nothing left for this worker in an uneven last batch; it still joins the reduction
            inputs, labels = inputs.new_zeros(1, *inputs.shape[1:]), labels.new_zeros(1, labels.shape[1])
            weight = weight.new_zeros(1)
        terms = wrapped(phase, inputs, labels, weight)
        means, masses = self._agree(terms, count, piece.rows)
        self.optimizer.zero_grad(set_to_none=True)
        parts = [term.total * (self.workers.world / masses[name]) for name, term in terms.items() if term.in_loss]
        torch.stack(parts).sum().backward()
        if self.config.optim.clip_value is not None:
            nn.utils.clip_grad_value_(self.method.parameters(), self.config.optim.clip_value)
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self._update_average()
        self.method.after_step(phase, {name: mean for name, mean in means.items() if masses[name] > NO_MASS})
        loss = sum(means[name] for name, term in terms.items() if term.in_loss)
        return means | {"loss": loss, "rows": float(piece.rows)}

    def _agree(self, terms: dict[str, Term], count: int, rows: int) -> tuple[dict[str, float], dict[str, float]]:
        """Means and masses of the terms over all workers. Every worker has them before any of them steps."""
        local = [value.detach().double().cpu() for term in terms.values() for value in (term.total, term.mass)]
        *sums, seen = self.workers.agree(
            torch.stack([*local, torch.tensor(float(count), dtype=torch.float64)]), dist.ReduceOp.SUM
        ).tolist()
        if seen != rows:
            raise RunError(f"step {self.position.step}: workers hold {seen:,.0f} rows of a batch of {rows:,}")
        masses = {name: max(mass, NO_MASS) for name, mass in zip(terms, sums[1::2], strict=True)}
        means = {name: total / masses[name] for name, total in zip(terms, sums[::2], strict=True)}
        if not all(math.isfinite(value) for value in means.values()):
            raise Diverged(
                f"the loss is not finite at phase {self.position.phase}, epoch {self.position.epoch}, step "
                f"{self.position.step}: {means}; lower optim.lr, or set optim.clip_norm"
            )
        return means, masses

    def _update_average(self) -> None:
        decay = self.config.ema_decay
        if decay is None:
            return
        state = self.method.state_dict()
        if self.average is None:
            self.average = {name: tensor.clone() for name, tensor in state.items()}
        for name, tensor in state.items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    def _current(self) -> dict[str, Tensor]:
        source = self.average if self.average is not None else self.method.state_dict()
        return {name: tensor.detach().clone() for name, tensor in source.items()}

    def _select(self, place: str | None) -> float:
        """Validate on the first worker; keep the weights if they are the best so far and `place` is given."""
        chosen = self._current()
        box: list[Any] = [None]
        if self.workers.rank == 0:
            assert self.validate is not None
            kept = {name: tensor.clone() for name, tensor in self.method.state_dict().items()}
            self.method.load_state_dict(chosen)
            box[0] = self.validate(self.method)
            self.method.load_state_dict(kept)
        if self.workers.world > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        score = float(box[0])
        if place is not None and (self.position.best_score is None or score > self.position.best_score):
            self.position.best_score, self.position.best_at, self.best = score, place, chosen
        return score

    def _report(self, metrics: dict[str, Any], save: bool) -> None:
        def write(folder: Path) -> None:
            extra = {} if self.average is None else {"average": self.average}
            save_checkpoint(folder, self.position, self.method.state_dict(), self.optimizer, self.best, extra)

        self.report(metrics, write if save else None)

    def _seed(self, number: int, step: int) -> None:
        mixed = ((self.config.seed * 1_000_003 + number) * 1_000_003 + step) * 1_009 + self.workers.rank
        torch.manual_seed(mixed % 2**63)
