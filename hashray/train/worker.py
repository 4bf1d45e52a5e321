"""[Ray] A training by Ray Train: what each worker runs, and the driver's side of it.

Only lost workers are retried, from the last checkpoint, and each retry is said with its reason. An error that would
come again ends the training at once: the worker reports it, and the driver stops the worker group.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train as rt
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from hashray import errors
from hashray.data.corpus import Corpus, open_corpus
from hashray.engine.reports import listening, sending_requests, start_reports
from hashray.engine.session import connect, memory_environment, quicken_on_one_machine, require_room, unwrap
from hashray.errors import HashrayError, RunError, WorkersLost
from hashray.storage import join, open_store
from hashray.storage.s3 import arrow_filesystem
from hashray.train.assembly import build_loop
from hashray.train.checkpoint import Checkpoint, Position, load_checkpoint, read_checkpoint
from hashray.train.config import TrainConfig
from hashray.train.job import TrainJob, input_shape, input_type, total_epochs
from hashray.train.stream import START_FILE, StreamSlices, StreamSpec, scan_dataset, training_dataset
from hashray.train.watch import Watch

GROUP_END_S = 30
# The workers wait for the first one where it trains a label network or validates. Ray's limit of 30 minutes would end
# the group there, and every restart of it. A worker that died is noticed by its connections, not by this limit.
GROUP_WAIT_S = 86_400
PEER_DIED = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL")


def run_worker(options: dict[str, Any]) -> None:
    """The train function of every worker: Ray Train hands it {"job": TrainJob, "reports": the queue}."""
    job: TrainJob = options["job"]
    rank, world = rt.get_context().get_world_rank(), rt.get_context().get_world_size()
    reports = options["reports"]
    try:
        with sending_requests(reports):
            _run(job, reports, rank, world)
    except Exception as error:
        if ray.get(reports.has_failed.remote()):  # the failed worker has left, and this one only misses it
            return
        plain = unwrap(error)
        if is_of_lost_worker(error, world):
            raise
        name = type(plain).__name__ if isinstance(plain, HashrayError) else RunError.__name__
        line = {"failed": _text_of(plain), "name": name, "trace": traceback.format_exc()}
        ray.get(reports.put.remote(line))
        # Not raised, or Ray Train would start the group again for the same error. The others see the group break.
        if world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_of_lost_worker(error: BaseException, world: int) -> bool:
    """Whether an error only says that another process died, so that the same work may succeed when it is run again."""
    if isinstance(unwrap(error), HashrayError) or isinstance(error, RayTaskError):
        return False
    if isinstance(error, RayError | torch.distributed.DistError):
        return True
    # Gloo reports a peer that died as a plain RuntimeError.
    return world > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_DIED)


def _text_of(error: BaseException) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause) if isinstance(cause, HashrayError) else f"{type(cause).__name__}: {cause}"


def _run(job: TrainJob, reports: Any, rank: int, world: int) -> None:
    device = get_device()
    assert isinstance(device, torch.device)

    def report(metrics: dict[str, Any], write: Any) -> None:
        if rank == 0:
            reports.put.remote(metrics)
        if metrics["event"] in (
            "begin",
            "prepare",
            "say",
            "progress",
        ):  # the first worker's: the others do not wait for it
            return
        checkpoint = None
        if rank == 0 and write is not None:
            folder = tempfile.mkdtemp(prefix="hashray-checkpoint-")  # Ray removes it once it is uploaded
            write(Path(folder))
            checkpoint = rt.Checkpoint.from_directory(folder)
        # The next steps run while the checkpoint is uploaded; it counts once it is whole.
        mode = rt.CheckpointUploadMode.ASYNC
        rt.report(metrics, checkpoint, checkpoint_upload_mode=mode, delete_local_checkpoint_after_upload=True)

    shards = None if job.in_memory else (rt.get_dataset_shard("train"), rt.get_dataset_shard("scan"))

    def stream(data: Corpus) -> StreamSlices:
        assert shards is not None
        return StreamSlices(stream_spec(job, data), *shards, job.num_classes)

    loop = build_loop(job, rank, world, device, report, None if job.in_memory else stream)
    checkpoint, latest = None, rt.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as folder:
            checkpoint = load_checkpoint(Path(folder))
    elif job.start:
        checkpoint = read_checkpoint(job.start)
    at = Position() if checkpoint is None else checkpoint.position
    if rank == 0:
        reports.put.remote({"event": "start", "epoch": at.epochs_done(loop.phases), "step": at.step, "world": world})
        if not job.in_memory:
            # Where this group begins, before it asks for data: a checkpoint that was written but that Ray had not
            # registered when the run was killed is not the one a rerun starts from.
            position = {"epoch": at.epochs_done(loop.phases), "step": at.step, "world": world}
            open_store(join(job.checkpoints, job.run)).write(START_FILE, json.dumps(position).encode())
    loop.run(checkpoint, job.until)


def stream_spec(job: TrainJob, data: Corpus) -> StreamSpec:
    """What the tasks of a job's stream need to know."""
    config, parts = job.config, tuple(record.name for record in data.parts)
    return StreamSpec(
        job.source, job.plan, parts, job.selection, input_shape(config, data), input_type(data).str,
        config.backbone.framing, config.augment, config.fewest_workers, join(job.checkpoints, job.run),
    )  # fmt: skip


