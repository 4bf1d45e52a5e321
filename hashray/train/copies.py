"""Batches on their way to a device: on a GPU from pinned memory, while the step before computes. No Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from hashray.train.batches import Slice


class OnDevice(NamedTuple):
    """A slice, with its inputs and labels as tensors of the device."""

    piece: Slice
    inputs: Tensor
    labels: Tensor


def copied(slices: Iterable[Slice], device: torch.device) -> Iterator[OnDevice]:
    """Every slice with its tensors on the device, in order.

    On a GPU a slice is taken, and its copy begun on a stream of its own, before the one ahead of it is yielded; the
    consumer's stream waits for the copy of its own slice alone.
    """
    if device.type != "cuda":
        for piece in slices:
            yield OnDevice(piece, torch.as_tensor(piece.inputs), torch.as_tensor(piece.labels))
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[OnDevice, torch.cuda.Event] | None = None
    for piece in slices:
        with torch.cuda.stream(stream):
            tensors = OnDevice(piece, _begin(piece.inputs, device), _begin(piece.labels, device))
            done = torch.cuda.Event()
            done.record(stream)
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = tensors, done
    if ahead is not None:
        yield _arrived(*ahead, device)


def _begin(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.as_tensor(values).pin_memory().to(device, non_blocking=True)


def _arrived(tensors: OnDevice, done: torch.cuda.Event, device: torch.device) -> OnDevice:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(done)
    for tensor in (tensors.inputs, tensors.labels):
        tensor.record_stream(stream)  # its memory is not given away while this stream reads it
    return tensors
