"""What a person sees of a training: rows/s and ETA inside each epoch, its losses, and TensorBoard files. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from hashray.progress import Bar, say
from hashray.storage import open_store
from hashray.train.job import TrainJob, total_epochs


class Watch:
    """The driver's bar and TensorBoard files, fed with the lines of the first worker."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.epochs = job, total_epochs(job.config, job.num_classes)
        self.bar = Bar("train", self.epochs * job.plan.rows, "rows")
        self.notes: dict[str, Any] = {}
        self.starts = 0
        self.losses: list[str] = []
        self.writer: Any = None

    def __enter__(self) -> Watch:
        folder = open_store(str(self.job.config.out)).local_path("tensorboard") if self.job.config.out else None
        if self.job.config.tensorboard and folder is not None:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(folder))
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, value, trace)
        if self.writer is not None:
            self.writer.close()

    def hear(self, line: Mapping[str, Any]) -> None:
        """Show a line of the training: a start, steps inside an epoch, an epoch, or a lost worker."""
        if "lost" in line:
            self.losses.append(str(line["lost"]).strip().partition("\n")[0])
            return
        event, rows = line["event"], self.job.plan.rows
        if event == "start":
            self._start(line)
        elif event == "begin":
            self.bar.waiting(f"phase {line['phase']} to begin")
        elif event == "prepare":
            self.bar.waiting(f"{line['what']}: {line['done']:,} of {line['total']:,}")
        elif event == "say":
            say(f"note: {line['text']}")
        elif event == "phase":
            self.bar.started()
        elif event == "progress":
            done = (line["epoch"] - 1) * rows + min(rows, line["step"] * self.job.plan.batch_size)
            place = {"epoch": f"{line['epoch']}/{self.epochs}", "step": f"{line['step']}/{self.job.plan.steps}"}
            self.bar.at(done, **place, **self.notes, data_wait=f"{line['waiting_share']:.0%}")
        elif event == "epoch":
            self.notes = {"loss": f"{line['loss']:.4f}"} if "loss" in line else {}
            if "validation_map" in line:
                self.notes["mAP"] = f"{line['validation_map']:.4f}"
            if "random_map" in line:
                self.notes["random"] = f"{line['random_map']:.4f}"
            self.bar.at(line["epoch"] * rows, epoch=f"{line['epoch']}/{self.epochs}", **self.notes)
            for name, value in line.items():
                if self.writer is not None and isinstance(value, float):
                    self.writer.add_scalar(name, value, line["epoch"])

    def _start(self, line: Mapping[str, Any]) -> None:
        self.starts += 1
        done = line["epoch"] * self.job.plan.rows + line["step"] * self.job.plan.batch_size
        self.bar.started()
        self.bar.resume_at(done)
        if self.starts > 1:
            reason = "; ".join(dict.fromkeys(self.losses)) or "a worker was lost"
            say(f"note: training goes on from epoch {line['epoch']}, step {line['step']}, after a loss: {reason}")
            self.losses = []
        elif done:
            say(f"training resumes from epoch {line['epoch']}, step {line['step']}")