def environment_of(config: TrainConfig) -> dict[str, Any]:
    """The Ray runtime environment of a training's workers."""
    return {} if config.gpu or config.backbone.frozen else {"env_vars": memory_environment()}


def fit_on_ray(job: TrainJob) -> Checkpoint:
    """Run a job on Ray Train, with its checkpoints in `job.checkpoints`; return the last one.

    Raises:
        HashrayError: what a worker raised, as it raised it. RunError: any other error of a worker, or too many losses.
    """
    config = job.config
    with Watch(job) as watch:
        watch.bar.waiting("workers to start")
        connect()
        require_room(config.cpus_per_worker, float(config.gpu), config.fewest_workers)
        quicken_on_one_machine()
        reports = start_reports()
        failure: queue.SimpleQueue[HashrayError | None] = queue.SimpleQueue()

        def hear(line: dict[str, Any]) -> None:
            if "failed" in line:
                failure.put(_error_of(line))
            else:
                watch.hear(line)

        with listening(reports, hear, watch.bar.tick):
            result = _until_done(trainer_of(job, reports), failure)
    if result.error is not None:
        raise unwrap(result.error) from result.error
    if result.checkpoint is None:
        raise RunError(f"the training run {job.run} ended without a checkpoint; delete {job.checkpoints}")
    with result.checkpoint.as_directory() as folder:
        return load_checkpoint(Path(folder))


def _error_of(line: Mapping[str, Any]) -> HashrayError:
    error: HashrayError = getattr(errors, line["name"])(line["failed"])
    error.add_note(line["trace"])
    return error


def _until_done(trainer: TorchTrainer, failure: queue.SimpleQueue[HashrayError | None]) -> Any:
    """Fit in a thread of its own, so that Ctrl-C and a failure that would come again reach this one at once.

    In the main thread Ray Train answers Ctrl-C itself: it waits for its controller, a minute at times, and exits 1.
    """
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # raised again below
            outcome["error"] = error
        failure.put(None)

    threading.Thread(target=fit, name="hashray-fit", daemon=True).start()
    error = failure.get()
    if error is not None:
        with suppress(queue.Empty):
            failure.get(timeout=GROUP_END_S)  # the group ends by itself; where it hangs, the process's end ends it
        raise error
    if "error" in outcome:
        plain = unwrap(outcome["error"])
        if isinstance(plain, HashrayError):
            raise plain from outcome["error"]
        plain = getattr(plain, "controller_failure", plain)  # Ray Train's: its first line says nothing
        lost = isinstance(plain, RayActorError) or getattr(plain, "worker_failures", None)
        why = f"{type(plain).__name__}: {str(plain).strip().partition(os.linesep)[0]}"
        if lost:
            text = f"the training lost its workers more than max_failures times ({why}). Run the same command again"
            raise WorkersLost(f"{text} to go on from the last checkpoint") from outcome["error"]
        raise RunError(f"the training ended with {why}") from outcome["error"]
    return outcome["result"]


class _Retries(rt.UserCallback):
    """Tells the driver, from Ray Train's controller, why workers were lost."""

    def __init__(self, reports: Any) -> None:
        self.reports = reports

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        for _, error in sorted(worker_exceptions.items()):
            self.reports.put.remote({"lost": _text_of(unwrap(error))})


def scaling_of(config: TrainConfig) -> rt.ScalingConfig:
    """The worker group: a fixed number, or as many workers between two bounds as the cluster has room for."""
    fewest, most = config.bounds
    each = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.gpu else {})
    number: Any = fewest if fewest == most else (fewest, most)
    return rt.ScalingConfig(num_workers=number, use_gpu=config.gpu, resources_per_worker=each)


def trainer_of(job: TrainJob, reports: Any) -> TorchTrainer:
    """The Ray Train run of a job; `reports` is the queue of its workers."""
    config = job.config
    datasets: dict[str, Any] = {}
    if not job.in_memory:
        spec = stream_spec(job, open_corpus(job.source, None))
        epochs = total_epochs(config, job.num_classes)
        datasets = {"train": training_dataset(spec, epochs, reports), "scan": scan_dataset(spec, reports)}
    filesystem, path = arrow_filesystem(open_store(job.checkpoints))
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job, "reports": reports},
        torch_config=TorchConfig(timeout_s=GROUP_WAIT_S),
        scaling_config=scaling_of(config),
        run_config=rt.RunConfig(
            name=job.run, storage_path=path, storage_filesystem=filesystem,
            failure_config=rt.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=rt.CheckpointConfig(num_to_keep=2),
            callbacks=[_Retries(reports)],  # type: ignore[list-item]  # its v2 type
            worker_runtime_env=environment_of(config),  # type: ignore[call-arg]  # Ray Train has had it since its version 2
        ),
        datasets=datasets,
        dataset_config=rt.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )  # fmt: skip
