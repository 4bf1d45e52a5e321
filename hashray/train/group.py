"""The workers of a training as its methods see them: sums and rows over all of them. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hashray.errors import RunError
from hashray.methods.base import LabelTable, WorkerGroup
from hashray.train.batches import SliceSource, drawn_rows

PROGRESS_S = 0.5
# Given the metrics of an epoch and, when a checkpoint is due, a function that writes it into a folder.
Report = Callable[[dict[str, Any], Callable[[Path], None] | None], None]


@final
class TorchWorkerGroup(WorkerGroup):
    """The workers of a torch process group, or a single process."""

    def __init__(self, source: SliceSource, table: LabelTable, device: torch.device, report: Report) -> None:
        self.source, self.table, self.device, self.report = source, table, device, report
        self.reported_s = 0.0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def sum_by_group(
        self, outputs: Callable[[Tensor], Tensor], group: Callable[[Tensor], Tensor], groups: int
    ) -> Tensor:
        sums: Tensor | None = None
        with torch.no_grad():
            for inputs, labels in self._scan():
                if len(inputs):
                    values = outputs(torch.as_tensor(inputs, device=self.device)).double().cpu()
                    places = group(torch.as_tensor(labels))
                    if sums is None:
                        sums = torch.zeros(groups, values.shape[1], dtype=torch.float64)
                    sums.index_add_(0, places[places >= 0], values[places >= 0])
        return self._sum_of(sums)

    def sum_products(self, factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        sums: Tensor | None = None
        with torch.no_grad():
            for inputs, labels in self._scan():
                if len(inputs):
                    rows = torch.as_tensor(inputs, device=self.device), torch.as_tensor(labels, device=self.device)
                    left, right = factors(*rows)
                    product = (left.double().T @ right.double()).cpu()
                    sums = product if sums is None else sums.add_(product)
        return self._sum_of(sums)

    def _sum_of(self, mine: Tensor | None) -> Tensor:
        """The sum of a matrix over all workers; None on a worker that has no rows."""
        shape = self.agree(torch.tensor([0, 0] if mine is None else list(mine.shape)), dist.ReduceOp.MAX).tolist()
        return self.agree(torch.zeros(*shape, dtype=torch.float64) if mine is None else mine, dist.ReduceOp.SUM)

    def gather_rows(self, outputs: Callable[[Tensor], Tensor], most: int | None = None) -> tuple[Tensor, Tensor]:
        pieces: list[tuple[Tensor, Tensor]] = []
        share = 1.0 if most is None else most / self.source.plan.rows
        with torch.no_grad():
            for inputs, labels in self._scan():
                drawn = drawn_rows(inputs, share)
                if drawn.any():
                    values = outputs(torch.as_tensor(inputs[drawn], device=self.device)).cpu()
                    pieces.append((values, torch.as_tensor(labels[drawn])))
        mine = tuple(torch.cat(parts) for parts in zip(*pieces, strict=True)) if pieces else None
        boxes: list[Any] = [mine]
        if self.world > 1:
            boxes = [None] * self.world if self.rank == 0 else []
            dist.gather_object(mine, boxes if self.rank == 0 else None)
        filled = [box for box in boxes if box is not None]
        if not filled:
            return torch.zeros(0, 0), torch.zeros(0, self.table.rows.shape[1], dtype=torch.int8)
        rows, of = (torch.cat([box[i] for box in filled]) for i in (0, 1))
        order = torch.as_tensor(np.lexsort([*rows.numpy().T[::-1], *of.numpy().T[::-1]]))
        return rows[order], of[order]

    def run_on_first(self, module: nn.Module, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        box: list[Any] = [action() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
        return box[0]

    def progress(self, what: str, done: int, total: int) -> None:
        if self.is_due():
            self.report({"event": "prepare", "what": what, "done": done, "total": total}, None)

    def say(self, text: str) -> None:
        if self.rank == 0:
            self.report({"event": "say", "text": text}, None)

    def is_due(self) -> bool:
        """Whether the first worker shows progress now: twice a second at most."""
        now = time.monotonic()
        due = self.rank == 0 and now - self.reported_s >= PROGRESS_S
        self.reported_s = now if due else self.reported_s
        return due

    def _scan(self) -> Iterator[tuple[Any, Any]]:
        rows = self.source.plan.rows
        done = 0
        for inputs, labels in self.source.scan():
            yield inputs, labels
            done += len(inputs)
            self.progress("rows of a scan", min(done * self.world, rows), rows)
        if (scanned := int(self.agree(torch.tensor(done), dist.ReduceOp.SUM))) != rows:
            raise RunError(f"a scan of the training rows gave {scanned:,} rows, the plan has {rows:,}")

    def agree(self, tensor: Tensor, operation: Any) -> Tensor:
        """Reduce the tensor over all workers; the result is on the CPU."""
        if self.world == 1:
            return tensor
        moved = tensor.to(self.device)
        dist.all_reduce(moved, op=operation)
        return moved.cpu()
